"""A pair of real models: one reads languages that the other does not, and the other writes English."""
