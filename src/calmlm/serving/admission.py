"""Which of the texts that wait are read together."""

from __future__ import annotations

from collections.abc import Sequence

from calmlm.serving.lanes import Lane, Speaking

WASTE = 64  # columns times rows that may be padding, and a quarter of what is no padding


def together(waiting: Sequence[tuple[Lane, Speaking, Sequence[int]]], room: int, cells: int) -> list[int]:
    """The first text and those of its lane that can be read beside it, by their places, in order.

    Args:
        waiting: the lane of each text, who speaks in it, and its tokens.
        room: for so many texts.
        cells: columns times rows of several that differ; equal ones behind each other are read once where the same
            models speak in them.
    """
    chosen: list[int] = []
    longest = real = rows = 0
    for place, (lane, speaking, ids) in enumerate(waiting):
        if len(chosen) >= room:
            break
        if chosen:
            first, latest = waiting[chosen[0]][0], waiting[chosen[-1]][1:]
            if lane is not first or not lane.joins:
                continue
            if (speaking, ids) == latest:
                chosen.append(place)
                continue
            found = real + len(ids)
            size = max(longest, len(ids)) * (rows + 1)
            # Prompts of one length are read in pieces where they are too much for once.
            in_pieces = lane.pieces and ids == latest[1] and size == found
            if not in_pieces and (not lane.pads or size > cells or size - found > WASTE + found // 4):
                continue
        chosen.append(place)
        longest, real, rows = max(longest, len(ids)), real + len(ids), rows + 1
    return chosen
