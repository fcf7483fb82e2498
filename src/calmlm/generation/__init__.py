"""Text from a composition."""
