"""What an augmenting model understands inside a composition, and whether it has anything to say.

Everything is measured in bits per byte of the completions, so that models with different tokens can be compared. What a
model gets out of a prompt is its *gain*: bits per byte behind another row's prompt, minus bits per byte behind the
right one. What arrives of it is the composition's *pairing gain*: the same where its augmenting models alone read
another row's prompt.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calmlm.answering import TextModel
from calmlm.bases.structure import accepts
from calmlm.config import opening_of
from calmlm.controls import beside, listening, paired
from calmlm.data.context import context_length
from calmlm.data.labels import IGNORE, encode_examples
from calmlm.data.padding import padded
from calmlm.data.sources import load_examples
from calmlm.errors import CalmError, DataError
from calmlm.readers import Inputs
from calmlm.state.hooks import Call, Stream
from calmlm.state.past import Past
from calmlm.tokens.live_text import OwnStream, OwnWriter
from calmlm.tokens.lookup import find_tokenizer
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.spelling import token_bytes

LOSS = 1.05  # a model that reads worse than this inside the composition is warned of
BATCH_TOKENS = 512
OTHERS = 32
AGREES = 0.005  # how far a model alone may be from what was heard of it where it reads the same
AT_ONCE = 16  # logits that become float32 at a time, which fit into a cache

Rows = Sequence[dict[str, list[int]]]
Row = tuple[list[int], int]
"""Tokens of one model, and where the completion begins among them."""


@dataclass(frozen=True)
class Listening:
    """What one augmenting model understands.

    Attributes:
        alone: bits per byte of the completions by the model alone, in its own tokens; None where its tokenizer is not
            known.
        inside: the same with what it reads inside the composition.
        gain: bits per byte that the right prompt saves the model, against another row's.
        tokens_per_byte: of its own tokens in prompts and completions.
    """

    alone: float | None
    inside: float | None
    gain: float | None
    tokens_per_byte: float | None

    @property
    def spoiled(self) -> bool:
        """Whether the model predicts worse inside the composition than alone, by more than 5 %."""
        return self.alone is not None and self.inside is not None and self.inside > LOSS * self.alone


@dataclass(frozen=True)
class Communication:
    """What there is to communicate, and what of it can arrive.

    Attributes:
        rows: how many were looked at.
        anchor: bits per byte of the completions by the anchor.
        composition: the same by the composition.
        anchor_gain: bits per byte that the right prompt saves the anchor, against another row's.
        anchor_tokens_per_byte: of the anchor's tokens in prompts and completions.
        augmenting: by name of the augmenting model.
        swapped: bits per byte by the composition where its augmenting models read another row's prompt, on the rows of
            the gains; None where no model reads the text, one cannot read it so, or the composition is as untrained.
        pairing_gain: bits per byte that the right prompt saves then, with the ends of its 95 % interval.
    """

    rows: int
    anchor: float
    composition: float
    anchor_gain: float | None
    anchor_tokens_per_byte: float
    augmenting: dict[str, Listening] = field(default_factory=dict)
    swapped: float | None = None
    pairing_gain: tuple[float, float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """One sentence for each thing that should be looked at."""
        found = []
        for name, heard in self.augmenting.items():
            if heard.spoiled:
                found.append(
                    f"The augmenting model {name!r} predicts these texts with {heard.inside:.3f} bits per byte inside "
                    f"the composition, but with {heard.alone:.3f} alone: it reads something else than its own tokens. "
                    f"Use alignment='own', and check its tokenizer and its beginning."
                )
            if heard.gain is not None and self.anchor_gain is not None and heard.gain <= self.anchor_gain:
                found.append(
                    f"There is nothing to communicate here: the augmenting model {name!r} gets {heard.gain:.3f} bits "
                    f"per byte out of these prompts, and the anchor {self.anchor_gain:.3f} by itself."
                )
        if self.pairing_gain is not None and self.pairing_gain[1] <= 0:
            found.append(
                f"Nothing is shown to be communicated: the right prompt saves the composition "
                f"{_interval(self.pairing_gain)} bits per byte against another row's in its augmenting models alone. "
                f"Look at more rows, or train on texts of which they know more than the anchor."
            )
        return found

    def lines(self) -> list[tuple[str, str]]:
        """Titles and values, for a terminal."""
        shown = [
            ("rows", str(self.rows)),
            ("anchor", _figures(self.anchor, self.anchor_gain, self.anchor_tokens_per_byte)),
            ("composition", f"{self.composition:.3f} bits per byte"),
        ]
        if self.swapped is not None and self.pairing_gain is not None:
            swapped = f"{self.swapped:.3f} bits per byte, {_interval(self.pairing_gain)} more"
            shown.append(("composition, another prompt read", swapped))
        for name, heard in self.augmenting.items():
            shown += [
                (f"{name}, alone", _figures(heard.alone, heard.gain, heard.tokens_per_byte)),
                (f"{name}, inside", _figures(heard.inside, None, None)),
            ]
        return shown


def _interval(figure: tuple[float, float, float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*figure)


def _figures(bits: float | None, gain: float | None, tokens: float | None) -> str:
    parts = ["not measured" if bits is None else f"{bits:.3f} bits per byte"]
    parts += [] if gain is None else [f"{gain:.3f} of them gained from the prompts"]
    parts += [] if tokens is None else [f"{tokens:.2f} tokens per byte"]
    return ", ".join(parts)


def listen_to_file(source: str, path: Path, rows: int, **options: Any) -> Communication:
    """Measure what the models of a saved composition make of the first rows of a file.

    Args:
        source: folder or id of the composition.
        path: a JSONL file of prompts and completions, or of messages.
        rows: how many at most.
        options: of ``calmlm.answering.TextModel.load``.

    Raises:
        CalmError: there is no such composition or file, or no row has a prompt and a completion.
    """
    examples = load_examples([str(path)])[:rows]
    text = TextModel.load(source, **options)
    encoded = encode_examples(examples, text.tokenizer, max_length=context_length(text.model))
    return listen(text.model, text.tokenizer, encoded.rows, augmenting_tokenizers=tokenizers_of(text.model))


def tokenizers_of(model: Any) -> dict[str, PreTrainedTokenizerBase | None]:
    """The tokenizers beside the augmenting models of a composition, by name; None where none is, or is needed."""
    return {
        name: find_tokenizer(base.name_or_path, local_files_only=True)
        if base.name_or_path and _own_writing(model, name) is None
        else None
        for name, base in model.augmenting.items()
    }


@torch.no_grad()
def listen(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    others: int | None = OTHERS,
    augmenting_tokenizers: dict[str, PreTrainedTokenizerBase | None] | None = None,
) -> Communication:
    """Measure what the models of a composition make of some rows.

    Args:
        model: a ``CalmForCausalLM``.
        tokenizer: the anchor's.
        rows: ``input_ids`` and ``labels``, as ``calmlm.data.encode_examples`` gives them.
        others: of how many rows the gain is measured; None for all.
        augmenting_tokenizers: by name, for models that have tokens of their own.

    Raises:
        DataError: when no row has a prompt and a completion.
    """
    pieces = token_bytes(tokenizer)
    texts = [text for row in rows if (text := _Text.of(row, pieces, tokenizer)) is not None]
    if not texts:
        raise DataError(
            "At least one row with a prompt and a completion is needed, but there is none: give 'prompt' and "
            "'completion', or 'messages'."
        )
    size = sum(text.size for text in texts)
    few = texts[: others or len(texts)]
    swapped = [text.behind(other) for text, other in zip(few, [*few[1:], few[0]], strict=True)] if len(few) > 1 else []
    was_training = model.training
    model.eval()
    inner = model.model
    differs = inner.says_anything
    reading = [name for name, entry in model.config.augmenting.items() if entry["reads"] in ("tokens", "text")]
    ears = {name: _Ear(model, name, len(texts)) for name in reading if inner.enabled and name in inner.active}
    try:
        with ExitStack() as stack:
            for ear in ears.values():
                stack.enter_context(ear)
            composition = _nats_of(model, [text.row for text in texts], ears=ears.values())
        with model.disable_composition():
            anchor = _nats_of(model, [text.row for text in texts]) if differs else composition
            other = _nats_of(model, [text.row for text in swapped])
        changed = not math.isclose(sum(composition), sum(anchor), rel_tol=1e-6)
        beside_others = _nats_beside(model, few, swapped) if changed else None
        heard = {
            name: _listen_to(
                model, name, tokenizer, (augmenting_tokenizers or {}).get(name), texts, swapped, ears.get(name)
            )
            for name in reading
        }
        for name, ear in ears.items():
            if not model.config.augmenting[name].get("view"):
                heard[name] = replace(heard[name], inside=_bits(sum(ear.nats), size))
    finally:
        model.train(was_training)
    tokens = sum(len(text.ids) for text in texts)
    return Communication(
        len(texts),
        _bits(sum(anchor), size),
        _bits(sum(composition), size),
        _gain(anchor, other, few),
        tokens / sum(text.whole for text in texts),
        heard,
        *_pairing(composition, beside_others, few),
    )


def _bits(nats: float, size: int) -> float:
    """Bits per byte."""
    return nats / size / math.log(2)


def _gain(right: Sequence[float], other: Sequence[float], texts: Sequence[_Text]) -> float | None:
    """How many bits per byte of the first completions the right prompts save; None where there are no others."""
    return _bits(sum(other) - sum(right[: len(other)]), sum(text.size for text in texts)) if other else None


def _pairing(
    right: Sequence[float], other: Sequence[float] | None, texts: Sequence[_Text]
) -> tuple[float | None, tuple[float, float, float] | None]:
    """Bits per byte of completions where augmenting models read other prompts, and what the right prompts save."""
    if not other:
        return None, None
    sizes = [text.size for text in texts]
    gains = [_bits(b - a, 1) for a, b in zip(right, other, strict=False)]
    return _bits(sum(other), sum(sizes)), paired(gains, sizes)


@dataclass(frozen=True)
class _Text:
    """One row: the anchor's tokens, where the completion begins, and the bytes of both."""

    ids: list[int]
    start: int
    size: int
    whole: int

    @classmethod
    def of(
        cls, row: dict[str, list[int]], pieces: list[bytes | None], tokenizer: PreTrainedTokenizerBase
    ) -> _Text | None:
        labels = row["labels"]
        start = next((place for place, label in enumerate(labels) if label != IGNORE), len(labels))
        ids = list(row["input_ids"])
        while len(ids) > start and ids[-1] in tokenizer.all_special_ids:  # the end of the text is no text
            ids.pop()
        stop = next((place for place in range(start, len(ids)) if labels[place] == IGNORE), len(ids))
        ids = ids[:stop]  # of a conversation the first answer
        size = sum(len(pieces[index] or b"") for index in ids[start:])
        if not size or not start:
            return None
        return cls(ids, start, size, sum(len(pieces[index] or b"") for index in ids))

    @property
    def row(self) -> Row:
        """The anchor's tokens, and where the completion begins."""
        return self.ids, self.start

    def behind(self, other: _Text) -> _Text:
        """This completion behind another row's prompt."""
        ids = [*other.ids[: other.start], *self.ids[self.start :]]
        return _Text(ids, other.start, self.size, self.whole)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of about one length, as many at a time as fit into ``BATCH_TOKENS``."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _nats_of(model: Any, rows: Sequence[Row], *, ears: Iterable[_Ear] = (), told: bool = True) -> list[float]:
    """The completions' negative log-probabilities by a model.

    Args:
        model: a composition, or a model alone.
        rows: ids of each, and where its completion begins.
        ears: hear what augmenting models make of them meanwhile.
        told: whether the model is told which tokens were given.
    """
    found = [0.0] * len(rows)
    for batch in _batches([len(ids) for ids, _ in rows]):
        chosen = [rows[index] for index in batch]
        for ear in ears:
            ear.rows = list(zip(batch, chosen, strict=True))
        ids = padded([ids for ids, _ in chosen], 0, model.device)
        mask = padded([[1] * len(ids) for ids, _ in chosen], 0, model.device)
        labels = padded([[IGNORE] * start + ids[start:] for ids, start in chosen], IGNORE, model.device)
        given = _keeping(model, min(start for _, start in chosen) - 1, ids)
        if told:
            given["prompt_mask"] = labels == IGNORE
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
        for index, nats in zip(batch, _nats(logits, labels), strict=True):
            found[index] = nats
    return found


