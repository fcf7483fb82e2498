"""Two real models: what may stand in D_C, batches, figures by hand, and a run from data to report with tiny models."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from calmlm.cli import main
from calmlm.data.labels import IGNORE
from calmlm.data.sources import Record
from calmlm.errors import CalmError, ConfigError, DataError, ModelError
from calmlm.experiments.real.ensemble import Ensemble, sent
from calmlm.experiments.real.joined import (
    Pair,
    composed,
    fine_tuned,
    fresh,
    open_pair,
    rows_of,
    train_composition,
    with_lora,
)
from calmlm.experiments.real.layout import AUGMENTING, Text, batches, laid_out, reading_others
from calmlm.experiments.real.measures import bits, first_line_of, text_of
from calmlm.experiments.real.picking import Routed
from calmlm.experiments.real.presets import BaseModel, Method, Settings, Varieties, load_settings
from calmlm.experiments.real.report import goals, summarise
from calmlm.experiments.real.resampling import Figures, bits_of, difference
from calmlm.experiments.real.run import cascade, cell_path, run, seeds_of
from calmlm.experiments.real.systems import Alone, Cascade, Composed, Shown
from calmlm.experiments.real.world import Item, World, read_sentences
from calmlm.training.retaining import divergence
from documents import ROOT
from pairs import tiny_pair

SETTINGS = load_settings(ROOT / "configs" / "real" / "translation.yaml")
VARIETIES = Varieties(["xx_Latn", "yy_Latn"], ["zz_Latn"], ["ww_Latn"])
METHODS = {
    "m_A": Method("m_A", "m_A"),
    "m_B": Method("m_B", "m_B"),
    "cascade": Method("Cascade", "cascade", examples=True),
    "router": Method("Router", "router", examples=True),
    "ensemble": Method("Ensemble", "ensemble"),
    "lora": Method("LoRA", "lora", rank=2, steps=2, learning_rate=1e-3, batch_size=2),
    "full": Method("Full", "full", steps=2, learning_rate=1e-3, batch_size=2),
    "words": Method(
        "Words", "composed", compose={"connections": "none", "words": "map"}, steps=2, learning_rate=1e-3, batch_size=2
    ),
}
TINY = Settings(
    "tiny", BaseModel("anchor"), BaseModel("augmenting"), "no/data", VARIETIES, METHODS,
    pairs=8, plain=3, shots=2, plain_lines=12, test=5, development=4, items=3, weighed=2,
    english_items=3, written=2, new_tokens=3, swapped=False,
)  # fmt: skip


def sentences(count: int = 40) -> list[dict[str, str]]:
    """Numbered sentences in four varieties and English."""
    words = "the river reads a small letter about many old houses in winter".split()
    found = []
    for number in range(count):
        chosen = [words[(number * step + step) % len(words)] for step in (1, 2, 3, 5)]
        english = f"{' '.join(chosen)} {number}"
        found.append({"eng_Latn": english} | {key: f"{key[0]} {english[::-1]}" for key in VARIETIES.all})
    return found


@pytest.fixture(scope="module")
def world() -> World:
    return World(TINY, 0, sentences())


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny_pair()


# Data


def test_no_sentence_stands_in_two_parts_in_any_language(world: World) -> None:
    def english(items: list[Item]) -> set[str]:
        return {item.target for item in items}

    trained = english(world.composition()) | english(world.examples) | set(world.lines(1000))
    chosen, asked = english(world.weighed), english(world.tested) | english(world.english) | english(world.written)
    assert not trained & chosen
    assert not trained & asked
    assert not chosen & asked
    shown = {item.prompt for item in [*world.composition(), *world.examples] if item.prompt}
    assert not shown & {item.prompt for item in [*world.tested, *world.weighed]}
    assert not english(world.examples) & english(world.composition())


def test_lora_stands_beside_what_has_seen_the_same_pairs() -> None:
    more = {name: dataclasses.replace(METHODS[name], pairs=10) for name in ("lora", "words")}
    methods = METHODS | {"lora_more": more["lora"], "words_more": more["words"]}
    methods |= {"guided": Method("Guided", "composed", of="words_more", guidance=2.0)}
    methods |= {"lora_guided": Method("Guided", "lora", of="lora_more", guidance=2.0)}
    settings = dataclasses.replace(TINY, methods=methods)
    assert settings.faults() == []
    rivals = {"m_A": "lora", "words": "lora", "lora": "lora"} | dict.fromkeys(
        ("words_more", "guided", "lora_more", "lora_guided"), "lora_more"
    )
    assert {name: settings.lora_beside(name) for name in rivals} == rivals


def test_the_split_is_the_same_for_all_seeds_and_d_c_is_not(world: World) -> None:
    again, other = World(TINY, 0, sentences()), World(TINY, 1, sentences())
    assert again.composition() == world.composition()
    assert other.composition() != world.composition()
    assert other.tested == world.tested
    assert other.weighed == world.weighed


def test_d_c_spreads_over_its_varieties(world: World) -> None:
    pairs = [item for item in world.composition() if item.prompt]
    assert len(world.composition()) == 11
    assert len({item.target for item in world.composition()}) == 11
    for variety in VARIETIES.inside:
        assert sum(item.variety == variety for item in pairs) == 4
    prompts = {item.prompt: item.variety for item in pairs}
    for item in pairs:
        assert prompts[item.other] == item.variety
        assert item.other != item.prompt


def test_a_larger_d_c_adds_sentences_that_are_short_where_they_are_shown() -> None:
    long = [row | {VARIETIES.inside[number % 2]: "long " * 80} for number, row in enumerate(sentences(50)[40:])]
    world = World(TINY, 0, [*sentences(), *long])
    assert world.test == World(TINY, 0, sentences()).test
    some, more = world.composition(), world.composition(18)
    assert [item.target for item in some] == [item.target for item in World(TINY, 0, sentences()).composition()]
    added = [item for item in more if item.target not in {item.target for item in some}]
    assert len(added) == len({item.target for item in added}) == 10
    assert {item.target for item in added} == {row["eng_Latn"] for row in long}
    assert not any(item.prompt.startswith("long") or item.other in ("", item.prompt) for item in added)
    with pytest.raises(DataError, match="xx_Latn has none after 10"):
        world.composition(20)


def test_a_model_alone_can_read_examples_in_the_variety_that_is_asked() -> None:
    settings = dataclasses.replace(TINY, shots_in="own", shown=["yy_Latn"])
    world = World(settings, 0, sentences())
    assert {item.variety for item in world.examples} == {"yy_Latn"}
    english = [item.target for item in world.examples]
    for variety, text in world.before.items():
        examples = world.examples_of(variety)
        assert {item.variety for item in examples} == {variety}
        assert [item.target for item in examples] == english  # no further sentence is shown
        assert text == "".join(f"{item.prompt} {item.target}\n\n" for item in examples)
    in_turn = World(TINY, 0, sentences())
    assert set(in_turn.before.values()) == {in_turn.shown}
    assert [item.variety for item in in_turn.examples] == VARIETIES.inside


def test_what_is_asked_stands_in_all_varieties(world: World) -> None:
    assert [item.variety for item in world.tested] == [v for v in VARIETIES.all for _ in range(3)]
    first = [item for item in world.tested if item.sentence == 0]
    assert len({item.target for item in first}) == 1
    for item in world.tested:
        assert item.other in {other.prompt for other in world.tested if other.variety == item.variety}
        assert item.other != item.prompt


def test_long_and_repeated_sentences_are_left_out() -> None:
    rows = sentences()
    long = {**rows[0], "eng_Latn": "long", "ww_Latn": "x" * 301}
    world = World(TINY, 0, [*rows, rows[3], long, {"eng_Latn": "in no other language"}])
    assert world.left_out == 1
    kept = [*world.test, *world.development, *world.training]
    assert len(kept) == 40


def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none in ww_Latn: name other data, or other varieties"):
        World(TINY, 0, [{key: value for key, value in row.items() if key != "ww_Latn"} for row in sentences()])
    with pytest.raises(DataError, match="at least 22 sentences in all varieties, but got 9: lower pairs"):
        World(TINY, 0, sentences(9))
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(DataError, match="Expected lines of JSON in .*broken.jsonl, but they cannot be read"):
        read_sentences(TINY, tmp_path / "broken.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]")
    with pytest.raises(DataError, match="Expected an object of JSON in each line"):
        read_sentences(TINY, tmp_path / "list.jsonl")


def test_a_packed_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in sentences(3)).encode()))
    assert read_sentences(TINY, path) == sentences(3)


SPLITS = {"training": "train", "development": "validation", "test": "test"}


def test_a_data_set_that_is_split_keeps_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(TINY, splits=SPLITS, subset="zz-en", keys={"en": "eng_Latn"})
    rows = sentences(60)
    parts = {"train": rows[:40], "validation": rows[40:50], "test": [*rows[50:], rows[0]]}
    for split, part in parts.items():
        (tmp_path / f"some_{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    world = World(settings, 0, read_sentences(settings, tmp_path / "some_{split}.jsonl"))
    assert {s["eng_Latn"] for s in world.test} <= {row["eng_Latn"] for row in parts["test"]}
    assert {s["eng_Latn"] for s in world.development} <= {row["eng_Latn"] for row in rows[40:50]}
    # A sentence that is asked is not learned, even if the data set has it twice.
    assert {s["eng_Latn"] for s in world.training} == {row["eng_Latn"] for row in rows[1:40]}
    with pytest.raises(DataError, match="Expected 5 sentences for test, but got 2: lower test"):
        World(settings, 0, [{**row, "part": "training"} for row in rows[:30]]
              + [{**row, "part": "test"} for row in rows[30:32]])  # fmt: skip

    def read_hub(source: Any) -> list[Any]:
        assert (source.dataset, source.name) == ("no/data", "zz-en")
        turned = [
            {"en" if key == "eng_Latn" else key: text for key, text in row.items()} for row in parts[source.split]
        ]
        return [Record({"translation": row}, "row") for row in turned]

    monkeypatch.setattr("calmlm.experiments.real.world.read_hub", read_hub)
    assert World(settings, 0, read_sentences(settings)).test == world.test
    faulty = dataclasses.replace(settings, splits={"test": "test"})
    assert faulty.faults() == ["splits: expected training, development, test, but got test."]


# Settings


def test_the_committed_file_has_every_control() -> None:
    methods = SETTINGS.methods
    assert {"m_A", "m_B", "cascade", "ensemble", "lora", "full", "composed"} == {m.system for m in methods.values()}
    assert any(method.augmenting == "random" for method in methods.values())
    assert any(method.reads == "other" for method in methods.values())
    assert not set(SETTINGS.varieties.inside) & {*SETTINGS.varieties.outside, *SETTINGS.varieties.apart}


def test_faults_are_collected(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\nanchor: {id: a}\naugmenting: {id: b}\ndata: d\nvarieties: {inside: [u], outside: [v]}\nitems: 900\n"
        "methods: {one: {title: One, system: m_A, steps: 3}, two: {title: Two, system: composed},\n"
        "  three: {title: Three, system: lora, steps: 3, learning_rate: 1e-3, retain: 1.0}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    for part in (
        "methods.one.steps: expected none",
        "methods.two.compose: expected",
        "three.retain: expected",
        "items: expected 2 to 400",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="Expected a YAML file at"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Rows must be among m_A, .* but got nothing: use names of the file"):
        TINY.chosen(["nothing"])


def test_a_cell_is_another_one_where_anything_but_a_title_changes() -> None:
    other = dataclasses.replace(TINY, methods=METHODS | {"lora": dataclasses.replace(METHODS["lora"], title="x")})
    assert other.mark("lora") == TINY.mark("lora")
    for changed in (TINY.cut(1, None), TINY.cut(None, 2), dataclasses.replace(TINY, anchor=BaseModel("z"))):
        assert changed.mark("lora") != TINY.mark("lora")
    assert TINY.cut(1, None).mark("m_B") == TINY.mark("m_B")


def test_later_settings_leave_the_marks_of_stored_cells() -> None:
    for name in ("m_A", "lora"):
        marks = {
            dataclasses.replace(TINY, **changed).mark(name)
            for changed in ({}, {"headline": "lora"}, {"shots_in": "own"}, {"shown": ["xx_Latn"]})
        }
        assert len(marks) == 3  # a page's headline changes no figure
    assert SETTINGS.mark("m_A") == "6a0175bc"  # of a committed cell
    assert load_settings(ROOT / "configs" / "real" / "varieties.yaml").mark("composed_shown") == "0ccf0f87"


def test_what_depends_on_no_seed_is_made_once() -> None:
    assert seeds_of(METHODS["ensemble"], (3, 4)) == [0]
    assert seeds_of(METHODS["lora"], (3, 4)) == [3, 4]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Expected the model some/id in .*x.gguf, but there is no such file: run"):
        open_pair(BaseModel("some/id", "x.gguf"), BaseModel("b"), tmp_path)


# Batches


def test_prompts_end_in_one_column() -> None:
    batch, width = laid_out([Text([5, 6, 7, 8], 3, [1, 2]), Text([9, 10, 11], 1, [3, 4, 5, 6])], 0)
    assert width == 4
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7, 8, 0], [0, 0, 0, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100] * 4 + [8, -100], [-100] * 4 + [10, 11]]
    given = batch["augmenting_inputs"][AUGMENTING]
    assert given["input_ids"].tolist() == [[0, 0, 1, 2], [3, 4, 5, 6]]
    assert given["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_a_text_without_another_prompt_is_read_as_it_is() -> None:
    batch = reading_others(0)(
        [
            {"input_ids": [5, 6, 7], "labels": [IGNORE, IGNORE, 7], "other": [8]},
            {"input_ids": [1, 2], "labels": [1, 2], "other": None},
        ]
    )
    assert batch["augmenting_inputs"][AUGMENTING]["input_ids"].tolist() == [[0, 8], [0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, -100, 2]]


def test_batches_hold_every_text_once_and_few_tokens() -> None:
    texts = [Text(list(range(n)), n // 2) for n in (9, 3, 12, 4, 8, 2, 7)]
    found = list(batches(texts, 20))
    assert sorted(index for batch in found for index in batch) == list(range(7))
    for batch in found:
        before = max(texts[i].before for i in batch)
        assert len(batch) == 1 or len(batch) * (before + max(len(texts[i].ids) - texts[i].start for i in batch)) <= 20


# Measures


def by_hand(model: Any, item: Item, tokens: Any) -> float:
    """The target's negative log-probability, one row alone and without padding."""
    text = text_of(item, tokens)
    ids = torch.tensor([text.ids])
    prompt = text.start if item.prompt else 0  # of plain text nothing is given
    given = {"prompt_mask": torch.arange(ids.shape[1])[None] < prompt} if hasattr(model, "augmenting") else {}
    with torch.no_grad():
        likely = model(ids, **given).logits[0].log_softmax(-1)
    return -sum(float(likely[place - 1, text.ids[place]]) for place in range(text.start, len(text.ids)))


