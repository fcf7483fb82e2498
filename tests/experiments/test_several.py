"""Several augmenting models at once: facts, the model that learns them, and a run from data to report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import calmlm
from calmlm.cli import main
from calmlm.errors import DataError
from calmlm.experiments.fitting import Stage
from calmlm.experiments.real.joined import Pair, open_trained
from calmlm.experiments.real.layout import AUGMENTING
from calmlm.experiments.real.systems import Alone
from calmlm.experiments.several import run as run_module
from calmlm.experiments.several.facts import Specialist, facts, taught
from calmlm.experiments.several.run import Preset, run
from compositions import logits_of
from experiments.test_real import TINY, VARIETIES, sentences
from pairs import tiny_pair
from tiny import tiny_tokens

PRESET = Preset(
    facts=6, shown=3, plain=4, items=2, english=2,
    specialist=Specialist(hidden=64, layers=2, training=Stage(150, 6, 3e-3)),
    training=Stage(2, 2, 1e-3, 0.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny_pair()


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    """A saved composition that has learned nothing."""
    model = calmlm.compose(
        pair.anchor, {AUGMENTING: pair.augmenting}, connections="none", words="pointer", tokenizer=pair.tokenizer,
        augmenting_tokenizer={AUGMENTING: pair.augmenting_tokenizer}, augmenting_prefix="the river",
    )  # fmt: skip
    model.save_pretrained(tmp_path / "translates")
    return tmp_path / "translates"


def test_facts_are_drawn_by_their_seed() -> None:
    found = facts(50, 1)
    assert found == facts(50, 1)
    assert found != facts(50, 2)
    assert len({item.prompt for item in found}) == 50
    assert all(item.other != item.prompt and len(item.target) == 4 for item in found)


def test_the_small_model_learns_them(pair: Pair) -> None:
    known = facts(6, 0)
    model = taught(known, pair.tokenizer, pair.anchor.config.vocab_size, PRESET.specialist, 0)
    said = Alone(model, pair.tokenizer).write(known, 12)
    assert all(text.strip().startswith(item.target) for text, item in zip(said, known, strict=True))


def test_how_m_a_writes_is_made_where_it_is_missing(folder: Path, pair: Pair) -> None:
    ids = tiny_tokens(1, 5)
    expected = logits_of(open_trained(folder, pair), ids)
    (place,) = folder.glob("*alignment*")
    place.unlink()
    assert torch.equal(logits_of(open_trained(folder, pair), ids), expected)
    assert not list(folder.glob("*alignment*"))


def test_a_run_writes_its_report(folder: Path, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(TINY, shown=VARIETIES.inside)
    monkeypatch.setattr(run_module, "load_settings", lambda _: settings)
    monkeypatch.setattr(run_module, "open_pair", lambda *_: pair)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in sentences()))
    result = run(folder, tmp_path / "out", data=data, preset=PRESET, command="a test", report=lambda line: None)
    rows = result["rows"]
    assert list(rows) == ["m_B", "reads", "learned", "translates", "knows", "both"]
    assert rows["learned"]["right"] == 1
    assert rows["translates"]["translation_against_m_B"]["mean"] == pytest.approx(0, abs=1e-6)  # its gate is shut
    assert rows["both"]["facts_against_own"]["mean"] == pytest.approx(0, abs=1e-4)
    assert rows["knows"]["facts"]["mean"] != rows["m_B"]["facts"]["mean"]
    page = (tmp_path / "out" / "several.md").read_text()
    assert "`a test`" in page
    assert json.loads((tmp_path / "out" / "several.json").read_text())["rows"].keys() == rows.keys()
    with pytest.raises(DataError, match=r"^Expected fewer facts in D_C"):
        run(folder, tmp_path, data=data, preset=dataclasses.replace(PRESET, shown=6), report=lambda line: None)


def test_models_that_are_missing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    arguments = ["--models", str(tmp_path), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(["repro", "several", *arguments]) != 0
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "Traceback" not in told
    assert not list((tmp_path / "out").glob("*"))