def _nats_beside(model: Any, texts: Sequence[_Text], others: Sequence[_Text]) -> list[float] | None:
    """The completions' negative log-probabilities by a composition whose augmenting models read them behind others.

    None where no augmenting model reads the text, or one of the models cannot read rows that stand beside each other.
    """
    names, found = listening(model), [0.0] * len(others)
    if not names or not others:
        return None
    for batch in _batches([max(len(one.ids), len(two.ids)) for one, two in zip(texts, others, strict=True)]):
        chosen = [texts[index] for index in batch]
        given = beside(names, [text.ids for text in chosen], [others[index].ids for index in batch], 0, model.device)
        ids = given["input_ids"]
        new = [text.ids[text.start :] for text in chosen]
        labels = torch.tensor([[IGNORE] * (ids.shape[1] - len(part)) + part for part in new], device=ids.device)
        given |= _keeping(model, ids.shape[1] - max(map(len, new)) - 1, ids)
        try:
            logits = model(**given, prompt_mask=labels == IGNORE, use_cache=False).logits
        except CalmError:
            return None
        for index, nats in zip(batch, _nats(logits, labels), strict=True):
            found[index] = nats
    return found


def _nats(logits: Tensor, labels: Tensor) -> list[float]:
    """Each row's negative log-probability of its labels (B, T) by logits of the last columns (B, n, V)."""
    following = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    wanted = following != IGNORE
    losses = token_nats(logits[:, :-1][wanted], following[wanted])
    rows = wanted.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add(0, rows, losses).tolist()


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probabilities (n,) in float32 of targets (n,) by logits (n, V), a few at a time."""
    parts = zip(logits.split(AT_ONCE), targets.split(AT_ONCE), strict=True)
    found = [torch.nn.functional.cross_entropy(each.float(), wanted, reduction="none") for each, wanted in parts]
    return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.float32)


def _listen_to(
    model: Any,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase | None,
    texts: Sequence[_Text],
    swapped: Sequence[_Text],
    ear: _Ear | None,
) -> Listening:
    entry, base = model.config.augmenting[name], model.augmenting[name]
    writer = _writer(model, name, tokenizer, theirs)
    if entry["reads"] == "text" and writer is None:
        return Listening(None, None, None, None)
    opening = opening_of(entry)
    own = [_own(text, writer, opening) for text in texts]
    alone = _alone(base, own, len(swapped), ear, len(opening))
    other = _nats_of(base, [_own(text, writer, opening) for text in swapped], told=False)
    tokens = sum(len(ids) - len(opening) for ids, _ in own)
    return Listening(
        _bits(sum(alone), sum(text.size for text in texts)),
        None,
        _gain(alone, other, texts[: len(swapped)]),
        tokens / sum(text.whole for text in texts),
    )


def _alone(base: Any, own: Sequence[Row], count: int, ear: _Ear | None, opening: int) -> list[float]:
    """The completions' negative log-probabilities by a model alone.

    The first rows are measured. Where they confirm what an ear heard of the same tokens, it is believed of the others.

    Args:
        base: the model.
        own: the rows in its tokens, behind ``opening`` tokens.
        count: how many to measure.
        ear: heard the model inside the composition, or None.
    """
    found = _nats_of(base, own[:count], told=False)
    known = {} if ear is None else ear.known(own, opening)
    both = [index for index in range(count) if index in known]
    alone, heard = sum(found[index] for index in both), sum(known[index] for index in both)
    if not both or abs(alone - heard) > AGREES * alone:
        known = {}
    left = [index for index in range(count, len(own)) if index not in known]
    known |= zip(left, _nats_of(base, [own[index] for index in left], told=False), strict=True)
    return found + [known[index] for index in range(count, len(own))]


def _own_writing(model: Any, name: str) -> Rewriting | None:
    """What a model's texts in its own tokens are written by, where the composition knows it."""
    found = model.model.alignments.get(name)
    return found if isinstance(found, Rewriting) and found.method == "own" and found.view is None else None


