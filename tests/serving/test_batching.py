"""Texts that are written together are what each is alone: joined and left, padded, in every kind of composition."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import calmlm
from calmlm.serving.batching import Batch, Text, try_out
from calmlm.serving.lanes import BaseLane, CompositionLane, Lane
from calmlm.state import concatenation
from compositions import awaken, own, tiny_composition
from served import expected
from state.test_recurrent import composition as recurrent_composition
from state.test_recurrent import recurrent
from tiny import tiny_model, tiny_tokens
from tokenizers_tiny import AWKWARD, tokenizer
from tokens.test_views import chatty, rendered

NEW = 8


@torch.no_grad()
def write(
    lane: Lane, prompts: list[list[int]], count: int, arrivals: list[int], composed: list[bool]
) -> list[list[int]]:
    """What each prompt is gone on with, where each comes at its own step and leaves when it ends."""
    texts = [Text(list(ids), len(ids), said) for ids, said in zip(prompts, composed, strict=True)]
    ends = lane.model.generation_config.eos_token_id
    batch: Batch | None = None
    for step in range(max(arrivals) + count + 1):
        if batch is not None and batch.texts:
            add(batch, batch.step(), count, ends)
        arrived = [text for text, at in zip(texts, arrivals, strict=True) if at == step]
        if arrived:
            new, logits = Batch.begin(lane, arrived)
            add(new, logits, count, ends)
            if batch is not None and batch.texts and new.texts:
                batch.join(new)
            elif new.texts:
                batch = new
    return [text.ids[text.given :] for text in texts]


def add(batch: Batch, logits: torch.Tensor, count: int, end: int | None) -> None:
    for text, row in zip(batch.texts, logits, strict=True):
        text.ids.append(int(row.argmax()))
    going = [i for i, t in enumerate(batch.texts) if len(t.ids) - t.given < count and t.ids[-1] != end]
    if len(going) < len(batch.texts):
        batch.keep(going)
        assert batch.columns == max((len(text.ids) - 1 for text in batch.texts), default=batch.columns)


def prompts_for(words: Any, seed: int) -> list[list[int]]:
    """Prompts of very different lengths."""
    if words is None:
        return [tiny_tokens(1, length, seed=seed + length)[0].tolist() for length in (4, 15, 1, 9, 2)]
    return [words(text).input_ids for text in (AWKWARD[4], "h", AWKWARD[2], AWKWARD[1])]


SLOW = ("recurrent small model", "own, bytes", "transcode, characters", "words")  # others are as sharp
CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "shared": (lambda: tiny_composition("llama", "gpt2"), None),
    "windows": (
        lambda: tiny_composition(
            "gemma3_text", "gemma3_text", anchor_options={"sliding_window": 5}, augmenting_options={"sliding_window": 3}
        ),
        None,
    ),
    "experts and a pointer": (lambda: tiny_composition("mixtral", "bloom", words="pointer"), None),
    "prompt alone": (lambda: tiny_composition("gpt2", "mistral", refresh=False), None),
    "recurrent anchor": (lambda: recurrent_composition("mamba2", "anchor"), None),
    "recurrent small model": (lambda: recurrent_composition("mamba", "augmenting"), None),
    **{
        f"{alignment}, {kind}": (
            lambda kind=kind, alignment=alignment: tiny_composition(
                "llama", "mistral", alignment=alignment, rotary=True, **own(kind, "bytes-large")
            ),
            "bytes-large",
        )
        for kind, alignment in (
            ("sentencepiece", "own"),
            ("bytes", "own"),
            ("characters", "transcode"),
            ("unigram", "retokenize"),
        )
    },
    "prefix": (
        lambda: tiny_composition(
            "llama", "gpt2", alignment="own", augmenting_prefix="a story: ", **own("bytes", "bytes-large")
        ),
        "bytes-large",
    ),
    "words": (
        lambda: tiny_composition("llama", "gpt2", alignment="own", words="map", **own("wordpiece", "bytes-large")),
        "bytes-large",
    ),
}


@pytest.mark.filterwarnings("ignore:.*tokens that reach across:UserWarning")
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_a_text_is_the_same_alone_and_among_others(case: str) -> None:
    make, kind = CASES[case]
    model = make()
    lane = CompositionLane(model, case)
    try_out(lane)
    assert lane.joins and lane.pads
    prompts = prompts_for(kind and tokenizer(kind), 3)
    chance = random.Random(case)
    wanted = [expected(model, ids, NEW) for ids in prompts]
    assert len({tuple(one) for one in wanted}) > 2
    arrivals = [chance.randrange(NEW) for _ in prompts]
    assert write(lane, prompts, NEW, arrivals, [True] * len(prompts)) == wanted


def test_rows_of_which_the_small_model_sees_nothing() -> None:
    """Through a view it reads the content of messages alone; its cache holds nothing of other rows."""
    ours, theirs = chatty("bytes", "chatml"), chatty("sentencepiece", "headers")
    small = tiny_model("mistral", seed=2, vocab_size=len(theirs), sliding_window=6)
    model = calmlm.compose(
        tiny_model("llama", vocab_size=len(ours)), small, 2, rotary=True, tokenizer=ours, augmenting_tokenizer=theirs,
        alignment="own", augmenting_view="bare",
    )  # fmt: skip
    lane = CompositionLane(awaken(model), "view")
    try_out(lane)
    prompts = [
        rendered(ours, [{"role": "user", "content": "the fox"}], add_generation_prompt=True),
        ours("a b").input_ids,
    ]
    assert lane.shows(prompts[0]) is None and lane.shows(prompts[1]) == "augmenting"
    wanted = [expected(model, ids, NEW) for ids in prompts]
    for arrivals in ([0, 2], [2, 0], [0, 0]):
        assert write(lane, prompts, NEW, arrivals, [True, True]) == wanted


def test_rows_without_the_composition_are_the_anchors() -> None:
    model = tiny_composition("llama", "gpt2")
    lane = CompositionLane(model, "shared")
    try_out(lane)
    prompts = prompts_for(None, 5)
    composed = [place % 2 == 0 for place in range(len(prompts))]
    wanted = [expected(model if c else model.anchor, ids, NEW) for c, ids in zip(composed, prompts, strict=True)]
    assert wanted[1] != expected(model, prompts[1], NEW)
    assert write(lane, prompts, NEW, [0, 3, 1, 3, 6], composed) == wanted


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "gemma3_text", "mamba2"])
def test_a_base_model_alone(family: str) -> None:
    window = {"sliding_window": 4} if family == "gemma3_text" else {}
    model = recurrent(family) if family == "mamba2" else tiny_model(family, **window)
    lane = BaseLane(model)
    try_out(lane)
    prompts = prompts_for(None, 7)
    wanted = [expected(model, ids, NEW) for ids in prompts]
    assert lane.joins and lane.pads
    assert write(lane, prompts, NEW, [0, 2, 2, 5, 1], [True] * 5) == wanted


def test_equal_prompts_are_read_once() -> None:
    lane = CompositionLane(tiny_composition("llama", "gpt2"), "shared")
    ids = tiny_tokens(1, 6)[0].tolist()
    read = []
    forward = lane.read
    lane.read = lambda *given: read.append(given[0].shape) or forward(*given)  # type: ignore[method-assign]
    with torch.no_grad():
        batch, logits = Batch.begin(lane, [Text(list(ids), 6), Text(list(ids), 6), Text(ids[:3], 3)])
    assert read == [(2, 6)]
    assert torch.equal(logits[0], logits[1])
    assert len(batch.texts) == 3


def test_what_is_joined_wrongly_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a cache is put together in another order, texts are decoded one by one rather than wrongly."""
    lane = CompositionLane(tiny_composition("llama", "gpt2"), "shared")
    padded = concatenation._padded
    monkeypatch.setattr(
        concatenation, "_padded", lambda states, width, opening: padded(states, width, opening).roll(1, 2)
    )
    try_out(lane)
    assert not lane.joins


def test_longrope_begins_anew_beyond_its_length() -> None:
    turned = {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [4.0] * 5, "factor": 4.0,
              "rope_theta": 10000.0, "original_max_position_embeddings": 12}  # fmt: skip
    model = tiny_composition(
        "phi3", "gpt2", anchor_options={"rope_parameters": turned, "original_max_position_embeddings": 12}
    )
    lane = CompositionLane(model, "longrope")
    assert lane.turns_at == [12]
    try_out(lane)
    assert not lane.joins
    ids = tiny_tokens(1, 7)[0].tolist()
    assert write(lane, [ids], NEW, [0], [True])[0] == expected(model, ids, NEW)


def test_a_model_without_a_cache_reads_everything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model: calmlm.CalmForCausalLM = tiny_composition("llama", "gpt2")
    ids = tiny_tokens(1, 5)[0].tolist()
    wanted = expected(model, ids, NEW)
    monkeypatch.setattr(type(model.model), "can_cache", property(lambda self: False))
    lane = CompositionLane(model, "without")
    try_out(lane)
    assert not lane.joins
    assert write(lane, [ids], NEW, [0], [True])[0] == wanted
