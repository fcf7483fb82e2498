"""Visual arithmetic: what its models may see, how pictures reach a batch, and a run from data to report."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from calmlm.cli import main
from calmlm.errors import ConfigError
from calmlm.experiments.fitting import preset_of
from calmlm.experiments.kv_arithmetic.world import final_answer
from calmlm.experiments.visual_arithmetic import run as run_module
from calmlm.experiments.visual_arithmetic.joined import VARIANTS, composition_examples, pictures_of
from calmlm.experiments.visual_arithmetic.measures import COLUMNS, columns, pipeline
from calmlm.experiments.visual_arithmetic.presets import PRESETS
from calmlm.experiments.visual_arithmetic.pretraining import build_visual_tokenizer, encode, new_encoder
from calmlm.experiments.visual_arithmetic.report import METHODS
from calmlm.experiments.visual_arithmetic.run import run
from calmlm.experiments.visual_arithmetic.world import IMAGE, Example, World

TINY = preset_of(PRESETS, "tiny", 3, 30)


@pytest.fixture(scope="module")
def world() -> World:
    return World(TINY, 0)


def pairs(world: World, examples: list[Example]) -> set[tuple[int, int]]:
    found = set()
    for example in examples:
        values = [int(number) for number in re.findall(r"\d+", example.completion.split("=")[0])]
        if len(values) == 2:
            found.add((values[0], values[1]))
    return found


def test_nothing_is_trained_on_what_is_asked(world: World) -> None:
    trained = composition_examples(world)
    asked = columns(world)
    seen = {picture for example in trained for picture in example.pictures}
    assert seen <= set(world.digits.composition) <= set(world.digits.training)
    for name, examples in asked.items():
        assert not {picture for example in examples for picture in example.pictures} & set(world.digits.training), name
    with_pictures = [example for example in trained if example.pictures]
    assert not pairs(world, with_pictures) & set(world.unseen_pairs)
    assert pairs(world, asked["images_pairs"]) <= set(world.unseen_pairs)
    assert len(world.unseen_pairs) == TINY.unseen_pairs
    for place in (0, 1):
        assert {pair[place] for pair in world.pairs} == set(range(10))


def test_pictures_show_what_the_answer_says(world: World) -> None:
    for example in columns(world)["images"]:
        assert example.prompt.count(IMAGE) == len(example.pictures)
        first = int(re.match(r"\d+", example.completion)[0])  # type: ignore[index]
        assert world.digits.shown[example.pictures[0]] == first


def test_the_same_seed_gives_the_same_world(world: World) -> None:
    again, other = World(TINY, 0), World(TINY, 1)
    assert columns(again) == columns(world)
    assert columns(other) != columns(world)


def test_pictures_stand_at_their_tokens(world: World) -> None:
    tokenizer = build_visual_tokenizer()
    examples = [columns(world)["ood_hard"][0], world.numeric(world.rng("x")), columns(world)["naming"][0]]
    batch = tokenizer([example.prompt for example in examples], padding=True, return_tensors="pt")
    token = tokenizer.convert_tokens_to_ids(IMAGE)
    given = pictures_of(world.digits, [example.pictures for example in examples], batch.input_ids, token)["eyes"]
    assert given["pixel_values"].shape == (9, 1, 8, 8)
    assert given["at"].shape == (3, 3)
    for row, example in enumerate(examples):
        for item, picture in enumerate(example.pictures):
            assert batch.input_ids[row, given["at"][row, item]] == token
            assert torch.equal(given["pixel_values"][3 * row + item], world.digits.pixels[picture])
        assert (given["at"][row, len(example.pictures) :] == -1).all()


def test_the_pipeline_pastes_what_the_encoder_sees(world: World) -> None:
    encoder = new_encoder(world, 0).eval()
    with torch.no_grad():
        encoder.classifier.weight.zero_()
        encoder.classifier.bias[7] = 1
    asked = pipeline(encoder, lambda examples: [example.prompt for example in examples], world)
    example = columns(world)["images"][0]
    assert asked([example]) == [example.prompt.replace(IMAGE, "7")]


def test_rows_are_learned_at_their_completions_alone(world: World) -> None:
    tokenizer = build_visual_tokenizer()
    example = columns(world)["images"][0]
    row = encode([example], tokenizer)[0]
    learned = [index for index in row["labels"] if index != -100]
    assert learned[-1] == tokenizer.eos_token_id
    assert final_answer(tokenizer.decode(learned[:-1])) == final_answer(example.completion)


def test_a_run_reports_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = dataclasses.replace(PRESETS["tiny"], encoder_size=(16, 4, 2), anchor_size=(16, 3, 2), heads=2)
    monkeypatch.setitem(PRESETS, "tiny", narrow)
    places = {"output": tmp_path / "results", "cache": tmp_path / "cache", "max_steps": 2, "items": 3}
    result = run("tiny", (0,), report=lambda line: None, command="calmlm repro visual-arithmetic", **places)
    written = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert {row["method"] for row in written["rows"]} == set(METHODS)
    assert {(row["method"], row["column"]) for row in written["rows"]} >= {(v, c) for v in VARIANTS for c in COLUMNS}
    page = (tmp_path / "results" / "tiny.md").read_text()
    assert "| As composed, connector `legonn` |" in page
    assert result["footer"] in page

    def fail(*_: object) -> None:
        raise AssertionError("a stored stage was repeated")

    for name in ("train_encoder", "train_anchor", "train_composition", "score"):
        monkeypatch.setattr(run_module, name, fail)
    again = run("tiny", (0,), report=lambda line: None, command="calmlm repro visual-arithmetic", **places)
    assert again["rows"] == result["rows"]


def test_unknown_presets_and_seeds_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="one of tiny, small"):
        preset_of(PRESETS, "huge")
    assert main(["repro", "visual-arithmetic", "--preset", "tiny", "--seeds", "one"]) == 2
    assert "Expected seeds as whole numbers" in capsys.readouterr().err