@pytest.mark.parametrize("which", ["anchor", "augmenting"])
def test_nats_of_a_model_are_those_of_each_row_alone(pair: Pair, world: World, which: str) -> None:
    model = getattr(pair, which)
    tokens = pair.tokenizer if which == "anchor" else pair.augmenting_tokenizer
    items = [*world.tested[:4], *world.english]
    assert Alone(model, tokens).nats(items) == pytest.approx([by_hand(model, item, tokens) for item in items], rel=1e-4)


def test_nats_of_a_composition_are_those_of_each_row_alone(pair: Pair, world: World) -> None:
    model = composed(pair, METHODS["words"], world)
    words = model.model.connectors[AUGMENTING][-1]
    with torch.no_grad():
        words.opening.fill_(0.01)
        words.map.weight.normal_()
    items = [*world.tested[:4], *world.english]
    found = Composed(model, pair.tokenizer).nats(items)
    assert found == pytest.approx([by_hand(model, item, pair.tokenizer) for item in items], rel=1e-4)
    alone = Alone(pair.anchor, pair.tokenizer).nats(items)
    assert all(abs(one - other) > 0.1 for one, other in zip(found, alone, strict=True))


def test_examples_of_the_variety_that_is_asked_stand_in_the_place_of_the_prefix(pair: Pair) -> None:
    """As in compositions that were made with these examples; plain text is read behind the composition's own."""
    world = World(dataclasses.replace(TINY, shots_in="own"), 0, sentences())
    method = dataclasses.replace(METHODS["words"], examples=True)
    model = composed(pair, method, world)
    own = list(model.config.augmenting[AUGMENTING]["prefix"])
    items = [world.tested[0], world.tested[4], *world.english, world.tested[1]]
    system = Shown(model, pair.tokenizer, pair.augmenting_tokenizer, world.before)
    others = {variety: composed(pair, method, world) for variety in world.before}
    for variety, other in others.items():
        other.set_augmenting_prefix(world.before[variety], pair.augmenting_tokenizer)
    for one in (model, *others.values()):
        words = one.model.connectors[AUGMENTING][-1]
        with torch.no_grad():
            words.opening.fill_(0.01)
            words.map.weight.copy_(torch.randn(words.map.weight.shape, generator=torch.Generator().manual_seed(0)))
    expected = [Composed(others.get(item.variety, model), pair.tokenizer).nats([item])[0] for item in items]
    assert system.nats(items) == pytest.approx(expected, rel=1e-4)
    assert model.config.augmenting[AUGMENTING]["prefix"] == own
    plain = Composed(model, pair.tokenizer).nats(items)
    moved = [abs(one / two - 1) > 1e-3 for one, two in zip(plain, expected, strict=True)]
    assert moved == [True, True, *3 * [False], True]
    assert system.write(items[:2], 3) == [
        Composed(others[item.variety], pair.tokenizer).write([item], 3)[0] for item in items[:2]
    ]


