"""Measures what the models of a composition make of some rows, alone and together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from calmlm.answering import TextModel
from calmlm.communication.ear import Ear
from calmlm.communication.excerpts import Excerpt, Row
from calmlm.communication.findings import Communication, Listening
from calmlm.communication.losses import nats_beside, nats_of
from calmlm.config import opening_of
from calmlm.controls import paired
from calmlm.data.context import context_length, own_contexts, prompt_length
from calmlm.data.labels import encode_examples
from calmlm.data.sources import load_examples
from calmlm.errors import CalmError, DataError
from calmlm.tokens.live_text import OwnStream, OwnWriter
from calmlm.tokens.lookup import find_tokenizer
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.spelling import token_bytes

__all__ = ["listen", "listen_to_file", "tokenizers_of"]

OTHERS = 32
AGREES = 0.005  # how far a model alone may be from what was heard of it where it reads the same

Rows = Sequence[dict[str, list[int]]]


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
    encoded = encode_examples(
        examples,
        text.tokenizer,
        max_length=context_length(text.model),
        prompt_length=prompt_length(text.model),
        own=own_contexts(text.model),
    )
    for row in encoded.rows:
        text.check_ids(row["input_ids"])
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
    texts = [text for row in rows if (text := Excerpt.of(row, pieces, tokenizer)) is not None]
    if not texts:
        raise DataError(
            "At least one row with a prompt and a completion is needed, but there is none: give 'prompt' and "
            "'completion', or 'messages'."
        )
    size = sum(text.size for text in texts)
    few = texts[: others or len(texts)]
    limits = context_length(model), own_contexts(model)
    following = [*few[1:], few[0]] if len(few) > 1 else []
    swapped = [text.behind(other, *limits) for text, other in zip(few, following, strict=False)]
    was_training = model.training
    model.eval()
    inner = model.model
    differs = inner.says_anything
    reading = [name for name, entry in model.config.augmenting.items() if entry["reads"] in ("tokens", "text")]
    ears = {name: Ear(model, name, len(texts)) for name in reading if inner.enabled and name in inner.active}
    try:
        with ExitStack() as stack:
            for ear in ears.values():
                stack.enter_context(ear)
            composition = nats_of(model, [text.row for text in texts], ears=ears.values())
        with model.disable_composition():
            anchor = nats_of(model, [text.row for text in texts]) if differs else composition
            other = nats_of(model, [text.row for text in swapped])
        changed = not math.isclose(sum(composition), sum(anchor), rel_tol=1e-6)
        beside_others = nats_beside(model, few, swapped) if changed else None
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


def _gain(right: Sequence[float], other: Sequence[float], texts: Sequence[Excerpt]) -> float | None:
    """How many bits per byte of the first completions the right prompts save; None where there are no others."""
    return _bits(sum(other) - sum(right[: len(other)]), sum(text.size for text in texts)) if other else None


def _pairing(
    right: Sequence[float], other: Sequence[float] | None, texts: Sequence[Excerpt]
) -> tuple[float | None, tuple[float, float, float] | None]:
    """Bits per byte of completions where augmenting models read other prompts, and what the right prompts save."""
    if not other:
        return None, None
    sizes = [text.size for text in texts]
    gains = [_bits(b - a, 1) for a, b in zip(right, other, strict=False)]
    return _bits(sum(other), sum(sizes)), paired(gains, sizes)


def _listen_to(
    model: Any,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase | None,
    texts: Sequence[Excerpt],
    swapped: Sequence[Excerpt],
    ear: Ear | None,
) -> Listening:
    entry, base = model.config.augmenting[name], model.augmenting[name]
    writer = _writer(model, name, tokenizer, theirs)
    if entry["reads"] == "text" and writer is None:
        return Listening(None, None, None, None)
    opening = opening_of(entry)
    own = [_own(text, writer, opening) for text in texts]
    alone = _alone(base, own, len(swapped), ear, len(opening))
    other = nats_of(base, [_own(text, writer, opening) for text in swapped], told=False)
    tokens = sum(len(ids) - len(opening) for ids, _ in own)
    return Listening(
        _bits(sum(alone), sum(text.size for text in texts)),
        None,
        _gain(alone, other, texts[: len(swapped)]),
        tokens / sum(text.whole for text in texts),
    )


def _alone(base: Any, own: Sequence[Row], count: int, ear: Ear | None, opening: int) -> list[float]:
    """The completions' negative log-probabilities by a model alone.

    The first rows are measured. Where they confirm what an ear heard of the same tokens, it is believed of the others.

    Args:
        base: the model.
        own: the rows in its tokens, behind ``opening`` tokens.
        count: how many to measure.
        ear: heard the model inside the composition, or None.
    """
    found = nats_of(base, own[:count], told=False)
    known = {} if ear is None else ear.known(own, opening)
    both = [index for index in range(count) if index in known]
    alone, heard = sum(found[index] for index in both), sum(known[index] for index in both)
    if not both or abs(alone - heard) > AGREES * alone:
        known = {}
    left = [index for index in range(count, len(own)) if index not in known]
    known |= zip(left, nats_of(base, [own[index] for index in left], told=False), strict=True)
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


def _own(text: Excerpt, writer: OwnWriter | None, opening: Sequence[int]) -> Row:
    """The text in a model's own tokens behind ``opening``."""
    if writer is None:
        return [*opening, *text.ids], len(opening) + text.start
    stream = OwnStream(writer)
    tokens = [
        token for place, index in enumerate(text.ids) for token in stream.read(index, place < text.start)
    ] + stream.pending()
    before = sum(owner < text.start for _, owner, _ in tokens)
    return [*opening, *(index for index, _, _ in tokens)], len(opening) + before
