"""The demonstration: two small models that cannot calculate with keys, and their composition that can."""
