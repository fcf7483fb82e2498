"""Generation: transformers' loops over a composition, and drafts by the augmenting model."""
