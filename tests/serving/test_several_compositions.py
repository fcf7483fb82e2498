"""Texts of several compositions around one anchor, and of the anchor, stand in one batch: each is what it is alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import calmlm
from calmlm.serving import engine as engine_module
from calmlm.serving.batching import try_out
from calmlm.serving.catalogue import Catalogue
from calmlm.serving.engine import Engine
from calmlm.serving.lanes import CompositionLane
from calmlm.serving.protocol import CompletionRequest
from calmlm.serving.requests import make_job
from calmlm.serving.union import united
from compositions import awaken, own, tiny_composition
from served import expected, serving, wait
from serving.test_batching import NEW, prompts_for, write
from tiny import MAX_POSITIONS, tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer

Made = dict[str, calmlm.CalmForCausalLM]


def around(first: calmlm.CalmForCausalLM, family: str, *, seed: int = 5, **options: Any) -> Made:
    """A composition, and another one around its anchor."""
    augmenting = options.pop("augmenting_options", {})
    second = calmlm.compose(first.anchor, tiny_model(family, seed=4, **augmenting), **options)
    return {"a.first": first, "b": awaken(second, seed=seed)}


def others(kind: str) -> dict[str, Any]:
    """Options of ``around`` for a model with this tokenizer."""
    found = own(kind, "bytes-large")
    del found["anchor_options"]
    return found


CASES: dict[str, tuple[Callable[[], Made], str | None]] = {
    "shared ids": (lambda: around(tiny_composition("llama", "gpt2"), "mistral", connections=2), None),
    "words and adapters": (
        lambda: around(
            tiny_composition("llama", "gpt2", words="pointer", connections="none"),
            "mistral", connections=1, adapters={"r": 4},
        ),
        None,
    ),
    "own tokens and others": (
        lambda: around(
            tiny_composition("llama", "mistral", words="map", **own("sentencepiece", "bytes-large")),
            "gpt2", connections=2, connector="flamingo", **others("bytes"),
        ),
        "bytes-large",
    ),
    "own tokens and shared ids": (
        lambda: around(
            tiny_composition("llama", "mistral", augmenting_prefix="a story: ", **own("bytes", "bytes-large")),
            "gpt2", connections=2, augmenting_options={"vocab_size": len(tokenizer("bytes-large"))},
        ),
        "bytes-large",
    ),
    "the prompt alone": (
        lambda: around(tiny_composition("gpt2", "mistral", refresh=False), "llama", connections=2), None,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*tokens that reach across:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_each_row_is_its_own_composition(case: str) -> None:
    make, kind = CASES[case]
    compositions = make()
    whole, rows = united(compositions)
    lane = CompositionLane(whole, case, several=True)
    try_out(lane)
    assert lane.joins and lane.pads
    prompts = prompts_for(kind and tokenizer(kind), 3)
    models = [*compositions.values(), next(iter(compositions.values())).anchor]
    speaking = [*rows.values(), (False,) * len(whole.augmenting)]
    chosen = [place % 3 for place in range(len(prompts))]
    wanted = [expected(models[c], ids, NEW) for c, ids in zip(chosen, prompts, strict=True)]
    assert wanted[1] != expected(models[0], prompts[1], NEW)
    arrivals = [0, 3, 1, 3, 6][: len(prompts)]
    assert write(lane, prompts, NEW, arrivals, [speaking[c] for c in chosen]) == wanted  # type: ignore[misc]


def test_it_holds_no_weights_of_its_own() -> None:
    compositions = CASES["words and adapters"][0]()
    before = [expected(model, [5, 6, 7], 6) for model in compositions.values()]
    whole, _ = united(compositions)
    theirs = {p.data_ptr() for model in compositions.values() for p in model.parameters()}
    assert {p.data_ptr() for p in whole.parameters()} <= theirs
    assert [expected(model, [5, 6, 7], 6) for model in compositions.values()] == before


@pytest.mark.filterwarnings("ignore:.*tokens that reach across:UserWarning")
def test_it_writes_texts_with_their_tables() -> None:
    """Tables between two tokenizers are larger than all that is trained."""
    compositions = CASES["own tokens and others"][0]()
    whole, _ = united(compositions)
    theirs = [writer for model in compositions.values() for writer in model.model.transcoders.values()]
    assert [id(writer) for writer in whole.model.transcoders.values()] == [id(writer) for writer in theirs]


def catalogue_of(compositions: Made, words: Any = None) -> Catalogue:
    words = words or tiny_tokenizer()
    anchor = next(iter(compositions.values())).anchor
    return Catalogue(compositions, words, MAX_POSITIONS, [("anchor", anchor, words, None)])


class Watched:
    """The shared lane of a catalogue, whose calls are counted and held up until ``go``."""

    def __init__(self, served: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[list[bool]]] = []
        self.begun, self.go, self.fails = threading.Event(), threading.Event(), False
        first = next(iter(served.models.values()))
        lane = first.beside[0][0]
        assert lane.several
        shared, own_read = lane.read, first.lane.read

        def read(*given: Any) -> Any:
            self.rows.append(given[3].tolist())
            if self.fails:
                raise RuntimeError("too much")
            return shared(*given)

        def held(*given: Any) -> Any:
            self.begun.set()
            assert self.go.wait(20)
            return own_read(*given)

        monkeypatch.setattr(lane, "read", read)
        monkeypatch.setattr(first.lane, "read", held)


PROMPT, LONG = "abc", 20


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_texts_of_several_compositions_share_a_batch(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shared batch fails, each text is written in its own."""
    compositions = CASES["shared ids"][0]()
    served = catalogue_of(compositions)
    watched = Watched(served, monkeypatch)
    watched.fails = fails
    names = ["b", "a.first", "anchor", "b"]
    with serving(served) as (url, engine), ThreadPoolExecutor(5) as pool:

        def ask(name: str) -> str:
            body = {"model": name, "prompt": PROMPT, "max_tokens": LONG, "temperature": 0}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

        alone = pool.submit(ask, "a.first")
        assert watched.begun.wait(20)
        found = []
        for count, name in enumerate(names, 1):  # all wait while the first one is read
            found.append(pool.submit(ask, name))
            wait(lambda: engine.metrics.registry.get_sample_value("calmlm:num_requests_waiting") == count)  # noqa: B023
        watched.go.set()
        texts = [alone.result(), *(one.result() for one in found)]
    words = tiny_tokenizer()
    models = {**compositions, "anchor": compositions["b"].anchor}
    for name, text in zip(["a.first", *names], texts, strict=True):
        wanted = expected(models[name], words(PROMPT).input_ids, LONG)
        assert text == words.decode(wanted, skip_special_tokens=True), name
    kinds = {tuple(row) for rows in watched.rows for row in rows}
    assert {(True, False), (False, True)} <= kinds
    if not fails:
        assert any(len({tuple(row) for row in rows}) > 1 for rows in watched.rows)