def _writer(
    model: Any, name: str, tokenizer: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase | None
) -> OwnWriter | None:
    """What writes a text in the model's own tokens; None where it shares the anchor's, or its tokenizer is unknown."""
    if model.config.augmenting[name]["reads"] == "tokens":
        return None
    found = _own_writing(model, name)
    if found is not None:
        return OwnWriter(found)
    if theirs is None:
        return None
    try:
        return OwnWriter(Rewriting.between(tokenizer, theirs, "own", None))
    except CalmError:
        return None


def _own(text: _Text, writer: OwnWriter | None, opening: Sequence[int]) -> Row:
    """The text in a model's own tokens behind ``opening``."""
    if writer is None:
        return [*opening, *text.ids], len(opening) + text.start
    stream = OwnStream(writer)
    tokens = [
        token for place, index in enumerate(text.ids) for token in stream.read(index, place < text.start)
    ] + stream.pending()
    before = sum(owner < text.start for _, owner, _ in tokens)
    return [*opening, *(index for index, _, _ in tokens)], len(opening) + before


def _keeping(model: Any, first: int, ids: Tensor) -> dict[str, Tensor]:
    """What lets a model compute the logits of its columns from ``first`` on alone, where it can.

    A slice, which a number would give, is multiplied several times as slowly as a copy in bfloat16 on CPUs.
    """
    given = torch.arange(max(0, first), ids.shape[1], device=ids.device)
    return {"logits_to_keep": given} if accepts(model, "logits_to_keep") else {}


