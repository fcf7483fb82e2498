"""What hours of training have made is written, whatever fails beside it, and wherever there is room."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, TrainerCallback

import calmlm
from calmlm.errors import CalmError, ConfigError
from calmlm.training import pipeline
from calmlm.training.pipeline import train
from calmlm.training.schema import parse_config
from training.callbacks import join

Settings = Callable[..., dict[str, Any]]


def at_the_end(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Let something happen when the last step is done."""

    class Happens(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            act()

    join(Happens(), pipeline, monkeypatch)


def refuse(*args: Any, **kwargs: Any) -> None:
    raise TypeError("Object of type set is not JSON serializable")


@pytest.mark.parametrize("backend", ["sft", "trainer"])
def test_a_tokenizer_that_cannot_be_written_loses_no_weights(
    backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_end(monkeypatch, lambda: monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse))
    lines: list[str] = []
    result = train(parse_config(settings(backend, max_steps=2)), report=lines.append)
    assert calmlm.CalmForCausalLM.from_pretrained(result.composition)
    assert lines[-1].startswith("The tokenizer could not be saved beside the composition (Object of type set is not")
    assert not list(result.composition.glob("tokenizer*"))


def test_it_is_found_before_the_first_checkpoint(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings(max_steps=2)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"^tokenizer: expected one that can be saved .*not JSON serializable"):
        train(parse_config(values), report=lambda line: None)
    assert not Path(values["output"]).exists()
    values["trainer"]["save_strategy"] = "no"
    assert train(parse_config(values), report=lambda line: None).composition.is_dir()


def test_a_configuration_that_cannot_be_written_is_found_first(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    compose = calmlm.compose

    def odd(*args: Any, **kwargs: Any) -> Any:
        model = compose(*args, **kwargs)
        model.config.text_config.odd = {1, 2}
        return model

    monkeypatch.setattr(calmlm, "compose", odd)
    values = settings(max_steps=2)
    with pytest.raises(ConfigError, match=r"^model: expected models whose configuration can be saved"):
        train(parse_config(values), report=lambda line: None)
    assert not Path(values["output"]).exists()


def test_settings_for_generation_that_contradict_each_other_are_saved(settings: Settings, tmp_path: Path) -> None:
    """transformers refuses to save them with a model of its own."""
    values = settings(max_steps=2, save_steps=1)
    shutil.copytree(values["model"]["anchor"], tmp_path / "anchor")
    given = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "num_beams": 1, "early_stopping": True}
    (tmp_path / "anchor" / "generation_config.json").write_text(json.dumps(given), encoding="utf-8")
    values["model"]["anchor"] = str(tmp_path / "anchor")
    result = train(parse_config(values), report=lambda line: None)
    found = json.loads((result.composition / "generation_config.json").read_text(encoding="utf-8"))
    assert found["temperature"] == 0.6 and found["do_sample"] is False
    assert calmlm.CalmForCausalLM.from_pretrained(result.composition)


def test_an_output_that_has_vanished_is_made_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings(max_steps=2)
    at_the_end(monkeypatch, lambda: shutil.rmtree(values["output"]))
    result = train(parse_config(values), report=lambda line: None)
    assert calmlm.CalmForCausalLM.from_pretrained(result.composition)
    # Others may read it, as what stood there before.
    assert result.composition.stat().st_mode == result.composition.parent.stat().st_mode


def test_an_output_that_cannot_be_written_any_more_has_a_second_place(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = settings(max_steps=2)

    def block() -> None:
        shutil.rmtree(values["output"])
        Path(values["output"]).write_text("")

    at_the_end(monkeypatch, block)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises(CalmError, match=r"^Expected to save the composition in .*, so it lies in .*: move") as caught:
        train(parse_config(values), report=lambda line: None)
    place = Path(str(caught.value).split("so it lies in ")[1].removesuffix(": move it."))
    assert place.is_relative_to(tmp_path / "elsewhere")
    model = calmlm.CalmForCausalLM.from_pretrained(place)
    assert model.get_nb_trainable_parameters()[0] and (place / "tokenizer.json").is_file()
