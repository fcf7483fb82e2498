"""A text that is written alone is written with drafts, and is what it is without them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import calmlm
from calmlm.serving.batching import try_out
from calmlm.serving.catalogue import Catalogue
from calmlm.serving.lanes import BaseLane, CompositionLane
from calmlm.serving.next_token import Sampling
from calmlm.serving.repetition import Lookup
from compositions import assert_close, own, tiny_composition
from served import catalogue, expected
from state.test_recurrent import composition as recurrent_composition
from state.test_recurrent import recurrent
from tiny import MAX_POSITIONS, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import AWKWARD, tokenizer
from writings import GREEDY, SAMPLED, Heard, other, write, writing

NEW = 24


LANES: dict[str, Callable[[], Any]] = {
    "shared": lambda: tiny_composition("llama", "gpt2"),
    "windows": lambda: tiny_composition(
        "gemma3_text", "gemma3_text", anchor_options={"sliding_window": 5}, augmenting_options={"sliding_window": 3}
    ),
    "anchor alone": lambda: tiny_composition("gemma3_text", anchor_options={"sliding_window": 4}),
    "own": lambda: other("own", "sentencepiece", augmenting_prefix="a story: "),
    "transcode": lambda: other("transcode", "characters"),
    "retokenize": lambda: other("retokenize", "unigram"),
    "pointer, experts": lambda: tiny_composition("mixtral", "bloom", words="pointer"),
    "prompt alone": lambda: tiny_composition("gpt2", "mistral", refresh=False),
}

SLOW = ("transcode", "retokenize", "pointer, experts", "prompt alone")  # others are as sharp


class Oracle:
    """Drafts what will follow.

    Args:
        whole: the text with what follows.
        errs: whether drafts are short, and tokens in them wrong; else they are as long as can be.
    """

    def __init__(self, whole: Sequence[int], errs: bool) -> None:
        self.whole, self.errs, self.chance = list(whole), errs, random.Random(0)

    def __call__(self, ids: Sequence[int]) -> list[int]:
        assert list(ids) == self.whole[: len(ids)]
        draft = self.whole[len(ids) :]
        if self.errs:
            draft = draft[: self.chance.randrange(7)]
            if draft and self.chance.random() < 0.4:
                place = self.chance.randrange(len(draft))
                draft[place] = 3 + (draft[place] + 1) % 90
        return draft


@pytest.mark.filterwarnings("ignore:.*tokens that reach across:UserWarning")
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", [pytest.param(one, marks=[pytest.mark.slow] if one in SLOW else []) for one in LANES])
def test_drafts_change_nothing(kind: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the text ends within a draft: by a stop string, a token, or its length."""
    model, theirs = LANES[kind](), kind in ("own", "transcode", "retokenize")
    words = tokenizer("bytes-large") if theirs else tiny_tokenizer()
    ids = words(AWKWARD[1]).input_ids if theirs else tiny_tokens(1, 9, seed=4)[0].tolist()
    name, of = ("base", model.anchor) if kind.startswith("anchor") else ("x", model)
    served = Catalogue({"x": model}, words, MAX_POSITIONS, [("base", model.anchor, words, None)])
    lane = served.models[name].lane
    assert lane.drafts
    endless: dict[str, Any] = {"sampling": sampling, "ends": frozenset()}
    alone = write(served, name, ids, NEW, **endless)
    assert alone.tokens == generated(of, ids, sampling)
    text, tokens = "".join(piece.text for piece in alone.pieces), alone.tokens
    stop, end = first_of([text[at : at + 2] for at in range(len(text) - 4)]), first_of(tokens[:-3])
    cases: list[tuple[int, bool, dict[str, Any]]] = [
        (NEW, True, endless),
        (NEW - 8, False, endless),
        (NEW, False, endless | {"stops": [stop]}),
        (NEW, False, endless | {"ends": frozenset([end])}),
    ]
    found: list[Heard] = []
    for room, errs, options in cases:
        wanted, oracle = write(served, name, ids, room, **options), Oracle([*ids, *tokens], errs)
        with monkeypatch.context() as patched:
            patched.setattr(Lookup, "propose", lambda _self, ids, _room, oracle=oracle: oracle(ids))
            columns = reads(lane, patched)
            found.append(write(served, name, ids, room, drafts=6, **options))
        assert found[-1].wait() == wanted.wait()
        assert_close(found[-1].logprobs, wanted.logprobs, 1e-4)
        if errs:
            assert max(columns[1:]) > 3 and len(columns) < NEW - 3 and sum(columns[1:]) > NEW
        else:
            assert columns == [len(ids), NEW] or len(found[-1].tokens) == 1
    assert [heard.pieces[-1].finish for heard in found] == ["length", "length", "stop", "stop"]
    if sampling is SAMPLED:
        assert all(len(heard.tokens) > 4 for heard in found)