def test_one_composition_alone_keeps_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    compositions = CASES["shared ids"][0]()
    served = catalogue_of(compositions)
    watched = Watched(served, monkeypatch)
    watched.go.set()
    with serving(served) as (url, _), ThreadPoolExecutor(4) as pool:
        body = {"model": "a.first", "prompt": [PROMPT, "x"], "max_tokens": 6, "n": 2}
        answers = list(pool.map(lambda _: httpx.post(f"{url}/v1/completions", json=body, timeout=60), range(4)))
    assert all(answer.status_code == 200 for answer in answers)
    assert watched.rows == []


@pytest.mark.filterwarnings("ignore:.*tokens that reach across:UserWarning")
def test_what_has_no_room_there_is_written_in_its_own_batch() -> None:
    compositions = around(
        tiny_composition("llama", "mistral"), "gpt2", connections=2,
        augmenting_options={"max_position_embeddings": 16},
    )  # fmt: skip
    first = catalogue_of(compositions).models["a.first"]
    ids = list(range(3, 9))
    assert [lane.several for lane, _ in first.beside_for(ids, 10)] == [True]
    assert first.beside_for(ids, 11) == []
    theirs = others("bytes")  # a token of the anchor's may be so many of its own, of which it has positions for few
    theirs["augmenting_options"]["max_position_embeddings"] = 200
    words = tokenizer("bytes-large")
    first = catalogue_of(
        around(
            tiny_composition("llama", "mistral", anchor_options={"vocab_size": len(words)},
                             augmenting_options={"vocab_size": len(words)}),
            "gpt2", connections=2, **theirs,
        ),
        words,
    ).models["a.first"]  # fmt: skip
    assert first.beside_for(ids, 2) != []
    assert first.beside_for(ids, 40) == []


def waiting(engine: Engine, served: Catalogue, names: list[str], prompt: list[int], count: int) -> list[list[int]]:
    """Texts that wait for an engine which has not begun; their tokens as they come."""
    found: list[list[int]] = []
    for name in names:
        own: list[int] = []
        asked = CompletionRequest(model=name, prompt=prompt, max_tokens=count, temperature=0)
        take = lambda _place, piece, own=own: own.append(piece.drawn.token)  # noqa: E731
        engine.submit(make_job(served, asked, take, 64).writings)
        found.append(own)
    return found


def test_rows_of_the_anchor_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compositions = CASES["shared ids"][0]()
    served = catalogue_of(compositions)
    watched = Watched(served, monkeypatch)
    engine = Engine(8, 8, served.max_length)
    names, prompt = ["a.first", "b", "anchor"], tiny_tokenizer()(PROMPT).input_ids
    texts = waiting(engine, served, names, prompt, LONG)
    engine.start()
    assert engine.idle.wait(60)
    engine.close()
    models = {**compositions, "anchor": compositions["b"].anchor}
    assert texts == [expected(models[name], prompt, LONG) for name in names]
    assert any({tuple(row) for row in rows} == {(True, False), (False, True), (False, False)} for rows in watched.rows)


def test_equal_prompts_of_several_compositions_are_as_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of them are read at a time than of other prompts."""
    compositions = CASES["shared ids"][0]()
    served = catalogue_of(compositions)
    lane = next(iter(served.models.values())).beside[0][0]
    lane.pieces = False
    monkeypatch.setattr(engine_module, "PREFILL", 64)
    read, sizes = lane.read, []
    monkeypatch.setattr(lane, "read", lambda *given: sizes.append(given[0].numel()) or read(*given))
    engine = Engine(8, 8, served.max_length)
    names, prompt = ["a.first", "b"] * 4, list(range(3, 33))
    texts = waiting(engine, served, names, prompt, 4)
    engine.start()
    assert engine.idle.wait(60)
    engine.close()
    assert texts == [expected(compositions[name], prompt, 4) for name in names]
    assert max(sizes) == 2 * len(prompt)


def test_adapters_that_see_no_rows_take_no_others() -> None:
    """Experts are given tokens, not rows: there a text is the composition's or stands elsewhere."""
    first = tiny_composition(
        "qwen2_moe", "gpt2", adapters={"r": 2, "target_modules": "all-linear"}, awake=False
    )  # fmt: skip
    served = catalogue_of(around(awaken(first), "mistral", connections=2))
    assert served.models["a.first"].lane.joins
    ids = [5, 6, 7]
    assert [lane is served.models["b"].lane for lane, _ in served.models["anchor"].beside_for(ids, 4)] == [True]
    assert served.models["a.first"].beside_for(ids, 4) == []
