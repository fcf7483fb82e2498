"""Two tiny models with tokenizers of their own, as the experiments with real models take them."""

from __future__ import annotations

from calmlm.experiments.real.joined import Pair
from tiny import tiny_model
from tokenizers_tiny import tokenizer


def tiny_pair() -> Pair:
    """A byte-level Llama and a SentencePiece Gemma 3."""
    ours, theirs = tokenizer("bytes"), tokenizer("sentencepiece")
    anchor = tiny_model("llama", seed=1, vocab_size=len(ours), max_position_embeddings=512)
    augmenting = tiny_model("gemma3_text", seed=2, vocab_size=len(theirs), max_position_embeddings=512)
    return Pair(anchor, augmenting, ours, theirs)
