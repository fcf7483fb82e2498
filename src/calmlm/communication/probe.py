"""Looks on while a composition reads one text: weights, gates, and the size of what is added."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calmlm.bases.structure import last_state
from calmlm.communication.token_texts import TokenTexts
from calmlm.communication.trace import Attended, Heard, connection_label
from calmlm.connectors.adapters import Adapters
from calmlm.connectors.cross_attention import CrossAttention
from calmlm.connectors.gate import ConvexGate
from calmlm.connectors.pointer import Pointer
from calmlm.connectors.word_map import WordMap
from calmlm.readers import Inputs
from calmlm.state.call import Stream
from calmlm.state.frontier import NOBODY
from calmlm.state.past import Past

__all__ = ["Probe"]


class _Read(NamedTuple):
    """What an augmenting model has read of a text: its tokens (S,), which of them stay (S,) bool, and which of them
    each anchor position sees (T, S) bool.
    """

    ids: Tensor
    stays: Tensor
    seen: Tensor


class Probe:
    """Looks on while a composition reads one text without its last token, in one call without a cache.

    Cross-attentions compute eagerly meanwhile, since other kinds keep no weights.

    Args:
        model: the composition.
        start: how many tokens come before the answer.
    """

    def __init__(self, model: Any, start: int) -> None:
        self.model, self.inner, self.start = model, model.model, start
        self._read: dict[str, _Read] = {}
        self._attention: dict[tuple[str, tuple[int, int]], tuple[Tensor, bool]] = {}
        self._gates: dict[str, list[Tensor]] = {}
        self._ratios: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Probe:
        try:
            self._install()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def _install(self) -> None:
        config = self.model.config
        self._setting(config, "_attn_implementation_internal", "eager")
        speaking = []
        for name in config.augmenting:
            if name not in self.inner.active:
                continue
            reader = self.inner.reader(name)
            reader.read = partial(self._reading, name, type(reader).read, reader)
            self._undo.callback(delattr, reader, "read")
            pairs = config.augmenting[name]["connections"]
            for index, connector in enumerate(self.inner.connectors[name]):
                if isinstance(connector, Adapters):
                    self._watch_adapters(f"{name} adapters", connector, config.augmenting[name]["adapters"]["targets"])
                elif index < len(pairs):
                    self._watch_connection(name, tuple(pairs[index]), connector)
                elif isinstance(connector, ConvexGate):
                    kind = "pointer" if isinstance(connector, Pointer) else "words"
                    self._setting(connector, "observe", partial(self._gate, f"{name} {kind}"))
                    speaking += [name] if isinstance(connector, WordMap) else []
        if speaking:
            self._watch_words(f"{' + '.join(speaking)} words")

    def _setting(self, owner: Any, key: str, value: Any) -> None:
        before = getattr(owner, key)
        setattr(owner, key, value)
        self._undo.callback(setattr, owner, key, before)

    def _hook(self, module: nn.Module, hook: Callable[..., None], *, first: bool = False) -> None:
        self._undo.callback(module.register_forward_hook(hook, prepend=first).remove)

    # What is watched

    def _watch_connection(self, name: str, layers: tuple[int, int], connector: Any) -> None:
        label, attention = connection_label(name, layers), connector.attention
        if isinstance(attention, CrossAttention):
            null = attention.null_key is not None
            self._setting(attention, "observe", partial(self._weights, (name, layers), null))
        else:
            self._setting(attention, "observe", partial(self._gate, label))

        def added(module: nn.Module, given: Any, output: Tensor) -> None:
            self._ratio(label, (output.float() - given[0].float()) * self.inner.scale, given[0])

        self._hook(connector, added)

    def _watch_words(self, label: str) -> None:
        before: list[Tensor] = []
        decoder = self.inner.backbone().decoder

        def after(module: nn.Module, given: Any, output: Any) -> None:
            plain = before.pop()
            self._ratio(label, last_state(output).float() - plain.float(), plain)

        self._hook(decoder, lambda module, given, output: before.append(last_state(output)), first=True)
        self._hook(decoder, after)

    def _watch_adapters(self, label: str, adapters: Adapters, targets: Iterable[str]) -> None:
        for target in targets:
            plain: list[Tensor] = []

            def before(module: nn.Module, given: Any, output: Tensor, plain: list[Tensor] = plain) -> None:
                plain.append(output)

            def added(module: nn.Module, given: Any, output: Tensor, plain: list[Tensor] = plain) -> None:
                if output.ndim == 3:  # experts take tokens alone
                    self._ratio(label, output.float() * self.inner.scale, plain.pop())

            self._hook(self.inner.backbone().decoder.get_submodule(target), before, first=True)
            self._hook(adapters.of(target), added)

    # What is found

    def _reading(self, name: str, read: Callable[..., Stream], reader: Any, inputs: Inputs, past: Past) -> Stream:
        stream = read(reader, inputs, past)
        frontier, length = past.frontier, inputs.ids.shape[1]
        if stream.visible is None:  # the anchor's own tokens, one beside each position
            everything = torch.ones(length, length, dtype=torch.bool)
            self._read[name] = _Read(inputs.ids[0].cpu(), everything[0], everything.tril())
            return stream
        assert frontier.owner is not None
        owner = frontier.owner[0]
        ids = inputs.ids[0] if frontier.tokens is None else frontier.tokens[0]
        stays = owner != NOBODY
        if frontier.chosen is not None:
            chosen = frontier.chosen[0]
            stays = torch.zeros_like(stays).index_fill(0, chosen[chosen >= 0].to(stays.device), True)
        self._read[name] = _Read(ids.cpu(), stays.cpu(), stream.visible[0, 0].cpu())
        return stream

    def _weights(
        self, key: tuple[str, tuple[int, int]], null: bool, weights: Tensor | None, seeing: Tensor | None
    ) -> None:
        assert weights is not None  # eager attention has some
        found = weights.detach().float()
        if seeing is not None:
            found = found.masked_fill(~seeing[:, None, :, None].to(found.device), 0)
        self._attention[key] = found[0].cpu(), null

    def _gate(self, label: str, gates: Tensor, where: Tensor | None) -> None:
        found = gates.detach().float()[..., 0]
        if where is not None:
            found = found.masked_fill(~where.to(found.device), 0)
        self._gates.setdefault(label, []).append(found.flatten().cpu() * self.inner.scale)

    def _ratio(self, label: str, added: Tensor, state: Tensor) -> None:
        parts = [part.detach()[0].float().square().sum(-1).cpu() for part in (added, state)]
        self._ratios.setdefault(label, []).append((parts[0], parts[1]))

    # What comes out

    def heard(self, texts: dict[str, TokenTexts]) -> dict[str, Heard]:
        """What the augmenting models had read, by name.

        Args:
            texts: shows their tokens.
        """
        found = {}
        for name, read in self._read.items():
            columns = self._columns(name)
            found[name] = Heard(texts[name](read.ids[columns].tolist()), read.stays[columns].tolist())
        return found

    def attention(self) -> list[Attended]:
        """Where connections looked, in the columns of ``heard``."""
        found = []
        for (name, layers), (weights, null) in self._attention.items():
            rows = weights[:, self.start - 1 :]
            nothing = rows[..., -1] if null else None
            found.append(Attended(name, layers, rows[..., self._columns(name)], nothing))
        return found

    def gates(self) -> dict[str, list[float]]:
        """How far gates were open, for each token of the answer."""
        return {label: self._answered(torch.cat(parts)).tolist() for label, parts in self._gates.items()}

    def contributions(self) -> dict[str, list[float]]:
        """Norms of what was added over norms of what it was added to, for each token of the answer."""
        found = {}
        for label, parts in self._ratios.items():
            added, state = (sum(part[side] for part in parts) for side in (0, 1))
            ratio = torch.where(state > 0, added / state, 0).sqrt()  # type: ignore[operator,arg-type]
            found[label] = self._answered(ratio).tolist()
        return found

    def _columns(self, name: str) -> Tensor:
        """The columns that some token of the answer could look at, (n,) int64."""
        return self._read[name].seen[self.start - 1 :].any(0).nonzero()[:, 0]

    def _answered(self, found: Tensor) -> Tensor:
        """The positions that predict the answer: of all, or of those that alone have logits."""
        length = len(next(iter(self._read.values())).seen)
        return found if len(found) == length - self.start + 1 else found[self.start - 1 :]
