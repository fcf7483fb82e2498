"""The alignment at work: from a batch of anchor ids to the augmenting model's ids and the frontier, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calmlm.tokens.alignment import LOOKBACK, Alignment

FEW = 32  # up to this many tokens, single look-ups are faster than tensors


@dataclass(frozen=True)
class Block:
    """Augmenting tokens for new anchor tokens.

    Attributes:
        ids: (B, S) int64; rows that have fewer tokens are filled on the right.
        owner: (B, S) int64, which of the new anchor positions each token belongs to; -1 where filled.
    """

    ids: Tensor
    owner: Tensor


class Transcoder(nn.Module):
    """An ``Alignment`` as tensors.

    Args:
        alignment: the table.
    """

    lookback: int | None = LOOKBACK

    def __init__(self, alignment: Alignment) -> None:
        super().__init__()
        self.flat: Tensor
        self.lengths: Tensor
        self.offsets: Tensor
        self.opens: Tensor
        self.whole: Tensor
        self.alignment, self.partial, self.fill = alignment, alignment.partial, alignment.fill
        self.open_ids = frozenset(alignment.opens)
        # One empty row at the end, for ids beyond the tokenizer's: models often have more embeddings than that.
        body = [*alignment.body, []]
        size = len(body)
        rows = [*body, *(alignment.start.get(i, body[i]) for i in range(size))]
        lengths = torch.tensor([len(row) for row in rows])
        opens = torch.zeros(size, dtype=torch.bool)
        opens[torch.tensor(alignment.opens, dtype=torch.long)] = True
        whole = torch.ones(size, dtype=torch.bool)
        whole[torch.tensor(list(alignment.partial), dtype=torch.long)] = False
        self.register_buffer("flat", torch.tensor([i for row in rows for i in row], dtype=torch.long), persistent=False)
        self.register_buffer("lengths", lengths, persistent=False)
        self.register_buffer("offsets", lengths.cumsum(0) - lengths, persistent=False)
        self.register_buffer("opens", opens, persistent=False)
        self.register_buffer("whole", whole, persistent=False)
        self.size = size

    def forward(self, ids: Tensor, real: Tensor, previous: Tensor) -> Block:
        """Transcode new tokens.

        Args:
            ids: (B, T) int64 anchor ids.
            real: (B, T) bool, False at padding.
            previous: (B, 3) int64, the real anchor ids before these, the latest last; -1 where there are none.
        """
        if ids.numel() <= FEW:
            return self._one_by_one(ids, real, previous)
        if self.flat.device != ids.device:
            self.to(ids.device)
        batch, length = ids.shape
        ids, previous = ids.clamp(max=self.size - 1), previous.clamp(max=self.size - 1)
        # The last real token before each one: padding may stand between them.
        place = torch.where(real, torch.arange(length, device=ids.device), -1).cummax(1).values
        place = nn.functional.pad(place[:, :-1], (1, 0), value=-1)
        before = torch.where(place >= 0, ids.gather(1, place.clamp(min=0)), previous[:, -1:])
        first = before < 0
        row = ids + self.size * (first | self.opens[before.clamp(min=0)]).long()
        counts = self.lengths[row] * real
        if self.partial and not bool(self.whole[ids].all() & self.whole[previous.clamp(min=0)].all()):
            return self._one_by_one(ids, real, previous)
        counts, row = counts.flatten(), row.flatten()
        total = counts.view(batch, length).sum(1)
        width = int(total.max()) if batch else 0
        owners = torch.repeat_interleave(torch.arange(length, device=ids.device).repeat(batch), counts)
        rows = torch.repeat_interleave(torch.arange(batch, device=ids.device), total)
        within = torch.arange(len(owners), device=ids.device) - torch.repeat_interleave(total.cumsum(0) - total, total)
        inside = torch.arange(len(owners), device=ids.device) - torch.repeat_interleave(
            counts.cumsum(0) - counts, counts
        )
        source = torch.repeat_interleave(self.offsets[row], counts) + inside
        out = ids.new_full((batch, width), self.fill)
        owner = ids.new_full((batch, width), -1)
        out[rows, within] = self.flat[source]
        owner[rows, within] = owners
        return Block(out, owner)

    def _one_by_one(self, ids: Tensor, real: Tensor, previous: Tensor) -> Block:
        """The same token by token: for a few tokens, and where a character's bytes are spread over tokens."""
        table, lists = self.alignment, []
        for row, keep, past in zip(ids.tolist(), real.tolist(), previous.tolist(), strict=True):
            recent = [index for index in past if index >= 0]
            tokens: list[tuple[int, int]] = []
            for position, (index, is_real) in enumerate(zip(row, keep, strict=True)):
                if not is_real:
                    continue
                starts = not recent or recent[-1] in self.open_ids
                if index in self.partial:
                    written = self._complete(recent[-LOOKBACK:], index)
                elif starts and index in table.start:
                    written = table.start[index]
                else:
                    written = table.body[index] if index < len(table.body) else []
                tokens += [(token, position) for token in written]
                recent.append(index)
            lists.append(tokens)
        return block_of(lists, self.fill, ids)

    def _complete(self, recent: list[int], index: int) -> list[int]:
        """What this token's bytes complete: whole characters whose last byte is among them."""
        lead = b""
        for other in recent:
            lead = lead + self.partial[other] if other in self.partial else b""
        piece = self.partial[index]
        text, position = lead + piece, 0
        ids: list[int] = []
        while position < len(text):
            width = _width(text[position])
            end = position + width
            try:
                character = text[position:end].decode()
            except UnicodeDecodeError:
                position += 1
                continue
            if end > len(lead):
                ids += self.alignment.characters.get(character, self.alignment.unknown)
            position = end
        return ids


def block_of(rows: list[list[tuple[int, int]]], fill: int, like: Tensor) -> Block:
    """A block of rows of (token, owner), on the device of ``like``."""
    width = max(map(len, rows), default=0)
    filled = [[*row, *[(fill, -1)] * (width - len(row))] for row in rows]
    pairs = torch.tensor(filled, dtype=like.dtype, device=like.device).view(len(rows), width, 2)
    return Block(pairs[..., 0], pairs[..., 1])


def _width(byte: int) -> int:
    return 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