def test_swapping_gives_m_a_the_other_prompt(pair: Pair, world: World) -> None:
    items = world.tested[:3]
    m_a = Alone(pair.augmenting, pair.augmenting_tokenizer, hears=True)
    turned = [dataclasses.replace(item, prompt=item.other) for item in items]
    assert m_a.nats(items, swapped=True) == m_a.nats(turned) != m_a.nats(items)


def test_swapping_gives_a_composition_that_only_hears_m_a_the_other_prompt(pair: Pair, world: World) -> None:
    model = composed(pair, METHODS["words"], world)
    words = model.model.connectors[AUGMENTING][-1]
    with torch.no_grad():  # what m_A says alone counts, so that it does not matter what the anchor reads
        words.opening.fill_(1.0)
        words.gate_bias.fill_(50.0)
        words.map.weight.normal_()
    items = [*world.tested[:5], *world.english]
    turned = [dataclasses.replace(item, prompt=item.other) if item.prompt else item for item in items]
    ensemble = Ensemble(composed(pair, METHODS["words"], world), pair.tokenizer, pair.augmenting_tokenizer, 1.0)
    for system in (Composed(model, pair.tokenizer), ensemble):
        right, swapped = system.nats(items), system.nats(items, swapped=True)
        assert swapped == pytest.approx(system.nats(turned), rel=1e-3)
        assert right[:5] != pytest.approx(swapped[:5], rel=1e-2)
        assert right[5:] == pytest.approx(swapped[5:], rel=1e-3)
    other = dataclasses.replace(METHODS["words"], reads="other")
    assert train_composition(pair, other, world).losses != train_composition(pair, METHODS["words"], world).losses


