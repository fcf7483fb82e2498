"""A stage on plain text before the data is a run of its own before the run, and is done once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from calmlm.errors import ConfigError, DataError
from calmlm.training import align_stage, pipeline
from calmlm.training.pipeline import train
from calmlm.training.schema import parse_config
from tiny import tiny_model
from training.callbacks import interrupt_at

BACKENDS = ["sft", "trainer"]
LINES = [f"{number}+{number + 1}={2 * number + 1} is a sum" for number in range(12)]
Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def staged(settings: Settings, tmp_path: Path) -> Settings:
    """Values of a run with a stage of seven steps before it."""
    text = tmp_path / "plain.txt"
    text.write_text("\n\n".join(LINES), encoding="utf-8")

    def make(backend: str = "sft", **trainer: Any) -> dict[str, Any]:
        stage = {"text": str(text), "trainer": {"max_steps": 7, "learning_rate": 0.02}}
        return settings(backend, max_steps=8, **trainer) | {"align": stage}

    return make


def go(values: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    found = train(parse_config(values), report=lambda line: None, **options)
    return load_file(found.composition / "model.safetensors")


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_equals_two_runs(backend: str, staged: Settings, tmp_path: Path) -> None:
    values = staged(backend)
    found = go(values)
    data = tmp_path / "plain.jsonl"
    data.write_text("\n".join(json.dumps({"text": line}) for line in LINES), encoding="utf-8")
    first = {key: value for key, value in values.items() if key != "align"}
    first["trainer"] = values["trainer"] | values["align"]["trainer"]
    first |= {"output": str(tmp_path / "first"), "data": {"train": str(data), "loss_on": "all"}}
    aligned = go(first)
    second = {key: value for key, value in values.items() if key != "align"}
    second |= {"output": str(tmp_path / "second"), "model": {"composition": str(tmp_path / "first" / "composition")}}
    expected = go(second)
    kept = load_file(Path(values["output"]) / "align" / "composition" / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(kept[name], aligned[name], atol=1e-6, rtol=1e-5)
        assert not torch.equal(found[name], aligned[name])


@pytest.mark.parametrize(("module", "step"), [(align_stage, 6), (align_stage, 2), (pipeline, 3), (pipeline, 6)])
def test_it_goes_on_where_it_stopped(module: Any, step: int, staged: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = staged(warmup_steps=0)
    whole = go(values | {"output": values["output"] + "-whole"})
    with monkeypatch.context() as patch:
        interrupt_at(step, module, patch)
        with pytest.raises(KeyboardInterrupt):
            go(values)
    lines: list[str] = []
    train(parse_config(values), resume=True, report=lines.append)
    assert any(line.startswith("The stage on plain text is done") for line in lines) == (
        module is pipeline and step == 3
    ), "with a checkpoint of the run, nothing is said of the stage; with none, it is read again"
    found = load_file(Path(values["output"]) / "composition" / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_plain_text_of_the_model_is_its_text(staged: Settings) -> None:
    values = staged()
    expected = go(values)
    text = values["align"].pop("text")
    values["model"]["plain_text"] = text
    found = go(values | {"output": values["output"] + "-2"})
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    config = yaml.safe_load((Path(values["output"] + "-2") / "config.yaml").read_text())
    assert config["align"]["trainer"]["max_steps"] == 7


def test_what_belongs_to_the_run_alone_stays_there(staged: Settings) -> None:
    values = staged(eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, save_steps=4)
    values["data"]["eval"] = values["data"]["train"]
    assert go(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"align": {"trainer": {"max_steps": 2}}}, r"align\.text: expected a file of plain text"),
        (
            {"align": {"text": "a.txt", "trainer": {"max_stepz": 2}}},
            "'max_stepz' is no key in 'align.trainer'; did you mean 'max_steps'",
        ),
        ({"align": {"text": "a.txt", "trainer": {"max_steps": "two"}}}, r"align\.trainer\.max_steps: expected"),
        ({"align": {"text": "a.txt", "steps": 2}}, "'steps' is no key in 'align'"),
        ({"align": 3}, "align: expected"),
        ({"align": {"text": ""}}, r"align\.text: expected a file of plain text"),
        ({"align": {"text": "a.txt", "trainer": {"bf16": True}}}, r"align\.trainer\.bf16: .*holds for the whole run"),
        ({"align": {"text": "a.txt", "trainer": {"pad_token": "b"}}}, r"align\.trainer\.pad_token"),
    ],
)
def test_faults_are_named(change: dict[str, Any], match: str, settings: Settings) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_config(settings() | change)


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"align": {"text": "none.txt"}}, DataError, r"none\.txt"),
        ({"align": {"trainer": {"lr_scheduler_type": "zzz"}}}, ConfigError, r"align\.trainer"),
        ({"model": {"refresh": False}}, ConfigError, "align: expected augmenting models that read all of a text"),
        ({"trainer": {"fsdp": "full_shard"}}, ConfigError, "fsdp|align: expected a model"),
    ],
)
def test_nothing_is_written_before_it_can_begin(
    change: dict[str, Any], kind: type[Exception], match: str, staged: Settings
) -> None:
    values = staged()
    for part, changed in change.items():
        values[part] = values[part] | changed
    with pytest.raises(kind, match=match):
        go(values)
    assert not Path(values["output"]).exists()


# What an earlier run has left


def stopped(values: dict[str, Any], module: Any, step: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(step, module, patch)
        with pytest.raises(KeyboardInterrupt):
            go(values, **options)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(found[name], tensor, atol=1e-6, rtol=1e-5) for name, tensor in expected.items())


def test_a_stage_of_an_overwritten_run_is_gone(staged: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = staged()
    go(values)
    values["align"]["trainer"]["learning_rate"] = 0.001
    expected = go(values | {"output": values["output"] + "-whole"})
    stopped(values, align_stage, 6, monkeypatch, overwrite=True)
    assert equal(go(values, resume=True), expected)
    without = {key: value for key, value in values.items() if key != "align"}
    go(without, overwrite=True)
    assert not (Path(values["output"]) / "align").exists()


@pytest.mark.parametrize(("module", "step"), [(pipeline, 3), (align_stage, 6)], ids=["behind it", "in it"])
def test_a_stage_of_another_composition_is_not_gone_on_from(
    module: Any, step: int, staged: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = staged()
    stopped(values, module, step, monkeypatch)
    for change in ({"connections": [[0, 0]]}, {"augmenting": str(tmp_path / "other")}):
        tiny_model("gpt2", seed=77).save_pretrained(tmp_path / "other")
        with pytest.raises(ConfigError, match="--resume: expected the composition"):
            go(values | {"model": values["model"] | change}, resume=True)
    lines: list[str] = []
    values["data"]["max_length"] = 9
    train(parse_config(values), resume=True, report=lines.append)
    assert any("begun with other settings: data.max_length" in line for line in lines)


def test_no_step_too_many(staged: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = staged(lr_scheduler_type="constant")
    values["align"]["trainer"]["max_steps"] = 5
    expected = go(values | {"output": values["output"] + "-whole"})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(align_stage, "save_result", killed)
        with pytest.raises(KeyboardInterrupt):
            go(values)
    assert equal(go(values, resume=True), expected)


def test_without_its_optimizer_it_is_not_gone_on_with(staged: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = staged(save_only_model=True)
    stopped(values, align_stage, 6, monkeypatch)
    with pytest.raises(ConfigError, match=r"optimizer\.pt"):
        go(values, resume=True)


@pytest.mark.parametrize(
    "trainer",
    [{"save_strategy": "best", "metric_for_best_model": "loss"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}],
)
def test_arguments_that_need_evaluation_are_the_runs_alone(trainer: dict[str, Any], staged: Settings) -> None:
    values = staged(eval_strategy="steps", eval_steps=4, **trainer)
    values["data"]["eval"] = values["data"]["train"]
    assert go(values)


def test_epochs_win_over_the_steps_of_the_run(staged: Settings) -> None:
    values = staged(save_steps=1)
    values["align"]["trainer"] = {"num_train_epochs": 1, "save_total_limit": 9}
    go(values)
    names = {path.name for path in (Path(values["output"]) / "align" / "checkpoints").iterdir()}
    assert names == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}, "twelve texts, four at a time"
