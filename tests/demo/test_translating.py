"""The demonstration with two real models: what it needs, what each of the three writes, and what is printed."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from calmlm.cli import main
from calmlm.demo import TRANSLATION, translating
from calmlm.demo.translating import FILES, sentences, show
from calmlm.experiments.real.joined import Pair, composed, save_trained
from calmlm.experiments.real.presets import BaseModel, Method, Settings, Varieties
from calmlm.experiments.real.world import World, asked
from calmlm.training.schema import load_config
from documents import ROOT
from pairs import tiny_pair

METHOD = Method(
    "Words",
    "composed",
    examples=True,
    compose={"connections": "none", "words": "pointer"},
    steps=1,
    learning_rate=1.0,
)
SETTINGS = Settings(
    "tiny", BaseModel("some/anchor"), BaseModel("some/augmenting"), "data", Varieties(["xx_Latn"], []),
    {"words": METHOD}, pairs=4, plain=2, shots=2, plain_lines=8, test=4, development=4, items=2, weighed=2,
    english_items=2, written=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny_pair()


@pytest.fixture
def ready(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models, with a composition of tiny ones in the place of the shipped one."""
    rows = [{"eng_Latn": f"the river {n} reads", "xx_Latn": f"x {n} revir"} for n in range(30)]
    model = composed(pair, METHOD, World(SETTINGS, 0, rows))
    with torch.no_grad():
        model.model.connectors["augmenting"][-1].opening.fill_(0.5)
        model.model.connectors["augmenting"][-1].gate_bias.fill_(4.0)
    save_trained(model, tmp_path / "demo" / "composition", SETTINGS, "calmlm repro translation")
    lines = [json.dumps({"language": "X", "source": s, "english": "the river"}) for s in ("x [1] revir", "x 2")]
    (tmp_path / "demo" / "sentences.jsonl").write_text("\n".join(lines))
    for file in FILES.values():
        (tmp_path / "models" / file).parent.mkdir(parents=True)
        (tmp_path / "models" / file).touch()
    monkeypatch.setattr(translating, "TRANSLATION", tmp_path / "demo")
    monkeypatch.setattr(translating, "open_pair", lambda *_: pair)
    return tmp_path / "models"


def test_a_saved_composition_names_its_bases_and_its_command(ready: Path) -> None:
    folder = ready.parent / "demo" / "composition"
    config = json.loads((folder / "config.json").read_text())
    assert config["anchor"]["id"] == "some/anchor"
    assert config["augmenting"]["augmenting"]["id"] == "some/augmenting"
    assert json.loads((folder / "origin.json").read_text())["command"] == "calmlm repro translation"


def test_all_three_write_what_they_would_write_alone(ready: Path, pair: Pair) -> None:
    found = translating.speakers(ready)
    source = "x [1] revir"
    heard: dict[str, list[str]] = {name: [] for name in found}
    written = {name: one.translate(source, heard[name].append) for name, one in found.items()}
    assert all(texts[-1] == written[name] for name, texts in heard.items())

    def greedy(model: Any, tokens: Any, text: str) -> str:
        ids = tokens(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        return str(tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip().split("\n")[0].strip()

    before = found["m_A"].before
    assert before == found["m_B"].before
    assert before.count("\nEnglish: the river") == 2
    assert written["m_A"] == greedy(pair.augmenting, pair.augmenting_tokenizer, before + asked(source))
    with found["composition"].model.disable_composition():
        assert written["m_B"] == greedy(found["composition"].model, pair.tokenizer, before + asked(source))
    assert written["composition"] == greedy(found["composition"].model, pair.tokenizer, asked(source))
    assert written["composition"] != written["m_B"]


def test_what_is_printed(ready: Path) -> None:
    text = StringIO()
    answers = show(ready, Console(file=text, width=200))
    printed = text.getvalue()
    assert len(answers) == 2
    assert "X: x [1] revir" in printed  # nothing of a text is taken for markup
    for answer in answers:
        assert answer.keys() == {"m_B", "m_A", "composition"}


def test_missing_models_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "translation", "--models", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: Expected two models in {tmp_path}, but there is no ")
    assert "run scripts/models first" in message
    assert main(["demo", "songs"]) == 2
    assert "Expected keys or translation, but got 'songs'" in capsys.readouterr().err


def test_ten_sentences_in_six_varieties_of_which_none_is_shown_before() -> None:
    found = sentences()
    shown = load_config(ROOT / "configs" / "real" / "train.yaml").model.augmenting_prefix
    assert isinstance(shown, str)
    assert not any(sentence.source in shown or sentence.english in shown for sentence in found)
    assert len(found) == 10
    assert len({sentence.language for sentence in found}) == 6


@pytest.mark.skipif(not (TRANSLATION / "composition").exists(), reason="this checkout has no trained composition")
def test_what_ships_is_small_and_names_no_machine() -> None:
    folder = TRANSLATION / "composition"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 15e6
    for path in folder.glob("*.json"):
        assert '"/' not in path.read_text()
    assert json.loads((folder / "origin.json").read_text())["command"].startswith("calmlm repro translation")