def first_of(parts: Sequence[Any]) -> Any:
    """One that is new behind a third of them, if there is any."""
    return next((part for at, part in enumerate(parts) if at > len(parts) // 3 and part not in parts[:at]), parts[0])


def generated(model: Any, ids: list[int], sampling: Sampling) -> list[int]:
    if not sampling.temperature:
        return expected(model, ids, NEW, eos_token_id=None)
    text = torch.tensor([ids])
    torch.manual_seed(sampling.seed or 0)
    asked: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    found = model.generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=NEW, do_sample=True, pad_token_id=0,
        eos_token_id=None, **asked,
    )  # fmt: skip
    return found[0, len(ids) :].tolist()


def reads(lane: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns each call reads from now on."""
    columns, read = [], lane.read
    monkeypatch.setattr(lane, "read", lambda *given: columns.append(given[0].shape[1]) or read(*given))
    return columns


SAYING = tiny_tokens(1, 5, seed=6)[0].tolist()
TOTALS = ("calmlm:spec_decode_num_draft_tokens_total", "calmlm:spec_decode_num_accepted_tokens_total")


@pytest.fixture(scope="module")
def served() -> Catalogue:
    return catalogue()


def test_what_repeats_takes_fewer_steps(served: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said before is looked up; a text that does not repeat itself costs hardly more than without drafts."""
    lane, room = served.models["one"].lane, 60
    again = Sampling(temperature=0, frequency=-2.0, logprobs=2)  # soon it says the same again and again
    never = Sampling(temperature=0, frequency=20.0, logprobs=2)
    counts, totals = {}, {}
    for name, sampling in (("again", again), ("never", never)):
        options: Any = {"sampling": sampling, "ends": frozenset()}
        wanted = write(served, "one", SAYING, room, **options)
        with monkeypatch.context() as patched, writing(served, drafts=8) as engine:
            columns = reads(lane, patched)
            found = Heard(served, "one", SAYING, room, **options)
            engine.submit([found.writing])
            assert found.wait() == wanted.wait()
            engine.close()
            sample = engine.metrics.registry.get_sample_value
            totals[name] = [sample(total, {"model_name": "one"}) or 0 for total in TOTALS]
        assert_close(found.logprobs, wanted.logprobs, 1e-4)
        counts[name] = len(columns)
        assert totals[name][0] == sum(columns[1:]) - len(columns[1:])
        assert counts[name] + totals[name][1] == room
    assert counts["again"] < room / 4 and totals["again"][1] > 0.7 * totals["again"][0]
    assert counts["never"] == room and totals["never"][0] < room / 4


def test_drafts_end_when_another_text_comes(served: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while a draft is taken; what was rejected of that is gone when both share a batch. When the first one
    ends, drafts begin for the second, a row without the composition."""
    lane, model, turned = served.models["one"].lane, served.models["one"].lane.model, SAYING[::-1]
    first = write(served, "one", SAYING, 22, ends=frozenset()).tokens
    second = expected(model.anchor, turned, 30, eos_token_id=None)
    oracles = {ids[0]: Oracle([*ids, *new], errs=True) for ids, new in ((SAYING, first), (turned, second))}
    monkeypatch.setattr(Lookup, "propose", lambda _self, ids, _room: oracles[ids[0]](ids))
    shapes: list[tuple[int, ...]] = []
    read = lane.read
    monkeypatch.setattr(lane, "read", lambda *given: shapes.append(tuple(given[0].shape)) or read(*given))
    with writing(served, drafts=6) as engine:

        def then(count: int) -> None:
            if count == 12:
                engine.submit([late.writing])

        late = Heard(served, "anchor", turned, 30, ends=frozenset())
        early = Heard(served, "one", SAYING, 22, ends=frozenset(), then=then)
        engine.submit([early.writing])
        assert early.tokens == first and late.tokens == second
    both = [place for place, shape in enumerate(shapes) if shape == (2, 1)]
    assert len(both) > 5 and both == list(range(both[0], both[-1] + 1))
    assert shapes[both[0] - 1] == (1, 5)
    for alone in (shapes[: both[0] - 1], shapes[both[-1] + 1 :]):
        assert any(columns > 1 for _, columns in alone[1:])


def test_a_draft_that_fails_is_the_last(served: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = served.models["one"].lane
    wanted = write(served, "one", SAYING, 20, ends=frozenset(), sampling=SAMPLED)
    oracle, read, failed = Oracle([*SAYING, *wanted.tokens], errs=False), lane.read, []

    def faulty(*given: Any) -> Any:
        if given[4] is None and given[0].shape[1] > 1:
            failed.append(1)
            raise RuntimeError("out of memory, say")
        return read(*given)

    monkeypatch.setattr(lane, "read", faulty)
    monkeypatch.setattr(Lookup, "propose", lambda _self, ids, _room: oracle(ids))
    found = write(served, "one", SAYING, 20, ends=frozenset(), sampling=SAMPLED, drafts=6)
    assert found.wait() == wanted.wait() and failed == [1]


def test_models_that_take_nothing_back_draft_nothing() -> None:
    for model in (recurrent_composition("mamba2", "augmenting"), recurrent("mamba2")):
        lane = CompositionLane(model, "x") if isinstance(model, calmlm.CalmForCausalLM) else BaseLane(model)
        try_out(lane)
        assert lane.joins and not lane.drafts


def test_drafts_follow_a_grammar() -> None:
    words = tokenizer("bytes-large")
    model = tiny_composition("llama", "gpt2", **own("bytes", "bytes-large"))
    served = Catalogue({"own": model}, words)
    writer = served.models["own"].schema_writer()
    schema = {"type": "array", "items": {"enum": ["fox", "dog"]}, "minItems": 6, "maxItems": 6}
    ids = words("the foxes").input_ids
    wanted, found = (
        write(served, "own", ids, 90, sampling=SAMPLED, grammar=writer.grammar(schema), drafts=drafts)
        for drafts in (0, 8)
    )
    assert found.wait() == wanted.wait()
    assert len(json.loads("".join(piece.text for piece in found.pieces))) == 6
