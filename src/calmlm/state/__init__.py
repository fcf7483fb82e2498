"""What one call and its past hold: hooks, caches, and which augmenting positions an anchor position may see."""