class _Ear:
    """Hears what an augmenting model makes of the completions in calls of a composition, with the model's own head.

    Args:
        model: the composition.
        name: of the augmenting model.
        count: how many rows there are.

    Attributes:
        rows: those of the next call, each with its place among all.
        nats: the completions' negative log-probabilities.
        tokens: what the model read of each row, and where the completion begins in it.
    """

    def __init__(self, model: Any, name: str, count: int) -> None:
        self.base, self.reader = model.augmenting[name], model.model.reader(name)
        self.rows: Sequence[tuple[int, Row]] = ()
        self.nats = [0.0] * count
        self.tokens: list[Row | None] = [None] * count

    def __enter__(self) -> _Ear:
        self.reader.read = self._read
        return self

    def __exit__(self, *_: Any) -> None:
        del self.reader.read  # the class's own again

    def known(self, own: Sequence[Row], opening: int) -> dict[int, float]:
        """What was heard of the rows of which the model has read these tokens, behind the first ``opening``."""
        return {
            index: self.nats[index]
            for index, (ids, start) in enumerate(own)
            if self.tokens[index] == (ids[opening:], start - opening)
        }

    def _read(self, inputs: Inputs, past: Past) -> Stream:
        reader = copy.copy(self.reader)
        del reader.read
        reader.run = partial(self._run, inputs.ids, past)
        return reader.read(inputs, past)

    def _run(self, ids: Tensor, past: Past, stream: Stream, **given: Any) -> None:
        rows, columns, wanted = [], [], []
        for row, (index, (own, start)) in enumerate(self.rows):
            tokens, owners, places = _stream(past.frontier, row, len(own), ids)
            self.tokens[index] = tokens, sum(owner < start for owner in owners)
            for place in range(1, len(tokens)):
                if owners[place] >= start:
                    rows.append(row)
                    columns.append(places[place - 1])
                    wanted.append(tokens[place])
        whole = self.reader.first.reads_distribution
        if not whole and accepts(self.base, "logits_to_keep"):
            needed = {column: index for index, column in enumerate(sorted(set(columns)))}
            given["logits_to_keep"] = torch.tensor(list(needed), device=ids.device)
            columns = [needed[column] for column in columns]
        self.reader.slot.call = Call({self.reader.name: stream})
        try:
            logits = self.base(**given).logits
        finally:
            self.reader.slot.call = None
        if whole:
            stream.hidden.update(dict.fromkeys(self.reader.layers, self.reader.said(logits)))
        losses = token_nats(logits[rows, columns], torch.tensor(wanted, device=logits.device)).tolist()
        for row, loss in zip(rows, losses, strict=True):
            self.nats[self.rows[row][0]] += loss


def _stream(frontier: Any, row: int, length: int, ids: Tensor) -> tuple[list[int], list[int], list[int]]:
    """The tokens of one row as its model has read them: their ids, their owners and the columns that they stand in."""
    if frontier.tokens is None:  # the anchor's own
        return ids[row, :length].tolist(), list(range(length)), list(range(length))
    if frontier.chosen is not None:
        columns = [column for column in frontier.chosen[row].tolist() if column >= 0]
    else:
        columns = (frontier.owner[row] >= 0).nonzero()[:, 0].tolist()
    offset = frontier.width - frontier.tokens.shape[1]
    return (
        frontier.tokens[row, columns].tolist(),
        frontier.owner[row, columns].tolist(),
        [column - offset for column in columns],
    )
