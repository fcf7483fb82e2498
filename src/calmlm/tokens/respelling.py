"""Bytes in tokens that are there as bytes alone: always the longest one that fits.

This is how most tokenizers write most words. Where one of them would cut otherwise, nothing is wrong, since what is
written here is only proposed.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Respelling"]


class Respelling:
    """Writes bytes in a tokenizer's tokens.

    Args:
        pieces: the bytes of each token, by id; None for those that are no text.
    """

    def __init__(self, pieces: Sequence[bytes | None]) -> None:
        # Of two tokens of the same bytes the later one counts: a character, and not the byte token that stands for it.
        self.ids = {piece: index for index, piece in enumerate(pieces) if piece}
        self.longest = max(map(len, self.ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of ``text``, up to the first byte that none of them begins with."""
        found: list[int] = []
        place = 0
        while place < len(text):
            sizes = range(min(self.longest, len(text) - place), 0, -1)
            size = next((size for size in sizes if text[place : place + size] in self.ids), 0)
            if not size:
                break
            found.append(self.ids[text[place : place + size]])
            place += size
        return found
