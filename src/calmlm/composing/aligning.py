"""Connections that start from what plain text teaches about both models' states, and the layers to put them on.

Both models read the same plain text. Where one of the augmenting model's tokens ends, its state x and the anchor's
state y stand for the same text. The map between them is a ridge regression, without any labels:

    W = argmin sum |W (x - m) / s + mean(y) - y|^2 + RIDGE n |W|^2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calmlm.bases.families import Backbone
from calmlm.bases.structure import state_of
from calmlm.causal_lm import CalmForCausalLM
from calmlm.config import ALIGNED, CalmConfig, ConnectorConfig, Pairs, ordered
from calmlm.connectors.cross_attention import CrossAttention
from calmlm.connectors.flamingo import Flamingo
from calmlm.connectors.gate import OPENING
from calmlm.connectors.graft import Graft
from calmlm.data.context import context_length, own_contexts
from calmlm.data.formats import read_examples
from calmlm.data.jsonl import Record
from calmlm.data.labels import IGNORE, encode_examples
from calmlm.data.padding import padded
from calmlm.errors import ConfigError
from calmlm.modeling import CalmModel
from calmlm.readers import Inputs
from calmlm.state.beside import states_beside
from calmlm.state.past import Past
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.retokenization import Rewriting

RIDGE = 0.03
LONGEST = 256  # tokens of a text that are read
FEWEST = 64  # positions that a map is fitted on
AT_ONCE = 8
DEPTHS = (0.22, 0.39, 0.56, 0.72), (0.2, 0.33, 0.47)
"""How deep, in both models, connections are tried; the middle of both does best."""


class _Moments:
    """Sums over positions from which a regression of y (n, D_B) on x (n, D_A) follows, float64."""

    def __init__(self) -> None:
        self.count, self.x, self.y, self.xx, self.xy, self.yy = 0, *[torch.zeros(()).double()] * 5

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.double().cpu(), y.double().cpu()
        self.count += len(x)
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.xx, self.xy, self.yy = self.xx + x.T @ x, self.xy + x.T @ y, self.yy + y.square().sum(0)

    def solve(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight (D_B, D_A) on standardised x, the mean of y, and the mean and deviation of x."""
        mean, target = self.x / self.count, self.y / self.count
        gram = self.xx - self.count * torch.outer(mean, mean)
        deviation = (gram.diagonal() / self.count).clamp(min=1e-12).sqrt()
        gram = gram / torch.outer(deviation, deviation)
        gram.diagonal().add_(RIDGE * self.count)
        both = (self.xy - self.count * torch.outer(mean, target)) / deviation[:, None]
        return torch.linalg.solve(gram, both).T.contiguous(), target, mean, deviation


@torch.no_grad()
def start_aligned(
    composition: CalmForCausalLM, name: str, tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str] | None
) -> None:
    """Let the connections of one augmenting model start from maps that plain text teaches.

    Args:
        composition: an untrained one.
        name: of the augmenting model.
        tokenizer: the anchor's.
        texts: plain texts, a few hundred sentences.

    Raises:
        ConfigError: for connectors that no map fits, or too little text.
    """
    if tokenizer is None or not texts:
        missing = "plain_text" if not texts else "tokenizer"
        raise ConfigError(
            f"Maps of states need plain text and the anchor's tokenizer, but there is none: pass {missing}."
        )
    model = composition.model
    if model.config.augmenting[name].get("view"):
        raise ConfigError(
            "init='aligned' needs augmenting models that read plain text, but augmenting_view shows them conversations "
            "alone: leave one of them out."
        )
    pairs = [tuple(pair) for pair in model.config.augmenting[name]["connections"]]
    connectors: Any = list(model.connectors[name])[: len(pairs)]  # type: ignore[call-overload]
    moments = [_Moments() for _ in pairs]
    for inputs in _batches(composition, tokenizer, texts):
        stream = model.reader(name).read(inputs, Past())
        with _recorded(model, sorted({j for _, j in pairs})) as states:
            model.run(model.backbone().decoder, inputs, None, None, False, {})
        for (i, j), connector, found in zip(pairs, connectors, moments, strict=True):
            beside = states_beside(stream, i, 0, states[j].device)
            if beside is None:
                continue
            where = inputs.mask.bool().to(states[j].device)
            for part in (beside.seen, beside.ends):
                where = where if part is None else where & part
            found.add(_features(connector, beside.states[where]), states[j][where])
    for connector, found in zip(connectors, moments, strict=True):
        if found.count < FEWEST:
            raise ConfigError(
                f"plain_text must hold at least {FEWEST} tokens at whose end both models stand, but got {found.count}: "
                f"give a few hundred sentences."
            )
        weight, bias, mean, deviation = found.solve()
        if isinstance(connector, Graft):
            connector.align(weight, bias, mean, deviation)
        else:
            connector.attention.align(weight / deviation, float((found.yy.mean() / found.count).sqrt()))


