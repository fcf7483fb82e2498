"""A reader of the same text in tokens of its own, as its own tokenizer writes it, at every position."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from calmlm.bases.families import text_config
from calmlm.bases.trees import tree_mask
from calmlm.connectors.cross_attention import eager_attention
from calmlm.readers.common import Common
from calmlm.readers.inputs import Inputs, base_arguments, catch_up
from calmlm.readers.kept_states import Reading, reading
from calmlm.readers.packing import read_apart
from calmlm.state.call import Stream
from calmlm.state.frontier import NOBODY, Frontier, Shift
from calmlm.state.past import Announced, Past, crop_cache
from calmlm.tokens.live_text import OwnWriter, Token
from calmlm.tokens.stream import KEPT, LATEST


@dataclass
class Row:
    """What one row of a call needs.

    Attributes:
        kept: how many of the tokens in the cache stay.
        nodes: the tokens to read, each behind its parent.
        parents: the node before each one, -1 where that is the last token that stays.
        seen: (T, nodes) bool, which of them each anchor position of the call may see.
        final: the nodes of the text so far, in order.
    """

    kept: int
    nodes: list[Token] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    seen: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    final: list[int] = field(default_factory=list)

    @property
    def branches(self) -> bool:
        """Whether some of the tokens to read are no part of the text so far."""
        return len(self.final) < len(self.nodes)


@dataclass
class OwnReader(Common):
    """The same text as the augmenting model's own tokenizer writes it.

    At each anchor position that predicts something, the model has read exactly the tokens of the text up to there. Some
    of them change when the text goes on. These are read as branches: only the positions that they belong to see them,
    and they are taken back from the cache afterwards.
    """

    in_graphs: ClassVar[bool] = False  # every step works on text: it has other shapes and other branches each time
    transcoder: OwnWriter | None = None

    @torch.compiler.disable
    def read(self, inputs: Inputs, past: Past) -> Stream:
        if inputs.texts is not None:
            return read_apart(self, inputs, inputs.texts)
        past = self.opening.begin(past, inputs.ids.shape[0])
        frontier = past.frontier
        real = catch_up(inputs, past, self.name)
        told = told_tokens(inputs, frontier.length)
        rows = self._plan(inputs.ids, real, told, frontier, past.announced)
        if frontier.owner is not None:
            held = (frontier.owner != NOBODY).sum(1)
            past.take_back(held - held.new_tensor([row.kept for row in rows]))
        tree = any(row.branches for row in rows)
        return (self._read_tree if tree else self._read_on)(inputs, real, told, rows, past)

    def finish(self, past: Past) -> None:
        """Leave of what was read for this call only the tokens of the text so far."""
        frontier = past.frontier
        if frontier.chosen is None:
            return
        frontier.choose(frontier.chosen)
        past.move(Shift(frontier.chosen))
        frontier.chosen = None

    def draft(self, ids: Tensor, past: Past, most: int, confidence: float) -> bytes:
        """What the model would write next, greedily: at most ``most`` of its tokens, as bytes.

        It ends before a special token, and behind a token to which the model gives a probability below ``confidence``.
        What was read for it is forgotten: the connections need states at the anchor's positions.

        Args:
            ids: (1, 1), the anchor's newest token, which the model has not read.
            past: what it has read.
            most: tokens.
            confidence: from 0 to 1.
        """
        assert self.transcoder is not None
        past = self.opening.begin(past, 1)
        frontier, own = past.frontier, past.own
        assert own is not None
        nobody = torch.zeros_like(ids, dtype=torch.bool)
        row = self._plan(ids, ~nobody, nobody, frontier)[0]
        # Nothing new is there in the middle of a character; what begins with its end would be hard to tell.
        if not row.nodes or row.branches or frontier.owner is None:
            return b""
        held = (frontier.owner != NOBODY).sum(1)
        past.take_back(held - row.kept)
        new, read, said = [token[0] for token in row.nodes], 0, b""
        most = min(most, (self.backbone.max_positions or sys.maxsize) - past.opening - row.kept - len(new))
        for _ in range(most):
            logits = self._said_behind(new, read, past)
            read += len(new)
            probabilities = logits.float().softmax(-1)
            token = int(probabilities.argmax())
            piece = self.transcoder.spelled[token] if token < len(self.transcoder.spelled) else None
            if not piece:
                break
            said += piece
            if float(probabilities[0, token]) < confidence:
                break
            new = [token]
        if read:
            crop_cache(own, -read)
        return said

    def _said_behind(self, tokens: list[int], read: int, past: Past) -> Tensor:
        """The model's logits (1, V_A) behind tokens of one row, which stay in its cache behind ``read`` such ones."""
        assert past.frontier.owner is not None
        filled = nn.functional.pad((past.frontier.owner != NOBODY).long(), (0, read + len(tokens)), value=1)
        positions = self.opening.positions((filled.cumsum(1) - 1)[:, -len(tokens) :])
        stream = Stream(None, None, None, None, eager_attention)
        logits = self.run(
            stream,
            head=True,
            **base_arguments(
                self.backbone,
                input_ids=self.on_device(torch.tensor([tokens])),
                attention_mask=self.opening.attention(self.on_device(filled), len(tokens)),
                position_ids=self.on_device(positions),
                cache=past.own,
            ),
        )
        assert logits is not None
        return logits

    # What there is to read

    def _plan(
        self, ids: Tensor, real: Tensor, told: Tensor, frontier: Frontier, announced: Announced | None = None
    ) -> list[Row]:
        assert self.transcoder is not None
        coming = None if announced is None else announced.behind(frontier.length + ids.shape[1])
        known = frontier.ids.cpu().numpy() if frontier.ids is not None else None
        said = frontier.told.cpu().numpy() if frontier.told is not None else None
        rows = []
        for row, (new, keep, given) in enumerate(
            zip(ids.cpu().numpy(), real.cpu().numpy(), told.cpu().numpy(), strict=True)
        ):
            before = known[row] != NOBODY if known is not None else np.zeros(0, dtype=bool)
            columns = np.flatnonzero(np.concatenate((before, keep)))
            old = known[row][before] if known is not None else np.zeros(0, dtype=np.int64)
            old_told = said[row][before] if said is not None else np.zeros(len(old), dtype=bool)
            made = self._plan_row(
                np.concatenate((old, new[keep])),
                np.concatenate((old_told, given[keep])),
                len(old),
                row,
                frontier,
                np.zeros(0, dtype=np.int64) if coming is None else coming[0][row][coming[1][row]].cpu().numpy(),
            )
            seen = np.zeros((len(keep), len(made.nodes)), dtype=bool)
            seen[keep] = made.seen
            made.seen = seen
            made.nodes = [(index, int(columns[owner]), left) for index, owner, left in made.nodes]
            rows.append(made)
        return rows

    @staticmethod
    def _read_behind(settled: int, row: int, frontier: Frontier) -> list[Token]:
        """What the model has read of a row behind its settled tokens, owners counted over real anchor tokens."""
        if frontier.tokens is None or frontier.owner is None or frontier.left is None or frontier.ids is None:
            return []
        owner = frontier.owner[row]
        columns = (owner != NOBODY).nonzero()[settled:, 0]
        counted = (frontier.ids[row] != NOBODY).cumsum(0) - 1
        parts = (frontier.tokens[row, columns], counted[owner[columns]], frontier.left[row, columns])
        return list(zip(*(part.tolist() for part in parts), strict=True))

    def _plan_row(
        self, ids: np.ndarray, told: np.ndarray, start: int, index: int, frontier: Frontier, coming: np.ndarray
    ) -> Row:
        """Plan one row without padding.

        Args:
            ids, told: (n,) all of its anchor tokens.
            start: how many of them were read in earlier calls.
            index: of the row.
            frontier: what the model has read of it.
            coming: tokens that are given in later calls.
        """
        assert self.transcoder is not None
        writer = self.transcoder
        stream = writer.resume(ids[:start], told[:start], branches=self.backbone.branches)
        settled = stream.settled
        fresh: list[Token] = []
        targets: dict[int, list[Token]] = {}
        steady: dict[int, int] = {}  # how many tokens of each target are settled
        for place in range(start, len(ids)):
            fresh += stream.read(int(ids[place]), bool(told[place]))
            if place + 1 == len(ids) and told[place] and len(coming):
                all_told = np.pad(told, (0, len(coming)), constant_values=True)
                whole = writer.given(np.concatenate((ids, coming)), all_told, branches=self.backbone.branches)
                targets[place] = [token for token in whole[settled:] if token[1] <= place]
                steady[place] = len(targets[place])
            elif place + 1 == len(ids) or not (told[place] and told[place + 1]):
                targets[place] = [*fresh, *stream.pending()]
                steady[place] = len(fresh)
            if not writer.training and place >= len(ids) - LATEST:
                writer.remember(ids[: place + 1], told[: place + 1], stream, KEPT)
        tail = self._read_behind(settled, index, frontier)
        kept = len(tail)
        for target in targets.values():
            kept = common(tail[:kept], target)
        row = Row(settled + kept)
        path: list[int] = []
        before: list[Token] = []
        sure = 0
        ends: dict[int, list[int]] = {}
        for place, target in targets.items():
            rest = target[kept:]
            same = common(before, rest, min(sure, len(before), len(rest)))
            path = path[:same]
            for token in rest[same:]:
                row.parents.append(path[-1] if path else -1)
                path.append(len(row.nodes))
                row.nodes.append(token)
            before, sure, ends[place] = rest, max(0, steady[place] - kept), list(path)
        row.final = path
        row.seen = np.zeros((len(ids) - start, len(row.nodes)), dtype=bool)
        ahead: list[int] = []
        for place in range(len(ids) - 1, start - 1, -1):
            if place in ends:
                ahead = ends[place]
                row.seen[place - start, ahead] = True
            else:  # given text before its end sees what ends with it or before
                row.seen[place - start, [node for node in ahead if row.nodes[node][1] <= place]] = True
        return row

    # Reading

    def _read_on(self, inputs: Inputs, real: Tensor, told: Tensor, rows: list[Row], past: Past) -> Stream:
        """Read tokens that follow each other, in every row."""
        frontier, like = past.frontier, inputs.ids
        tokens, owner, left = _blocks(rows, like)
        new, queries = tokens.shape[1], like.shape[1]
        past.move(frontier.go_on(tokens, owner, left))
        frontier.extend(inputs.ids, real, told=told)
        assert frontier.owner is not None
        assert frontier.tokens is not None
        visible = (frontier.owner != NOBODY)[:, None].repeat(1, queries, 1)
        for index, row in enumerate(rows):
            if row.nodes:
                visible[index, :, frontier.width - len(row.nodes) :] = torch.from_numpy(row.seen).to(like.device)
        stream = self._stream(visible, frontier, queries, new, past)
        if new:
            filled = (frontier.owner >= 0).long()
            positions = self.on_device((filled.cumsum(1) - 1).clamp(min=0)[:, -new:])
            self.backbone.check_padding(f"augmenting model {self.name!r}", filled)
            positions = self.opening.positions(positions)
            self.backbone.check_length(f"augmenting model {self.name!r}", frontier.width + past.opening, positions)
            self.run(
                stream,
                rows=partial(_readings, rows, new) if past.cross is None else None,
                **base_arguments(
                    self.backbone,
                    input_ids=self.on_device(frontier.tokens[:, -new:]),
                    attention_mask=self.opening.attention(self.on_device(filled), new),
                    position_ids=positions,
                    cache=past.own,
                ),
            )
        return stream

    def _read_tree(self, inputs: Inputs, real: Tensor, told: Tensor, rows: list[Row], past: Past) -> Stream:
        """Read tokens that branch."""
        frontier, like = past.frontier, inputs.ids
        tokens, owner, left = _blocks(rows, like)
        batch, new, queries = *tokens.shape, like.shape[1]
        held = frontier.owner if frontier.owner is not None else like.new_zeros((batch, 0))
        old = held.shape[1]
        frontier.extend(inputs.ids, real, told=told)
        frontier.hang(tokens, owner, left)
        behind = np.zeros((batch, new, new), dtype=bool)
        depth = np.zeros((batch, new), dtype=np.int64)
        visible = torch.zeros((batch, queries, old + new), dtype=torch.bool)
        chosen = []
        for index, row in enumerate(rows):
            for node, parent in enumerate(row.parents):
                if parent >= 0:
                    behind[index, node] = behind[index, parent]
                    depth[index, node] = depth[index, parent] + 1
                behind[index, node, node] = True
            visible[index, :, old : old + len(row.nodes)] = torch.from_numpy(row.seen)
            chosen.append([*range(old - row.kept, old), *(old + node for node in row.final)])
        behind[:, range(new), range(new)] = True  # a column that fills a row has to see something
        kept = (held != NOBODY).cpu()
        visible[:, :, :old] = kept[:, None]
        counts = kept.sum(1)
        opening = past.opening
        place = torch.from_numpy(depth) + counts[:, None] + opening
        lead = torch.arange(opening).expand(batch, -1)
        before = torch.cat((lead, (kept.long().cumsum(1) - 1).clamp(min=0) + opening, place), dim=1)
        kept = nn.functional.pad(kept, (opening, 0), value=True)
        sees = torch.cat((kept[:, None].expand(-1, new, -1), torch.from_numpy(behind)), dim=2)
        width = max(map(len, chosen))
        frontier.chosen = torch.tensor([[-1] * (width - len(row)) + row for row in chosen], device=like.device)
        stream = self._stream(visible.to(like.device), frontier, queries, new, past)
        self.backbone.check_length(f"augmenting model {self.name!r}", int(place.max()) + 1, place)
        config = text_config(self.model)  # type: ignore[arg-type]
        mask = tree_mask(
            config, self.on_device(sees), self.on_device(place[:, :, None] - before[:, None]), self.backbone.dtype
        )
        self.run(
            stream,
            rows=partial(_readings, rows) if past.cross is None else None,
            **base_arguments(
                self.backbone,
                input_ids=self.on_device(tokens),
                attention_mask=mask,
                position_ids=self.on_device(place),
                cache=past.own,
            ),
        )
        return stream

    def _stream(self, visible: Tensor, frontier: Frontier, queries: int, new: int, past: Past) -> Stream:
        assert frontier.owner is not None
        mask, seeing, attention = self.masked(visible[:, None])
        rotations = frontier.rotations(queries, new, self.connector.head_dim) if self.connector.rotary else (None, None)
        owner = frontier.owner, frontier.length
        return Stream(mask, rotations[0], rotations[1], past.cross, attention, seeing, visible[:, None], owner)

    def room(self, ids: Tensor, past: Past) -> int:
        """How many of the next tokens (1, T) the model has positions for, behind what it has read."""
        most = self.backbone.max_positions
        if most is None:
            return ids.shape[1]
        frontier = past.frontier
        for count in range(ids.shape[1], 0, -1):
            part = ids[:, :count]
            row = self._plan(part, torch.ones_like(part, dtype=torch.bool), torch.zeros_like(part).bool(), frontier)[0]
            if row.kept + len(row.final) + past.opening <= most:
                return count
        return 0


