"""Whether a model comes with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def find_tokenizer(source: str | Path, **options: Any) -> Any:
    """The tokenizer that lies at an id or in a folder, or None.

    Args:
        source: id or folder.
        options: of `AutoTokenizer.from_pretrained`: `revision`, `trust_remote_code`, `token`, ...
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception:  # transformers raises different errors, depending on which file is missing
        return None
    # Where there is no tokenizer, transformers makes an empty one for some types of model (GPT-2, Gemma).
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None
