"""Making compositions from pretrained models."""
