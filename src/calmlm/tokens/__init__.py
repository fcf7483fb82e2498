"""Tokens of two tokenizers: how each spells text, and how an augmenting model gets the anchor's text in its own."""
