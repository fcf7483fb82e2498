"""Finding the tokenizer that comes with a model or a composition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from calmlm.config import split_gguf
from calmlm.errors import DataError
from calmlm.tokens.collecting import without_collector
from calmlm.tokens.gguf_files import about_to_read


@without_collector()
def find_tokenizer(source: str | Path, **options: Any) -> Any:
    """The tokenizer that lies at an id or in a folder, or None.

    Args:
        source: id or folder, or a GGUF file there.
        options: of `AutoTokenizer.from_pretrained`: `revision`, `trust_remote_code`, `token`, ...
    """
    place, file = split_gguf(str(source))
    if file is not None:
        about_to_read()
        options["gguf_file"] = file
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception:  # transformers raises different errors, depending on which file is missing
        return None
    return None if is_made_up(tokenizer) else tokenizer


def is_made_up(tokenizer: Any) -> bool:
    """Whether transformers made an empty tokenizer up where there is none, as for GPT-2 and Gemma."""
    return not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)


def load_tokenizer(
    places: Sequence[str | None], *, revision: str | None = None, trust_remote_code: bool = False, named: bool = False
) -> Any:
    """The tokenizer from the first of `places` (ids or folders; None is skipped) that has one.

    Args:
        places: where to look, in order.
        revision: of the last place; the others are taken as they are.
        trust_remote_code: whether code that comes with a tokenizer may run.
        named: whether the user named the place; the message then says so.

    Raises:
        DataError: none has a tokenizer.
    """
    tried = list(dict.fromkeys(str(place) for place in places if place))
    for place in tried:
        tokenizer = find_tokenizer(
            place, revision=revision if place == tried[-1] else None, trust_remote_code=trust_remote_code
        )
        if tokenizer is not None:
            return tokenizer
    where = " or ".join(tried) or "the models given"
    advice = (
        "name another" if named else "name a tokenizer's id or folder with --tokenizer, or `tokenizer:` in the file"
    )
    raise DataError(f"Text needs a tokenizer, but none was found in {where}; {advice}.")
