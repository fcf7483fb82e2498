"""``calmlm ui``: a page on which a composition and its models answer side by side, and one looks inside."""
