"""Key-value arithmetic: a model that knows a dictionary, composed with one that can calculate."""
