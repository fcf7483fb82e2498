"""Models that rotate all positions of a text differently once it exceeds some length (LongRoPE).

What a cache holds was turned for a short text and does not fit a long one: a text that grows beyond the length has to
be read again from its beginning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calmlm.errors import DataError
from calmlm.state.cache import CalmCache


def turns(lengths: list[int], cache: CalmCache, new: int, positions: Tensor | None) -> int | None:
    """The length that a text in a cache passes with its ``new`` tokens; None where it passes none.

    Args:
        lengths: those that matter to the models.
        cache: of the composition.
        new: how many tokens follow what it holds.
        positions: (B or 1, ``new``) int64 of these, counted over real tokens, or None for columns.
    """
    # torch would compile a step for each value that it reads on the host; the caller has already checked.
    if not lengths or torch.compiler.is_compiling():
        return None
    before = int(cache.get_seq_length())
    if not before or before + new <= lengths[0]:
        return None
    end = before + new
    if positions is not None:
        before, end = int(positions[..., 0].max()), int(positions.max()) + 1
    return next((length for length in lengths if 0 < before <= length < end), None)


def check_turn(lengths: list[int], cache: CalmCache, new: int, positions: Tensor | None) -> None:
    """Raise where a text passes such a length, because its tokens in the cache do not fit then.

    Raises:
        DataError: for such a text.
    """
    length = turns(lengths, cache, new, positions)
    if length is not None:
        raise DataError(
            f"A cache must end before {length} tokens, because one of the models turns all positions of a longer text "
            f"otherwise, but {new} new tokens led beyond: pass the whole text, without past_key_values and "
            f"prefill_chunk_size."
        )


def room_before_turn(lengths: list[int], text: int, cached: int = 0) -> int | None:
    """How many tokens may be drafted behind a text so that reading them passes no such length; None for any number.

    Args:
        lengths: those that matter to the models.
        text: its tokens.
        cached: how many of them a cache holds; where those end before a length and the text behind it, it is read again
            as a whole, and nothing can be drafted before.
    """
    rooms = [length - text for length in lengths if text <= length]
    rooms += [0 for length in lengths if 0 < cached <= length < text]
    return min(rooms, default=None)