def test_bits_count_the_bytes_of_the_target() -> None:
    assert bits([8 * math.log(2)], [Item("", "éa\N{EURO SIGN}b", "", 0)]) == pytest.approx(8 / 7)


def test_the_first_line_with_text_is_read() -> None:
    assert first_line_of("\n  A river. \n\nनदी\nEnglish: no") == "A river."
    assert first_line_of(" \n") == ""


def test_what_is_written_ends_with_its_line(pair: Pair, world: World) -> None:
    written = Alone(pair.anchor, pair.tokenizer).write(world.tested[:5], 4)
    one_by_one = [Alone(pair.anchor, pair.tokenizer).write([item], 4)[0] for item in world.tested[:5]]
    assert list(map(first_line_of, written)) == list(map(first_line_of, one_by_one))


# The ensemble


def test_probabilities_are_sent_and_add_up() -> None:
    found = sent(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([2, -1, 0, 2]), 3)
    assert torch.allclose(found, torch.tensor([[0.375, 0.0, 0.625]]))


def test_an_ensemble_at_no_weight_is_the_anchor_and_at_half_the_mean(pair: Pair, world: World) -> None:
    model = composed(pair, METHODS["words"], world)
    ensemble, items = Ensemble(model, pair.tokenizer, pair.augmenting_tokenizer, 0.0), world.tested[:2]
    assert ensemble.nats(items) == pytest.approx(Alone(pair.anchor, pair.tokenizer).nats(items), rel=1e-4)
    found = {}
    for weight in (0.0, 0.5, 1.0):
        ensemble.weight = weight
        text = text_of(items[0], pair.tokenizer)
        one = dataclasses.replace(items[0], target=pair.tokenizer.decode(text.ids[text.start]).strip())
        found[weight] = math.exp(-ensemble.nats([one])[0])
    assert found[0.5] == pytest.approx((found[0.0] + found[1.0]) / 2, rel=1e-4)
    chosen = ensemble.choose(world.weighed)
    assert chosen[ensemble.weight] == min(chosen.values())
    assert bits(ensemble.nats(world.weighed), world.weighed) == pytest.approx(chosen[ensemble.weight], abs=1e-3)


