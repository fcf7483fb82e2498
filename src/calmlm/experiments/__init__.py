"""Experiments of the paper, rebuilt at sizes that run anywhere; each folder here is one experiment."""