def told_tokens(inputs: Inputs, length: int) -> Tensor:
    """Which of the new tokens were given and not generated, (B, T) bool; none where nobody tells.

    Args:
        inputs: of the call; its ``told`` and ``prompt`` count from the first token of the text.
        length: how many tokens came in earlier calls.
    """
    given = inputs.prompt if inputs.told is None else inputs.told
    if given is None:
        return torch.zeros_like(inputs.ids, dtype=torch.bool)
    told = given.bool()[:, length : length + inputs.ids.shape[1]]
    return nn.functional.pad(told, (0, inputs.ids.shape[1] - told.shape[1]))


def common(one: list[Token], other: list[Token], start: int = 0) -> int:
    """How many tokens two lists begin with that are the same; the first ``start`` are known to be."""
    while start < len(one) and start < len(other) and one[start][:2] == other[start][:2]:
        start += 1
    return start


def _readings(rows: list[Row], end: int | None = None) -> list[Reading]:
    """What the rows of a call without a cache are known by: their tokens, and behind which each stands.

    Args:
        rows: of the call.
        end: the column in which all rows end; None where all begin in the first.
    """
    found = []
    for row in rows:
        tokens = np.array([token for token, _, _ in row.nodes], dtype=np.int64)
        parents = np.array(row.parents, dtype=np.int64)
        columns = torch.arange(len(row.nodes)) + (0 if end is None else end - len(row.nodes))
        found.append(reading([tokens.tobytes(), parents.tobytes()], columns, len(row.nodes)))
    return found


def _blocks(rows: list[Row], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, owners (absolute columns) and what is left of the owners, each (B, nodes), rows filled on the right."""
    width = max(len(row.nodes) for row in rows)
    tokens = like.new_zeros((len(rows), width))
    owner = like.new_full((len(rows), width), NOBODY)
    left = torch.zeros((len(rows), width), dtype=torch.float32, device=like.device)
    for index, row in enumerate(rows):
        if row.nodes:
            ids, owners, rest = zip(*row.nodes, strict=True)
            tokens[index, : len(ids)] = like.new_tensor(ids)
            owner[index, : len(ids)] = like.new_tensor(owners)
            left[index, : len(ids)] = torch.tensor(rest, device=like.device)
    return tokens, owner, left
