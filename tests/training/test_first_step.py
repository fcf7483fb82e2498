"""A run writes nothing before its first step is done; then it has everything that it would have had."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainingArguments

from calmlm.errors import ConfigError
from calmlm.training import pipeline
from calmlm.training.pipeline import train
from calmlm.training.run_folder import RunFolder
from calmlm.training.schema import parse_config

BACKENDS = ["sft", "trainer"]
Settings = Callable[..., dict[str, Any]]


def go(values: dict[str, Any], **options: Any) -> Path:
    return train(parse_config(values), report=lambda line: None, **options).composition


class At(TrainerCallback):
    """Calls a function at one event of the trainer's."""

    def __init__(self, event: str, then: Callable[..., None]) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: then())


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., None]], None]:
    """Arrange for a function to be called at an event of the next runs."""

    def arrange(event: str, then: Callable[..., None]) -> None:
        make = pipeline.make_trainer

        def made(*args: Any) -> Any:
            trainer = make(*args)
            trainer.add_callback(At(event, then))
            return trainer

        monkeypatch.setattr(pipeline, "make_trainer", made)

    return arrange


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("out of memory"), ConfigError)]
)
def test_a_first_step_that_fails_leaves_nothing(
    error: BaseException, raised: type[BaseException], backend: str, settings: Settings, at: Any
) -> None:
    def fail() -> None:
        raise error

    values = settings(backend, max_steps=2, save_steps=1, report_to="tensorboard")
    before = snapshot(go(values).parent)
    at("on_pre_optimizer_step", fail)
    with pytest.raises(raised, match="out of memory" if raised is ConfigError else None):
        go(values, overwrite=True)
    assert snapshot(RunFolder(values["output"]).path) == before
    elsewhere = Path(values["output"] + "-2") / "deep" / "run"
    with pytest.raises(raised):
        go(values | {"output": str(elsewhere)})
    assert not elsewhere.parent.parent.exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_step_that_fails_is_a_fault_of_its_own(backend: str, settings: Settings, at: Any) -> None:
    """What stood the first step is no matter of settings: its traceback is wanted, and the checkpoints stay."""
    steps: list[int] = []

    def fail() -> None:
        steps.append(0)
        if len(steps) == 3:
            raise RuntimeError("out of memory")

    at("on_step_begin", fail)
    values = settings(backend, max_steps=5, save_steps=1)
    with pytest.raises(RuntimeError, match="^out of memory$"):
        go(values)
    run = RunFolder(values["output"])
    assert run.config.is_file()
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-2"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_logged_before_is_not_lost(backend: str, settings: Settings) -> None:
    values = settings(backend, max_steps=3, eval_on_start=True, logging_steps=1, report_to="tensorboard")
    values["data"]["eval"] = values["data"]["train"]
    run = RunFolder(go(values).parent)
    events = EventAccumulator(str(run.logs))
    events.Reload()
    assert events.Scalars("eval/loss")[0].step == 0
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert {"args/text_summary", "model_config/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_left_to_train_by_epochs(backend: str, settings: Settings) -> None:
    """No step is made, but the settings and the composition are written."""
    values = settings(backend, num_train_epochs=1, save_strategy="epoch")
    run = RunFolder(go(values).parent)
    before = snapshot(run.composition)
    values["trainer"]["run_name"] = "again"
    go(values, resume=True)
    assert "again" in run.config.read_text()
    assert snapshot(run.composition) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_that_a_signal_asks_for(backend: str, settings: Settings, at: Any) -> None:
    """Before the first step is done: the run can be gone on with."""
    values = settings(backend, max_steps=3)

    def asked() -> None:
        raise SystemExit(signal.SIGTERM)

    made: list[Any] = []
    make = pipeline.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_trainer", lambda *args: made.append(make(*args)) or made[-1])
        at("on_step_begin", lambda: (made[-1]._save_checkpoint(made[-1].model, trial=None), asked()))
        with pytest.raises(SystemExit):
            go(values)
    run = RunFolder(values["output"])
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-0"
    assert go(values, resume=True) == run.composition


@pytest.mark.parametrize("connector", ["cross_attention", "flamingo", "legonn"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_overflows_are_looked_for(
    backend: str, connector: str, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' tool takes every tensor that a module is given by position for numbers."""
    values = settings(backend, max_steps=2, debug="underflow_overflow")
    values["model"]["connector"] = {"kind": connector, "null_key": True}
    assert go(values).is_dir()
    assert "Detected inf/nan" not in capsys.readouterr().out


@pytest.mark.parametrize("alignment", ["transcode", "retokenize"])
def test_overflows_are_looked_for_in_tokens_of_its_own(alignment: str, settings: Settings, tmp_path: Path) -> None:
    from tiny import tiny_model
    from tokenizers_tiny import tokenizer

    other = tokenizer("bytes")
    tiny_model("mistral", seed=4, vocab_size=len(other)).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    values = settings("trainer", max_steps=2, debug="underflow_overflow")
    values["model"] |= {"augmenting": str(tmp_path / "other"), "alignment": alignment}
    assert go(values).is_dir()


def test_overflows_are_looked_for_where_prompts_are_read(settings: Settings) -> None:
    values = settings("sft", max_steps=2, debug="underflow_overflow")
    values["model"]["refresh"] = False
    assert go(values).is_dir()


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_gpus_for_one_process_are_refused(
    backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    values = settings() | {"backend": backend}
    with pytest.raises(ConfigError, match="torchrun"):
        go(values)
    assert not Path(values["output"]).exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_is_too_large_is_halved(backend: str, settings: Settings, at: Any) -> None:
    """`auto_find_batch_size` begins anew by itself, also in the first step."""
    steps: list[int] = []

    def fail() -> None:
        steps.append(0)
        if len(steps) == 1:
            raise RuntimeError("CUDA out of memory.")

    at("on_pre_optimizer_step", fail)
    run = RunFolder(go(settings(backend, max_steps=2, auto_find_batch_size=True, report_to="tensorboard")).parent)
    assert len(steps) == 3
    assert len(list(run.logs.glob("events.out.tfevents.*"))) == 1
