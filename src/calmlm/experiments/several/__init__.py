"""Two real models and a third one: compositions that were trained apart, joined without any training."""