def check_alignable(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a connector that starts aligned.

    Raises:
        ConfigError: for a kind or options that no map fits.
    """
    if kind not in ("graft", "cross_attention", "flamingo") or options.get("rank") is not None:
        got = repr(kind) if options.get("rank") is None else f"rank={options['rank']}"
        raise ConfigError(
            f"init='aligned' needs connectors 'graft', 'cross_attention' or 'flamingo' with full projections, but got "
            f"{got}: use one of these, or leave init out."
        )
    # What starts from a map is not zero in itself, so a gate has to be.
    return options if kind == "graft" else {**options, "gate": True}


def aligned_count(connections: str) -> int:
    """How many connections ``"aligned-2"`` asks for.

    Raises:
        ConfigError: for no number behind it.
    """
    number = connections.removeprefix(ALIGNED)
    if not number.isdecimal() or not int(number):
        raise ConfigError(
            f"connections='aligned-' must end with how many there shall be, but got {connections!r}: write for example "
            f"'aligned-2'."
        )
    return int(number)


def middle(augmenting_layers: int, anchor_layers: int, count: int) -> Pairs:
    """Connections in the middle of both models, where nothing tells which do best."""
    depths = [(0.39, 0.33), (0.56, 0.47), (0.22, 0.2), (0.72, 0.6)]
    found = [(_layer(i, augmenting_layers), _layer(j, anchor_layers)) for i, j in depths]
    return _distinct(found, count)


def candidates(augmenting_layers: int, anchor_layers: int) -> Pairs:
    """The connections that ``choose`` tries."""
    found = [(_layer(i, augmenting_layers), _layer(j, anchor_layers)) for i in DEPTHS[0] for j in DEPTHS[1]]
    return ordered(dict.fromkeys(found))


def _layer(depth: float, layers: int) -> int:
    return max(0, round(depth * layers) - 1)


def _distinct(pairs: Sequence[tuple[int, int]], count: int) -> Pairs:
    unique = list(dict.fromkeys(pairs))
    if count > len(unique):
        raise ConfigError(
            f"There are {len(unique)} connections that can start aligned in these models, but {count} were asked for: "
            f"ask for fewer, or give pairs."
        )
    return ordered(unique[:count])


def search(
    config: CalmConfig,
    anchor: PreTrainedModel,
    name: str,
    model: PreTrainedModel,
    alignment: Alignment | Rewriting | None,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | None,
    examples: Sequence[Mapping[str, Any]],
    count: int,
) -> tuple[Pairs, dict[str, float]]:
    """Look for the connections of one augmenting model that communicate most before anything is trained.

    Args:
        config: of the composition.
        anchor, model: the two models.
        name: of the augmenting model.
        alignment: of their tokenizers, where they differ.
        tokenizer: the anchor's.
        texts: plain texts that the maps are fitted on.
        examples: of the development set, with prompts and completions.
        count: how many to find.

    Returns:
        see ``choose``.
    """
    entry = {key: value for key, value in config.augmenting[name].items() if key not in ("words", "adapters")}
    above, below = Backbone.of(anchor, "anchor", config.anchor.get("layers_path")), entry.get("layers_path")
    layers = len(Backbone.of(model, "augmenting model", below).layers), len(above.layers)
    entry["connections"] = [list(pair) for pair in candidates(*layers)]
    entry["connector"] = vars(ConnectorConfig(1, kind="graft"))
    trial = CalmForCausalLM(
        CalmConfig(text_config=config.text_config, anchor=config.anchor, augmenting={name: entry}),
        anchor,
        {name: model},
        {} if alignment is None else {name: alignment},
    )
    try:
        trial.eval()
        start_aligned(trial, name, tokenizer, texts)
        records = [Record(dict(fields), f"development[{index}]") for index, fields in enumerate(examples)]
        rows = encode_examples(read_examples(records), tokenizer, max_length=context_length(trial)).rows
        return choose(trial, name, rows, count)
    finally:
        trial.model.remove(name)


@torch.no_grad()
def choose(model: Any, name: str, rows: Sequence[dict[str, list[int]]], count: int) -> tuple[Pairs, dict[str, float]]:
    """The grafts with which a composition predicts some completions best before it is trained; one after the other.

    Args:
        model: a ``CalmForCausalLM`` with a graft for each candidate, aligned and shut.
        name: of the augmenting model.
        rows: ``input_ids`` and ``labels``, of a development set.
        count: how many to choose.

    Returns:
        the pairs, and for each set of them that was tried the mean loss (nats per token), ``""`` for the anchor alone.
    """
    entry = model.config.augmenting[name]
    pairs: list[tuple[int, int]] = [(i, j) for i, j in entry["connections"]]
    grafts: list[Graft] = list(model.model.connectors[name])[: len(pairs)]
    if not any(label != IGNORE for row in rows for label in row["labels"][1:]):
        raise ConfigError(
            "development must hold examples with completions, but there is nothing to predict in it: give a few dozen."
        )
    tried = {"": _loss(model, rows)}
    chosen: list[int] = []
    for _ in range(count):
        losses = {}
        for index in set(range(len(pairs))) - set(chosen):
            with ExitStack() as stack:
                for place in (*chosen, index):
                    stack.enter_context(_opened(grafts[place]))
                losses[index] = _loss(model, rows)
            tried[" ".join(f"{i}-{j}" for i, j in sorted(pairs[place] for place in (*chosen, index)))] = losses[index]
        chosen.append(min(losses, key=lambda index: (losses[index], index)))
    return ordered(pairs[index] for index in chosen), tried


@contextmanager
def _opened(graft: Graft) -> Iterator[None]:
    graft.opening.fill_(1 / OPENING)
    try:
        yield
    finally:
        graft.opening.zero_()


def _loss(model: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    """Nats per labelled token."""
    total, count = 0.0, 0
    order = sorted(rows, key=lambda row: len(row["input_ids"]))
    at_once = _at_once(model)
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        ids = padded([row["input_ids"] for row in batch], 0, model.device)
        mask = padded([[1] * len(row["input_ids"]) for row in batch], 0, model.device)
        labels = padded([row["labels"] for row in batch], IGNORE, model.device)
        labelled = int((labels[:, 1:] != IGNORE).sum())
        total += labelled * float(model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss)
        count += labelled
    return total / max(1, count)


def _batches(
    composition: CalmForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Iterator[Inputs]:
    """The texts as given tokens, as far as all models can read, padded on the right, those of one length together."""
    longest = min(LONGEST, context_length(composition) or LONGEST)
    rows = [list(tokenizer(text, verbose=False)["input_ids"][:longest]) for text in texts]
    for context in own_contexts(composition):
        rows = [row[: context.readable(row)] for row in rows]
    rows.sort(key=len)
    device = composition.device
    rows = [row for row in rows if row]
    at_once = _at_once(composition)
    for start in range(0, len(rows), at_once):
        batch = rows[start : start + at_once]
        ids = padded(batch, 0, device)
        mask = padded([[1] * len(row) for row in batch], 0, device)
        yield Inputs(ids, mask, None, mask.bool(), None)


def _at_once(composition: CalmForCausalLM) -> int:
    """How many texts are read together: one where a model would count what fills up rows of tokens of its own."""
    names = [name for name, entry in composition.config.augmenting.items() if entry["reads"] == "text"]
    return AT_ONCE if all(composition.model.backbone(name).skips_gaps for name in names) else 1


@contextmanager
def _recorded(model: CalmModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """The anchor's own states behind these layers, in what it runs within this."""
    states: dict[int, Tensor] = {}
    enabled, model.enabled = model.enabled, False
    handles = [
        model.backbone()
        .layers[j]
        .register_forward_hook(lambda _, __, output, j=j: states.__setitem__(j, state_of(output)))
        for j in layers
    ]
    try:
        yield states
    finally:
        model.enabled = enabled
        for handle in handles:
            handle.remove()


def _features(connector: Any, states: Tensor) -> Tensor:
    """What a connector's map takes: the states, or what its norm makes of them."""
    if isinstance(connector, (CrossAttention, Flamingo)):
        return connector.attention.augmenting_norm(states.to(connector.attention.dtype))
    return states