def test_an_ensemble_writes_what_it_predicts(pair: Pair, world: World) -> None:
    model = composed(pair, METHODS["words"], world)
    item = world.tested[0]
    ensemble = Ensemble(model, pair.tokenizer, pair.augmenting_tokenizer, 1.0)
    written = ensemble.write([item], 1)[0]
    best = ensemble.heard[:, -1]
    assert pair.tokenizer.decode(ensemble.said(best).argmax(-1)) == written


# The router


class Fixed(Alone):
    """Needs so many nats for each item, and writes its name."""

    def __init__(self, model: Any, tokens: Any, name: str, nats: dict[str, float]) -> None:
        super().__init__(model, tokens)
        self.name, self.known = name, nats

    def nats(self, items: Any, swapped: bool = False) -> list[float]:
        return [self.known[item.variety] + item.sentence for item in items]

    def write(self, items: Any, new_tokens: int) -> list[str]:
        return [f"{self.name} {item.sentence}" for item in items]


def test_the_router_sends_each_prompt_to_who_knows_more(pair: Pair, world: World) -> None:
    ours = Fixed(pair.anchor, pair.tokenizer, "m_B", {"xx_Latn": 1.0, "yy_Latn": 9.0, "eng_Latn": 5.0})
    theirs = Fixed(None, None, "m_A", {"xx_Latn": 2.0, "yy_Latn": 3.0, "eng_Latn": 0.0})
    items = [item for item in world.tested if item.variety in ("xx_Latn", "yy_Latn")] + world.english[:1]
    router = Routed(ours, theirs)
    assert not any(router.chosen(items))
    assert router.fit(items[:-1]) == 0.5
    assert router.nats(items) == [1.0, 2.0, 3.0, 3.0, 4.0, 5.0, 5.0]
    assert router.write(items, 3)[2:5] == ["m_B 2", "m_A 0", "m_A 1"]
    # States are those of each prompt alone.
    alone = torch.cat([router.states([item]) for item in items[:4]])
    torch.testing.assert_close(router.states(items[:4]), alone, atol=1e-5, rtol=1e-4)


# Training


def test_a_cascade_drafts_each_example_after_the_others(
    pair: Pair, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, str]] = []

    def write(self: Alone, items: Any, new_tokens: int) -> list[str]:
        read.extend((self.before[item.variety], item.prompt) for item in items)
        return ["draft"] * len(items)

    monkeypatch.setattr(Alone, "write", write)
    made = cascade(pair, METHODS["cascade"], world)
    first, second = world.examples
    assert read == [(f"{second.prompt}{second.completion}\n\n", first.prompt),
                    (f"{first.prompt}{first.completion}\n\n", second.prompt)]  # fmt: skip
    told = f"{first.prompt} draft\nEnglish:{first.completion}\n\n"
    assert all(text.startswith(told) for text in made.writer.before.values())
    assert made.writer.before.keys() == set(VARIETIES.all)


def test_the_cascade_shows_the_draft(pair: Pair, world: World) -> None:
    class Writer(Alone):
        def write(self, items: Any, new_tokens: int) -> list[str]:
            return [f"draft {item.sentence}\nmore" for item in items]

    asked: list[str] = []

    class Reader(Alone):
        def nats(self, items: Any, swapped: bool = False) -> list[float]:
            asked.extend(item.prompt for item in items)
            return [0.0] * len(items)

    translator, writer = Writer(None, None), Reader(None, None)
    Cascade(translator, writer, 3, first_line_of).nats([world.tested[1], world.english[0]])
    assert asked == [f"{world.tested[1].prompt} draft 1\nEnglish:", ""]


def test_rows_end_and_plain_text_counts_whole(pair: Pair, world: World) -> None:
    items = world.composition()
    rows = rows_of(items, pair.tokenizer, others=True)
    for item, row in zip(items, rows, strict=True):
        learned = [token for token in row["labels"] if token != IGNORE]
        assert learned[-1] == pair.tokenizer.eos_token_id
        assert pair.tokenizer.decode(learned[:-1]).strip() == item.target
        assert (row["other"] is None) == (not item.prompt)


def test_training_leaves_the_pair_alone(pair: Pair, world: World) -> None:
    before = {name: tensor.clone() for name, tensor in pair.anchor.state_dict().items()}
    adapted = with_lora(pair, METHODS["lora"], world)
    joined = train_composition(pair, METHODS["words"], world)
    assert 0 < joined.parameters < adapted.parameters
    assert joined.losses
    assert before.keys() == pair.anchor.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.anchor.state_dict().items())


def test_a_composition_can_be_held_to_its_anchor_on_plain_english(pair: Pair, world: World) -> None:
    """It says what the anchor says on lines that it was not held to, and still learns from D_C; in parts as a whole."""
    compose = {"connections": "none", "words": "map", "adapters": {"r": 4}}
    free = dataclasses.replace(METHODS["words"], compose=compose, steps=12, learning_rate=2e-2)
    held = dataclasses.replace(free, retain=20.0)
    lines = pair.tokenizer([item.target for item in world.english], return_tensors="pt", padding=True)

    def away(model: Any) -> float:
        columns = torch.arange(lines["input_ids"].shape[1])
        with torch.no_grad():
            return float(divergence(model, model, dict(lines), columns))

    alone, kept = (train_composition(pair, method, world) for method in (free, held))
    parts = train_composition(pair, dataclasses.replace(held, rows_at_once=1), world)
    assert not {*world.lines(12)} & {item.target for item in world.english}
    assert 0 < away(kept.model) < 0.3 * away(alone.model)
    assert 0 < away(parts.model) < 0.3 * away(alone.model)


