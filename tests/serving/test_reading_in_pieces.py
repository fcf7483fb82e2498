"""A long prompt is read in pieces, between which other texts go on; what is written behind it stays the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import calmlm
from calmlm.serving import engine as serving_engine
from calmlm.serving.batching import Batch, Text, try_out
from calmlm.serving.catalogue import Catalogue
from calmlm.serving.engine import DrainingError, Engine
from calmlm.serving.lanes import BaseLane, CompositionLane, Lane
from calmlm.serving.repetition import Lookup
from compositions import assert_close, own, tiny_composition
from served import catalogue, expected, running, wait
from state.test_recurrent import composition as recurrent_composition
from tiny import tiny_model, tiny_tokens
from tokenizers_tiny import tokenizer
from writings import Heard, other, writing

LONG = tiny_tokens(1, 43, seed=8)[0].tolist()
SHORT = LONG[:3]
SAID = "Zoë 🦊 said: one, two… the naïve fox 🦊 jumps over it"
CELLS = 8


KINDS: dict[str, Callable[[], Any]] = {
    "shared": lambda: tiny_composition("llama", "gpt2"),
    "windows": lambda: tiny_composition(
        "gemma3_text", "gemma3_text", anchor_options={"sliding_window": 5}, augmenting_options={"sliding_window": 3}
    ),
    "pointer, experts": lambda: tiny_composition("mixtral", "bloom", words="pointer"),
    "adapters": lambda: tiny_composition("opt", "gpt2", [(1, 4)], adapters=4),
    "own": lambda: other("own", "sentencepiece", augmenting_prefix="a story: "),
    "own, graft": lambda: tiny_composition(
        "llama", "mistral", connector="graft", init="aligned", plain_text=[SAID] * 40, **own("bytes", "bytes-large")
    ),
    "transcode": lambda: other("transcode", "characters"),
    "retokenize": lambda: other("retokenize", "unigram"),
    "recurrent": lambda: recurrent_composition("mamba2", "anchor"),
    "anchor alone": lambda: tiny_model("gemma3_text", sliding_window=4),
}  # fmt: skip
WHOLE: dict[str, Callable[[], Any]] = {
    "prompt alone": lambda: tiny_composition("gpt2", "mistral", refresh=False),
    "recurrent, which forgets": lambda: recurrent_composition("mamba", "anchor"),
}

ALL = KINDS | WHOLE
SLOW = ("own, graft", "retokenize", "adapters", "recurrent, which forgets")  # others are as sharp


def lane_of(model: Any) -> Lane:
    lane = CompositionLane(model, "x") if isinstance(model, calmlm.CalmForCausalLM) else BaseLane(model)
    try_out(lane)
    return lane


def read_sizes(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns each call reads from now on."""
    sizes, read = [], lane.read

    def noted(*given: Any) -> Any:
        sizes.append(given[0].shape[1])
        return read(*given)

    monkeypatch.setattr(lane, "read", noted)
    return sizes


@pytest.mark.filterwarnings("ignore:.*tokens that reach across:UserWarning")
@pytest.mark.parametrize("kind", [pytest.param(one, marks=[pytest.mark.slow] if one in SLOW else []) for one in ALL])
@torch.no_grad()
def test_pieces_are_read_as_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a text that was begun is read again: a part of it was given, and the rest written."""
    lane = lane_of(ALL[kind]())
    shared = kind not in ("own", "own, graft", "transcode", "retokenize")
    ids = LONG if shared else tokenizer("bytes-large")(SAID).input_ids
    for given, cells in ((len(ids), 3), (18, 9)):
        wanted, sizes = Batch.begin(lane, [Text(list(ids), given)]), read_sizes(lane, monkeypatch)
        batch = Batch(lane, [Text(list(ids), given), Text(list(ids), given)])
        while (logits := batch.read(cells)) is None:
            pass
        if kind in WHOLE:
            assert not lane.pieces and sizes == [len(ids)]
        else:
            assert max(sizes) == cells and sum(sizes) == len(ids)
        assert_close(logits, wanted[1].expand(2, -1), 1e-4)
        for text in (*batch.texts, *wanted[0].texts):
            text.ids.append(5)
        assert_close(batch.step(), wanted[0].step().expand(2, -1), 1e-4)


@pytest.fixture(scope="module")
def served() -> Catalogue:
    return catalogue()


@pytest.fixture
def pieces(served: Catalogue, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens, in order: reads of prompts by their shapes, drafts, and whatever tests put in."""
    monkeypatch.setattr(serving_engine, "PREFILL", CELLS)
    events: list[Any] = []
    for name in ("one", "two"):
        lane = served.models[name].lane

        def noted(*given: Any, read: Any = lane.read) -> Any:
            if given[4] is not None or given[0].shape[1] > 1:
                events.append(tuple(given[0].shape) if given[4] is not None else "draft")
            return read(*given)

        monkeypatch.setattr(lane, "read", noted)
    return events


