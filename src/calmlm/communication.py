"""What an augmenting model understands inside a composition, and whether it has anything to say.

Everything is measured in bits per byte of the completions, so that models with different tokens can be compared. What a
model gets out of a prompt is its *gain*: bits per byte behind another row's prompt, minus bits per byte behind the
right one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calmlm.answering import TextModel
from calmlm.config import opening_of
from calmlm.data.context import context_length
from calmlm.data.labels import IGNORE, encode_examples
from calmlm.data.sources import load_examples
from calmlm.errors import CalmError, DataError
from calmlm.readers import Inputs, given_of, prompt_of
from calmlm.state.past import Past
from calmlm.tokens.live_text import OwnStream, OwnWriter
from calmlm.tokens.lookup import find_tokenizer
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.spelling import token_bytes

LOSS = 1.05  # a model that reads worse than this inside the composition is warned of
BATCH_TOKENS = 1024

Rows = Sequence[dict[str, list[int]]]


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
    """

    rows: int
    anchor: float
    composition: float
    anchor_gain: float | None
    anchor_tokens_per_byte: float
    augmenting: dict[str, Listening] = field(default_factory=dict)

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
        return found

    def lines(self) -> list[tuple[str, str]]:
        """Titles and values, for a terminal."""
        shown = [
            ("rows", str(self.rows)),
            ("anchor", _figures(self.anchor, self.anchor_gain, self.anchor_tokens_per_byte)),
            ("composition", f"{self.composition:.3f} bits per byte"),
        ]
        for name, heard in self.augmenting.items():
            shown += [
                (f"{name}, alone", _figures(heard.alone, heard.gain, heard.tokens_per_byte)),
                (f"{name}, inside", _figures(heard.inside, None, None)),
            ]
        return shown


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
    """The tokenizers that lie beside the augmenting models of a composition, by name; None where there is none."""
    return {
        name: find_tokenizer(base.name_or_path, local_files_only=True) if base.name_or_path else None
        for name, base in model.augmenting.items()
    }


@torch.no_grad()
def listen(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    others: int | None = None,
    augmenting_tokenizers: dict[str, PreTrainedTokenizerBase | None] | None = None,
) -> Communication:
    """Measure what the models of a composition make of some rows.

    Args:
        model: a ``CalmForCausalLM``.
        tokenizer: the anchor's.
        rows: ``input_ids`` and ``labels``, as ``calmlm.data.encode_examples`` gives them.
        others: of how many rows the gain is measured; all by default.
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
    few_size = sum(text.size for text in few)
    was_training = model.training
    model.eval()
    try:
        composition = _bits(model, texts, size)
        with model.disable_composition():
            anchor = _bits(model, texts, size)
            right = anchor if len(few) == len(texts) else _bits(model, few, few_size)
            anchor_gain = _bits(model, swapped, few_size) - right if swapped else None
        heard = {
            name: _listen_to(model, name, tokenizer, (augmenting_tokenizers or {}).get(name), texts, few, swapped)
            for name, entry in model.config.augmenting.items()
            if entry["reads"] in ("tokens", "text")
        }
    finally:
        model.train(was_training)
    tokens = sum(len(text.ids) for text in texts)
    return Communication(
        len(texts), anchor, composition, anchor_gain, tokens / sum(text.whole for text in texts), heard
    )


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


def _padded(rows: Iterable[Sequence[int]], fill: int, device: Any) -> Tensor:
    rows = list(rows)
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def _bits(model: Any, texts: Sequence[_Text], size: int) -> float:
    """Bits per byte of the completions by the composition, or by the anchor where it is disabled."""
    total = 0.0
    for batch in _batches([len(text.ids) for text in texts]):
        chosen = [texts[index] for index in batch]
        ids = _padded([text.ids for text in chosen], 0, model.device)
        mask = _padded([[1] * len(text.ids) for text in chosen], 0, model.device)
        labels = _padded([[IGNORE] * text.start + text.ids[text.start :] for text in chosen], IGNORE, model.device)
        logits = model(input_ids=ids, attention_mask=mask, prompt_mask=labels == IGNORE, use_cache=False).logits
        total += _nats(logits[:, :-1], labels[:, 1:])
    return total / size / math.log(2)


def _nats(logits: Tensor, labels: Tensor) -> float:
    wanted = labels != IGNORE
    return float(torch.nn.functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum"))


def _listen_to(
    model: Any,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase | None,
    texts: Sequence[_Text],
    few: Sequence[_Text],
    swapped: Sequence[_Text],
) -> Listening:
    entry, base = model.config.augmenting[name], model.augmenting[name]
    size, few_size = sum(text.size for text in texts), sum(text.size for text in few)
    inside = None if entry.get("view") else _inside(model, name, texts, size)
    writer = _writer(model, name, tokenizer, theirs)
    if entry["reads"] == "text" and writer is None:
        return Listening(None, inside, None, None)
    opening = opening_of(entry)
    alone = _alone(base, [_own(text, writer, opening) for text in texts], size)
    right = alone if len(few) == len(texts) else _alone(base, [_own(text, writer, opening) for text in few], few_size)
    other = _alone(base, [_own(text, writer, opening) for text in swapped], few_size) if swapped else None
    tokens = sum(len(_own(text, writer, [])[0]) for text in texts)
    return Listening(
        alone, inside, None if other is None else other - right, tokens / sum(text.whole for text in texts)
    )


def _writer(
    model: Any, name: str, tokenizer: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase | None
) -> OwnWriter | None:
    """What writes a text in the model's own tokens; None where it shares the anchor's, or its tokenizer is unknown."""
    if model.config.augmenting[name]["reads"] == "tokens":
        return None
    found = model.model.alignments.get(name)
    if isinstance(found, Rewriting) and found.method == "own" and found.view is None:
        return OwnWriter(found)
    if theirs is None:
        return None
    try:
        return OwnWriter(Rewriting.between(tokenizer, theirs, "own", None))
    except CalmError:
        return None


def _own(text: _Text, writer: OwnWriter | None, opening: Sequence[int]) -> tuple[list[int], int]:
    """The text in a model's own tokens behind ``opening``, and how many of them stand before the completion."""
    if writer is None:
        return [*opening, *text.ids], len(opening) + text.start
    stream = OwnStream(writer)
    tokens = [
        token for place, index in enumerate(text.ids) for token in stream.read(index, place < text.start)
    ] + stream.pending()
    before = sum(owner < text.start for _, owner, _ in tokens)
    return [*opening, *(index for index, _, _ in tokens)], len(opening) + before