def test_a_random_model_knows_nothing_of_the_real_one(pair: Pair) -> None:
    one, other = fresh(pair.augmenting, 5), fresh(pair.augmenting, 5)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], pair.augmenting.state_dict()[name])


# Figures


def cell(nats: list[float], swapped: list[float] | None = None, **more: Any) -> dict[str, Any]:
    found = {"nats": nats, "swapped_nats": swapped, "varieties": [v for v in VARIETIES.all for _ in range(3)]}
    sizes = {"tested": [10, 20, 30] * 4, "english": [10]}
    return found | {"sizes": sizes, "english_nats": [7.0], "seconds": 1.0, **more}


def test_bits_by_hand() -> None:
    figures = Figures.of([cell([1.0] * 12), cell([3.0] * 12)], VARIETIES.inside)
    assert bits_of(figures).mean == pytest.approx(2 * 6 / 120 / math.log(2))
    assert bits_of(figures).low < bits_of(figures).mean < bits_of(figures).high


def test_differences_are_paired_by_sentence() -> None:
    one = Figures.of([cell([10.0, 500.0, 30.0] * 4)], VARIETIES.inside)
    # Half a bit per byte less of each sentence: paired, nothing is left to vary.
    less = [value - 0.5 * math.log(2) * size for value, size in zip([10.0, 500.0, 30.0] * 4, [10, 20, 30] * 4)]  # noqa: B905
    other = Figures.of([cell(less)], VARIETIES.inside)
    found = difference(other, one)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert bits_of(one).high - bits_of(one).low > 1


def test_goals_say_what_is_short() -> None:
    cells = {
        "m_B": {"0": cell([9.0] * 12)},
        "lora": {"0": cell([8.0] * 12)},
        "ensemble": {"0": cell([7.5] * 12)},
        "words": {"0": cell([7.0] * 12, [9.0] * 12, parameters=5, english_nats=[7.7])},
    }
    rows = summarise(TINY, cells)
    assert rows["words"]["english"] == pytest.approx(1.1)
    assert rows["words"]["gain"].mean == pytest.approx(6 * 2 / 120 / math.log(2))
    assert rows["words"]["against_lora"].mean == pytest.approx(-6 / 120 / math.log(2))
    assert "gain" not in rows["lora"]
    lines = goals(TINY, rows)
    assert any("against LoRA at most -0.30: -0.072, **not reached, 0.228 short**" in line for line in lines)
    assert any("English at most 1.01 of m_B's: 1.100, **not reached, 0.090 short**" in line for line in lines)


# From data to report


@pytest.mark.slow
def test_a_run_reports_and_resumes(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from calmlm.experiments.real import run as run_module

    monkeypatch.setattr(run_module, "load_settings", lambda path: TINY)
    monkeypatch.setattr(run_module, "open_pair", lambda *_: pair)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in sentences()))
    output = tmp_path / "results"
    places: dict[str, Any] = {"output": output, "data": tmp_path / "data.jsonl", "report": lambda line: None}
    result = run("x.yaml", (0, 1), ["m_A", "m_B", "lora", "words"], command="calmlm repro real", **places)
    assert list(result["rows"]) == ["m_A", "m_B", "lora", "words"]
    assert result["rows"]["words"]["seeds"] == 2
    assert len(list((output / "cells").iterdir())) == 6
    stored = json.loads(cell_path(output, TINY, "words", 1).read_text())
    assert stored["seed"] == 1
    assert stored["command"] == "calmlm repro real"
    assert stored["measuring_seconds"].keys() == {"tested", "english", "written"}
    assert len(stored["nats"]) == len(stored["varieties"]) == 12
    page = (output / "tiny.md").read_text()
    assert "| Words |" in page
    assert "| m_A (one seed) |" in page
    assert json.loads((output / "tiny.json").read_text())["rows"].keys() == result["rows"].keys()

    def fail(*_: Any) -> None:
        raise AssertionError("a stored cell was made again")

    monkeypatch.setattr(run_module, "open_pair", fail)
    again = run("x.yaml", (0, 1), ["m_A", "words"], **places)
    assert again["rows"] == result["rows"]
    with pytest.raises(AssertionError, match="made again"):
        run("x.yaml", (0, 1), ["words"], steps=1, **places)
    assert run("x.yaml", (0, 1), steps=1, stored_only=True, **places)["rows"].keys() == {"m_A", "m_B"}