def test_running_texts_go_on_between_pieces(
    served: Catalogue, pieces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal prompts are read once, with and without the composition beside each other; nothing is drafted then."""
    monkeypatch.setattr(Lookup, "propose", lambda _self, _ids, _room: [5])
    late = [Heard(served, name, LONG, 6) for name in ("one", "one", "anchor")]
    with writing(served, drafts=1) as engine:

        def then(count: int) -> None:
            pieces.append("token")
            if count == 3:
                engine.submit([heard.writing for heard in late])

        early = Heard(served, "one", SHORT, 40, ends=frozenset(), then=then)
        engine.submit([early.writing])
        found = [heard.tokens for heard in (early, *late)]
        wait(lambda: running(engine) == 0)
    reads = [place for place, event in enumerate(pieces) if event == (2, 4)]
    assert len(reads) == 10 and pieces[reads[-1] :].count((2, 3)) == 1
    assert all("token" in pieces[one:two] for one, two in pairwise(reads))
    assert "draft" in pieces[: reads[0]] and "draft" not in pieces[reads[0] : reads[-1]]
    model = served.models["one"].lane.model
    assert found[0] == expected(model, SHORT, 40, eos_token_id=None)
    assert found[1] == found[2] == expected(model, LONG, 6)
    assert found[3] == expected(model.anchor, LONG, 6) != found[1]


@pytest.mark.parametrize("what", ["cancel", "fail", "drain", "close"])
def test_what_ends_in_the_middle_of_a_prompt(
    served: Catalogue, pieces: list[Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = served.models["one"].lane
    early, late = Heard(served, "one", SHORT, 30, ends=frozenset()), Heard(served, "one", LONG, 5)
    read, inside, go = lane.read, threading.Event(), threading.Event()

    def interrupted(*given: Any) -> Any:
        if given[4] is not None and len(pieces) == 3:
            inside.set()
            assert go.wait(20)
            if what == "fail":
                raise RuntimeError("out of memory, say")
        return read(*given)

    monkeypatch.setattr(lane, "read", interrupted)
    with writing(served) as engine:
        engine.submit([early.writing, late.writing])
        assert inside.wait(20)
        acts: dict[str, Any] = {"cancel": lambda: engine.cancel([late.writing]), "drain": engine.drain}
        acts["close"] = threading.Thread(target=engine.close).start
        acts.get(what, lambda: None)()
        if what in ("drain", "close"):
            wait(lambda: refuses(engine))
        go.set()
        wait(engine.idle.is_set)
        assert running(engine) == 0
    assert len(pieces) == {"cancel": 4, "fail": 3, "drain": 7, "close": 4}[what]
    if what == "close":
        assert all(isinstance(heard.pieces[-1].error, DrainingError) for heard in (early, late))
        return
    assert early.tokens == expected(lane.model, SHORT, 30, eos_token_id=None)
    if what == "drain":
        assert late.tokens == expected(lane.model, LONG, 5)
    else:
        assert [type(piece.error) for piece in late.pieces] == ([RuntimeError] if what == "fail" else [])


def refuses(engine: Engine) -> bool:
    try:
        engine.submit([])
    except DrainingError:
        return True
    return False


def test_texts_of_different_compositions_advance_together(served: Catalogue) -> None:
    """Their batches take turns: one step each."""
    order: list[str] = []
    with writing(served) as engine:
        texts = [
            Heard(served, name, SHORT, 20, ends=frozenset(), then=lambda _count, name=name: order.append(name))
            for name in ("one", "two")
        ]
        engine.submit([heard.writing for heard in texts])
        for name, heard in zip(("one", "two"), texts, strict=True):
            assert heard.tokens == expected(served.models[name].lane.model, SHORT, 20, eos_token_id=None)
    both = order[order.index("two") : len(order) - order[::-1].index("one")]
    assert len(both) > 30 and all(one != other for one, other in pairwise(both))
