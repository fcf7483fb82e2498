"""Truncating on the left, as lm-evaluation-harness does, where an augmenting model counts in tokens of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from calmlm.data.context import OwnContext
from calmlm.errors import DataError

__all__ = ["kept", "windows"]

Window = tuple[list[int], list[int]]
"""Tokens that are read, and those behind them that are scored."""


def windows(contexts: Sequence[OwnContext], longest: int, context: list[int], continuation: list[int]) -> list[Window]:
    """A request for the likelihood of a continuation, in as many parts as the models' contexts ask for.

    The context is cut on the left. A continuation that does not fit by itself is scored in parts, each behind the token
    before it, and the last one behind as much as fits; the harness does so with long texts.

    Args:
        contexts: of the models that have tokens of their own.
        longest: how many of the anchor's tokens a call may have.
        context: what comes before, one token at least.
        continuation: what is scored.

    Raises:
        DataError: two tokens are too long already.
    """
    whole, start, found = context + continuation, len(context), list[Window]()
    while start < len(whole):
        # The last token is scored and not read.
        low, stop = max(0, len(whole) - 1 - longest), len(whole)
        begin = _first(lambda at: _fits(contexts, whole[at:-1]), low, start - 1)
        if begin is None:
            begin = start - 1
            read = min(longest, *(each.readable(whole[begin:-1]) for each in contexts))
            if read < 1:
                raise DataError(
                    f"Expected texts whose single tokens fit into the context of {contexts[0].name!r}, but one of them "
                    f"takes more than {min(each.length for each in contexts)} of its own tokens; leave it out."
                )
            stop = begin + 1 + read
        found.append((whole[begin:start], whole[start:stop]))
        start = stop
    return found


def kept(contexts: Sequence[OwnContext], ids: list[int], new: int) -> list[int]:
    """The end of a prompt that leaves room for ``new`` tokens, which are taken to be as long as the prompt's.

    The room is half of a context at most; a text ends earlier then.
    """
    begin = 0
    for each in contexts:
        wanted = math.ceil(new * each.count(ids) / max(1, len(ids)))
        room = each.length - min(wanted, each.length // 2)

        def fits(at: int, each: OwnContext = each, room: int = room) -> bool:
            return each.count(ids[at:]) <= room

        first = _first(fits, begin, len(ids) - 1)
        begin = len(ids) - 1 if first is None else first
    return ids[begin:]


def _fits(contexts: Sequence[OwnContext], ids: list[int]) -> bool:
    return all(each.readable(ids) == len(ids) for each in contexts)


def _first(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The first place from which on a text fits, found by halving; None where not even ``high`` is one."""
    if low > high or not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