def test_a_row_measures_the_composition_of_another(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was kept, as it was trained; where none was kept, it is trained, and is the same."""
    from calmlm.experiments.real import run as run_module

    methods = {
        "words": dataclasses.replace(METHODS["words"], examples=True, learning_rate=0.1),
        "shown": Method("Shown", "composed", of="words"),
        "guided": Method("Guided", "composed", of="shown", guidance=4.0),
        "random": dataclasses.replace(METHODS["words"], examples=True, augmenting="random"),
        "random_guided": Method("Random, guided", "composed", of="random", guidance=4.0),
        "m_A": Method("m_A", "m_A"),
        "m_A_guided": Method("m_A, guided", "m_A", of="m_A", guidance=4.0),
        "lora": Method("LoRA", "lora", rank=4, steps=2, learning_rate=0.1),
        "lora_guided": Method("LoRA, guided", "lora", of="lora", guidance=4.0),
    }
    settings = dataclasses.replace(TINY, methods=methods, shots_in="own", shown=["xx_Latn"])
    assert settings.faults() == []
    monkeypatch.setattr(run_module, "load_settings", lambda path: settings)
    monkeypatch.setattr(run_module, "open_pair", lambda *_: pair)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in sentences()))
    places: dict[str, Any] = {"data": tmp_path / "data.jsonl", "report": lambda line: None, "keep": tmp_path / "kept"}
    result = run("x.yaml", (0,), None, tmp_path / "a", **places)
    assert [row["seeds"] for row in result["rows"].values()] == [1] * 9
    kept = {"lora-seed-0", "random-seed-0", "words-seed-0"}
    assert {path.name for path in (tmp_path / "kept").iterdir()} == kept

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def cell(folder: str, name: str) -> dict[str, Any]:
        return json.loads(cell_path(tmp_path / folder, settings, name, 0).read_text())

    found = cell("a", "shown")
    assert found["parameters"] == cell("a", "words")["parameters"] and "training_seconds" not in found
    assert found["english_nats"] == pytest.approx(cell("a", "words")["english_nats"], rel=0.01)
    assert found["nats"] != pytest.approx(cell("a", "words")["nats"], rel=1e-3)
    for name, source in (("guided", "shown"), ("m_A_guided", "m_A"), ("lora_guided", "lora")):
        guided = cell("a", name)
        assert all(guided.get(key) == cell("a", source).get(key) for key in ("nats", "swapped_nats", "parameters"))
        assert guided["written"] != cell("a", source)["written"]
    asked = World(settings, 0, sentences()).written[0]
    ids = torch.tensor([pair.augmenting_tokenizer(asked.prompt, add_special_tokens=False).input_ids])
    text = pair.augmenting.generate(ids, max_new_tokens=settings.new_tokens, do_sample=False, guidance_scale=4.0)
    written = pair.augmenting_tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
    assert cell("a", "m_A_guided")["written"][0] == first_line_of(written)
    with pytest.raises(CalmError, match="Expected the cell of shown, whose bits per byte are this row's"):
        run("x.yaml", (0,), ["guided"], tmp_path / "e", **places)
    assert settings.shows("guided") and settings.shows("words") and not settings.shows("m_A_guided")
    run("x.yaml", (0,), ["shown"], tmp_path / "b", **{**places, "keep": None})
    assert cell("b", "shown")["nats"] == pytest.approx(found["nats"], rel=0.01)  # kept in bfloat16
    run("x.yaml", (0,), ["shown"], tmp_path / "d", **{**places, "keep": tmp_path / "later"})
    assert [path.name for path in (tmp_path / "later").iterdir()] == ["words-seed-0"]  # and so it is not trained twice
    with monkeypatch.context() as patch:  # a folder that is full costs no cell
        patch.setitem(run_module.KEPT, "composed", full)
        lines: list[str] = []
        run("x.yaml", (0,), ["words"], tmp_path / "g", **{**places, "keep": tmp_path / "full", "report": lines.append})
    assert cell("g", "words")["nats"] == cell("a", "words")["nats"]
    assert any("is not kept in" in line and "No space left" in line for line in lines)
    path = cell_path(tmp_path / "a", settings, "lora_guided", 0)
    path.rename(path.with_suffix(".before"))
    for folder in (tmp_path / "kept", None):  # as it was kept, and trained anew
        with monkeypatch.context() as patch:
            patch.setitem(run_module.TRAININGS, "lora", full if folder else run_module.TRAININGS["lora"])
            run("x.yaml", (0,), ["lora_guided"], tmp_path / "a", **{**places, "keep": folder})
        again = json.loads(path.read_text())
        assert again["written"] == json.loads(path.with_suffix(".before").read_text())["written"]
        path.unlink()
    (tmp_path / "kept" / "lora-seed-0" / "lora.safetensors").write_text("cut")
    with pytest.raises(CalmError, match="the trained matrices of LoRA, but they cannot be read"):
        run("x.yaml", (0,), ["lora_guided"], tmp_path / "a", **places)
    other = dataclasses.replace(settings, methods=methods | {"words": dataclasses.replace(methods["words"], steps=1)})
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_settings", lambda path: other)
        with pytest.raises(CalmError, match="what words trains with these settings, but it was trained with"):
            run("x.yaml", (0,), ["shown"], tmp_path / "f", **places)
    (tmp_path / "kept" / "words-seed-0").rename(tmp_path / "kept" / "words-seed-1")
    with pytest.raises(CalmError, match="the composition of seed 1, but its m_A reads other examples"):
        run("x.yaml", (1,), ["shown"], tmp_path / "c", **places)
    other = dataclasses.replace(methods["words"], steps=1)
    assert dataclasses.replace(settings, methods=methods | {"words": other}).mark("shown") != settings.mark("shown")
    for wrong, message in (
        (Method("x", "composed", of="m_A"), "of: expected a composition with examples, but got m_A"),
        (Method("x", "composed", of="m_A", guidance=2.0), "x: expected the system of m_A and a guidance above 1"),
        (Method("x", "composed", of="words", guidance=1.0), "x: expected the system of words and a guidance above 1"),
        (Method("x", "composed", of="words", guidance=math.inf), "x: expected the system of words and a guidance"),
        (Method("x", "cascade", of="cascade", guidance=2.0), "expected what generates by itself, but got cascade"),
        (Method("x", "composed", of="words", steps=3, learning_rate=1.0), "nothing to train beside 'of'"),
    ):
        faults = dataclasses.replace(settings, methods=METHODS | {"x": wrong}).faults()
        assert any(message in fault for fault in faults)


def test_cells_of_other_data_or_models_are_not_taken_for_these(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calmlm.experiments.real import run as run_module

    monkeypatch.setattr(run_module, "load_settings", lambda path: TINY)
    monkeypatch.setattr(run_module, "open_pair", lambda *_: pair)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("these", "longer", "learned")}
    rows = sentences()
    learned = World(TINY, 0, rows).training[0]["eng_Latn"]
    files["these"].write_text("\n".join(json.dumps(row) for row in rows))
    files["longer"].write_text("\n".join(json.dumps({k: f"{v} more" for k, v in row.items()}) for row in rows))
    changed = [{**row, "xx_Latn": "y"} if row["eng_Latn"] == learned else row for row in rows]
    files["learned"].write_text("\n".join(json.dumps(row) for row in changed))
    output = tmp_path / "results"

    def go(name: str, wanted: list[str], **options: Any) -> dict[str, Any]:
        return run("x.yaml", (0,), wanted, output, data=files[name], report=lambda line: None, **options)

    go("these", ["m_B"])
    assert go("these", ["m_B"])["rows"].keys() == {"m_B"}
    for name in ("longer", "learned"):
        for wanted in (["m_B"], ["m_A", "m_B"]):  # all stored, and some missing
            with pytest.raises(ConfigError, match="the same sentences, but that of m_B, seed 0, was made of others"):
                go(name, wanted)
    place = cell_path(output, TINY, "m_B", 0)
    cell = json.loads(place.read_text())
    cell["models"]["augmenting"]["values"] = "others"
    place.write_text(json.dumps(cell))
    with pytest.raises(ConfigError, match="the same models, but that of m_B, seed 0, was made of others"):
        go("these", ["m_A"])
    other = json.loads(json.dumps(cell)) | {"sizes": {**cell["sizes"], "english": [1, 2, 3]}}
    cell_path(output, TINY, "m_A", 0).write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="the same sentences, but that of m_B, seed 0, was made of others"):
        go("these", ["m_A"], stored_only=True)  # of two that are stored
    del other["sentences"], other["models"]  # as earlier versions wrote them
    cell_path(output, TINY, "m_A", 0).write_text(json.dumps(other | {"sizes": cell["sizes"]}))
    assert go("these", ["m_A"], stored_only=True)["rows"].keys() == {"m_A", "m_B"}


@pytest.mark.slow
def test_every_system_makes_a_cell(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from calmlm.experiments.real import run as run_module

    monkeypatch.setattr(run_module, "load_settings", lambda path: TINY)
    monkeypatch.setattr(run_module, "open_pair", lambda *_: pair)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in sentences()))
    rows = ["cascade", "router", "ensemble"]
    result = run("x.yaml", (0,), rows, tmp_path, data=tmp_path / "data.jsonl", threads=1, report=lambda line: None)
    assert list(result["rows"]) == rows
    assert 0 < result["rows"]["ensemble"]["weight"] <= 1


@pytest.mark.slow
def test_a_row_that_fails_leaves_the_others(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from calmlm.experiments.real import run as run_module

    broken = dataclasses.replace(METHODS["words"], compose={"connections": "none", "words": "song"})
    settings = dataclasses.replace(TINY, methods={"words": broken, "m_B": METHODS["m_B"]})
    monkeypatch.setattr(run_module, "load_settings", lambda path: settings)
    monkeypatch.setattr(run_module, "open_pair", lambda *_: pair)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in sentences()))
    with pytest.raises(CalmError, match=r"2 failed: words, seed 0 \(words must be one of .*'song'.*others are stored"):
        run("x.yaml", (0, 1), None, tmp_path, data=tmp_path / "data.jsonl", report=lambda line: None)
    assert json.loads((tmp_path / "tiny.json").read_text())["rows"].keys() == {"m_B"}


def test_wrong_options_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command, file in (("real", "translation"), ("translation", "varieties")):
        config = str(ROOT / "configs" / "real" / f"{file}.yaml")
        assert main(["repro", command, "--config", config, "--rows", "nothing", "--output", str(tmp_path)]) == 2
        assert "Rows must be among" in capsys.readouterr().err


@pytest.mark.parametrize("composition", [True, False], ids=["composition", "model"])
def test_a_batch_in_parts_trains_as_a_whole_one(pair: Pair, world: World, composition: bool) -> None:
    """Parts of 1 to 7 labels: each label counts as much as in the whole batch."""
    found = []
    for rows_at_once in (None, 1):
        method = dataclasses.replace(
            METHODS["words" if composition else "full"], batch_size=4, rows_at_once=rows_at_once
        )
        made = train_composition(pair, method, world) if composition else fine_tuned(pair, method, world)
        found.append(made)
    whole, parts = (dict(made.model.named_parameters()) for made in found)
    start = composed(pair, METHODS["words"], world) if composition else pair.anchor
    before = dict(start.named_parameters())
    changed = [name for name, one in whole.items() if one.requires_grad and not torch.equal(one, before[name])]
    assert changed
    for name in changed:
        step, other = whole[name] - before[name], parts[name] - before[name]
        assert (step - other).norm() < 0.02 * step.norm(), name
