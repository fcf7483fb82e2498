"""The tokenizer of a composition: the first of several places that has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calmlm.errors import DataError
from calmlm.tokens.lookup import find_tokenizer


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
