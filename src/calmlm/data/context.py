"""How many tokens a composition can take."""

from __future__ import annotations

from typing import Any

# What architectures call it. Those with relative positions only (Bloom) state none.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")


def context_length(model: Any) -> int | None:
    """The shortest context among the language models of a composition; None where none of them states one.

    A model with other tokens may need more of them for the same text; it says so itself when they do not fit.
    """
    reading = [base for name, base in model.augmenting.items() if model.config.augmenting[name]["reads"] != "inputs"]
    lengths = [stated_length(base.config) for base in (model.anchor, *reading)]
    return min((length for length in lengths if length is not None), default=None)


def stated_length(config: Any) -> int | None:
    """How many tokens a language model can take, from its configuration; None where that states nothing."""
    config = config.get_text_config(decoder=True)
    return next((value for name in NAMES if isinstance(value := getattr(config, name, None), int)), None)