def _alone(base: Any, rows: Sequence[tuple[list[int], int]], size: int) -> float:
    """Bits per byte of the completions by a model alone."""
    total = 0.0
    for batch in _batches([len(ids) for ids, _ in rows]):
        chosen = [rows[index] for index in batch]
        ids = _padded([ids for ids, _ in chosen], 0, base.device)
        mask = _padded([[1] * len(ids) for ids, _ in chosen], 0, base.device)
        labels = _padded([[IGNORE] * start + ids[start:] for ids, start in chosen], IGNORE, base.device)
        total += _nats(base(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], labels[:, 1:])
    return total / size / math.log(2)


def _inside(model: Any, name: str, texts: Sequence[_Text], size: int) -> float:
    """Bits per byte of the completions by an augmenting model, from what it reads in calls of the composition."""
    total = 0.0
    reader, heard = copy.copy(model.model.reader(name)), []

    def run(stream: Any, **arguments: Any) -> None:
        """What the reader calls, with the model's own head."""
        heard.append(model.augmenting[name](**arguments).logits)

    reader.run = run
    for batch in _batches([len(text.ids) for text in texts]):
        chosen = [texts[index] for index in batch]
        ids = _padded([text.ids for text in chosen], 0, model.device)
        mask = _padded([[1] * len(text.ids) for text in chosen], 0, model.device)
        labels = _padded([[IGNORE] * text.start + text.ids[text.start :] for text in chosen], IGNORE, model.device)
        past = Past()
        heard.clear()
        told = given_of(labels, None)
        reader.read(Inputs(ids, mask, None, prompt_of(labels), None, None, told), past)
        (logits,) = heard
        frontier = past.frontier
        for row, text in enumerate(chosen):
            tokens, owners, columns = _stream(frontier, row, len(text.ids), ids)
            for place in range(1, len(tokens)):
                if owners[place] >= text.start:
                    scores = logits[row, columns[place - 1]].float().log_softmax(-1)
                    total -= float(scores[tokens[place]])
    return total / size / math.log(2)


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
