"""What a run shows: tokens a second, reporters by name, curves, and the keys of its file."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from calmlm.cli import main
from calmlm.connectors.gate import ConvexGate
from calmlm.data.sources import HubDataset
from calmlm.errors import CalmError, ConfigError
from calmlm.training import curves, schema
from calmlm.training.cache_settings import CacheConfig
from calmlm.training.mean_gates import GATE, MeanGates
from calmlm.training.pipeline import train
from calmlm.training.run_folder import RunFolder
from calmlm.training.schema import parse_config
from calmlm.training.schema_page import PARTS, sections, show_schema
from compositions import tiny_composition
from tiny import tiny_tokenizer

BACKENDS = ["sft", "trainer"]
Settings = Callable[..., dict[str, Any]]
PNG = b"\x89PNG"

TRACKIO = """
import json
from contextvars import ContextVar
from types import SimpleNamespace
__version__ = "0.22"
context_vars = SimpleNamespace(current_space_id=ContextVar("space", default=None))
class Config(dict):
    def update(self, other, allow_val_change=False): dict.update(self, other)
config, heard = Config(), []
def init(**options): heard.append({"init": {key: options[key] for key in ("project", "name")}})
def log(values, **options): heard.append({"log": values})
def finish(): heard.append({"finish": True})
"""


def history(run: RunFolder) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run.last_checkpoint() / "trainer_state.json").read_text())["log_history"]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_shows_speed_losses_and_gates(
    backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(str(tmp_path))
    values = settings(backend, max_steps=6, save_steps=6, logging_steps=2, report_to=["trackio"], eval_strategy="epoch")
    values["data"]["eval"] = values["data"]["train"]
    values["model"] |= {"words": "pointer", "connections": "none"}
    run = RunFolder(train(parse_config(values), report=lambda line: None).composition.parent)
    logged = [entry for entry in history(run) if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    assert all(entry["train_tokens_per_second"] > 0 for entry in logged)
    gates = [entry[f"{GATE}augmenting/pointer"] for entry in logged]
    assert gates[0] < gates[-1] < 1 and gates[-1] > 0
    assert (run.path / "loss.png").read_bytes().startswith(PNG)
    assert (run.path / "gates.png").read_bytes().startswith(PNG)
    heard = sys.modules.pop("trackio").heard
    assert heard[0] == {"init": {"project": "calmlm", "name": "run"}} and heard[-1] == {"finish": True}
    assert {"train/loss", f"train/{GATE}augmenting/pointer"} <= {name for part in heard for name in part.get("log", {})}


def test_without_gates_or_matplotlib(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(train(parse_config(settings(max_steps=2, logging_steps=1))).composition.parent)
    assert (run.path / "loss.png").is_file() and not (run.path / "gates.png").exists()
    (run.path / "loss.png").unlink()
    lines: list[str] = []
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    curves.draw_curves([{"loss": 1.0, "step": 1}], run, lines.append)
    assert lines == ["loss.png and gates.png need the package 'matplotlib': pip install 'calmlm[train]'."]
    monkeypatch.undo()
    curves.draw_curves([{"loss": "no number", "step": 1}, {"loss": 2.0, "step": object()}], run, lines.append)
    assert lines[-1].startswith("The curves could not be drawn (") and not list(run.path.glob("*.png"))


@pytest.mark.parametrize("kind", ["graft", "words"])
def test_mean_gates_are_those_of_the_formula(kind: str) -> None:
    """Against the gates that are recorded one by one, over the positions that are no padding."""
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "augmenting_tokenizer": tiny_tokenizer()}
    options |= {"connector": "graft", "connections": [[1, 1]], "init": "aligned"}
    options |= {"plain_text": [f"a fox jumps over {number} lazy dogs" for number in range(9)]}
    model = tiny_composition(**(options if kind == "graft" else {"words": "map"}))
    (gate,) = (module for module in model.modules() if isinstance(module, ConvexGate))
    with torch.no_grad():
        gate.opening.fill_(0.004)  # open to 0.4
        gate.gate_anchor.normal_()
    seen: list[torch.Tensor] = []
    inner = type(gate).gate

    def gate_of(self: Any, anchor: Any, augmenting: Any) -> Any:
        found = inner(self, anchor, augmenting)
        seen.append(found)
        return found

    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    means = MeanGates(model)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(gate), "gate", gate_of)
        with means.watching(mask):
            model(ids, attention_mask=mask)
    assert gate.observe is None
    expected = 0.4 * seen[0][..., 0].sigmoid()[mask.bool()].mean().item()
    (found,) = means.take_means(torch.device("cpu"), together=False).values()
    assert found == pytest.approx(expected, rel=1e-5)
    assert means.take_means(torch.device("cpu"), together=False) == {}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["wandb"],
            r"^trainer.report_to: expected the package of 'wandb', but it is not installed; .*pip install wandb",
        ),
        (["tensorboard", "trakio"], r"^trainer.report_to: expected names among .*trackio.*, but got 'trakio'"),
    ],
)
def test_reporters_that_are_not_there(names: list[str], message: str, settings: Settings) -> None:
    """Found before any model is looked for."""
    values = settings(report_to=names)
    values["model"]["anchor"] = "no/such-model"
    with pytest.raises(ConfigError, match=message):
        train(parse_config(values))


def test_weights_and_biases_hears_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from calmlm.training.named_reporters import project_named

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with project_named(SimpleNamespace(project="mine")):
        assert os.environ["WANDB_PROJECT"] == "mine"
    assert "WANDB_PROJECT" not in os.environ
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    with project_named(SimpleNamespace(project="mine")):
        assert os.environ["WANDB_PROJECT"] == "theirs"


def test_the_page_shows_every_key() -> None:
    others = {"HubDataset": HubDataset, "CacheConfig": CacheConfig}
    shown = {section.place: section for section in sections()}
    for place, name in PARTS.items():
        cls = others.get(name) or getattr(schema, name)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        keys = {key.name: key for key in shown[place].keys}
        assert keys.keys() == fields.keys()
        for key, field in fields.items():
            assert keys[key].meaning and keys[key].kind
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            assert (keys[key].default is None) == required
    hints = " ".join(str(hint) for hint in typing.get_type_hints(schema.TrainingConfig).values())
    assert set(re.findall(r"\w+Config", hints)) <= set(PARTS.values()), "every section has its part"
    stream = io.StringIO()
    show_schema(Console(file=stream, width=200))
    for line in ("sft or trainer", "bfloat16 or int8", "completion or all", "true or false", "required"):
        assert line in stream.getvalue()


def test_help_shows_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--resume" in shown and "activation_cache" in shown and "on_missing" in shown


def test_faults_of_several_sections_are_named_at_once(settings: Settings) -> None:
    values = settings(gradient_accumulation_steps=0)
    values["data"]["train"] = "none.jsonl"
    Path(values["output"]).write_text("")
    with pytest.raises(CalmError) as caught:
        train(parse_config(values))
    for part in ("has 3 faults", "is a file", "gradient_accumulation_steps", "none.jsonl"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {
                "output": "x",
                "model": {"anchor": 1, "augmenting": "a", "connector": {"rnk": 2}},
                "data": {"train": "t", "max_length": 1},
                "trainer": {"learning_rat": 1},
                "retain": {"text": "t", "weight": -1, "line": 3},
                "activation_cache": {"mode": "disk", "budget": "much", "x": 1},
            }
        )
    message = str(caught.value)
    for part in ("anchor", "rnk", "max_length", "learning_rat", "retain.weight", "'line'", "budget", "'x'", "8 faults"):
        assert part in message


def test_a_reporter_that_cannot_write_ends_alone(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import TensorBoardCallback

    calls: list[str] = []

    def full(*_: Any, **__: Any) -> None:
        calls.append("log")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardCallback, "on_log", full)
    values = settings("trainer", max_steps=3, logging_steps=1)
    with pytest.warns(UserWarning, match=r"TensorBoardCallback ends here, because it cannot write \(.*No space left"):
        result = train(parse_config(values), report=lambda line: None)
    assert (result.composition / "model.safetensors").is_file()
    assert calls == ["log"]
