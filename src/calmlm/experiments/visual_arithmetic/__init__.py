"""Visual arithmetic: a vision encoder that knows handwritten digits, composed with a model that can calculate."""
