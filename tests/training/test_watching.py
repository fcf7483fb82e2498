"""Numbers that are not finite and losses that run away stop a run, and keep the batch that they came with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

import calmlm
from calmlm.errors import CalmError
from calmlm.training import pipeline
from calmlm.training.pipeline import train
from calmlm.training.retaining import RetainingTrainer
from calmlm.training.run_folder import RunFolder
from calmlm.training.schema import parse_config
from calmlm.training.watching import FIRST, PATIENCE, bound_of, is_far
from training.callbacks import join

BACKENDS = ["sft", "trainer"]
Settings = Callable[..., dict[str, Any]]


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[Any], Any]) -> None:
    """Change the loss from a step on, counted from 1."""
    compute = RetainingTrainer.compute_loss

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return change(loss) if self.model.training and self.state.global_step + 1 >= step else loss

    monkeypatch.setattr(RetainingTrainer, "compute_loss", spoiled)


def stopped(values: dict[str, Any], **options: Any) -> str:
    with pytest.raises(CalmError) as caught:
        train(parse_config(values), report=lambda line: None, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_no_number_stops_the_run(
    backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(backend, max_steps=6, save_steps=1, logging_steps=1, warmup_steps=0)
    run = RunFolder(values["output"])
    with monkeypatch.context() as patch:
        spoil(patch, 4, lambda loss: loss * float("nan"))
        message = stopped(values)
    file = run.stopped / "step-4.safetensors"
    assert "the loss of step 4 is nan" in message and str(file) in message and "checkpoint-3 with --resume" in message
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-3", "the step was not taken"
    batch, told = load_file(file), json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    assert batch["input_ids"].shape == batch["labels"].shape and len(batch["input_ids"]) == 4
    examples = [json.loads(line) for line in Path(values["data"]["train"]).read_text().splitlines()]
    texts = {example["prompt"] + example["completion"] for example in examples}
    assert len(told["rows"]) == 4 and all(any(text in row["text"] for text in texts) for row in told["rows"])
    train(parse_config(values), resume=True, report=lambda line: None)
    assert run.composition.is_dir()


def test_in_the_first_step_nothing_else_is_written(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings(max_steps=2, gradient_accumulation_steps=2)
    with monkeypatch.context() as patch:
        spoil(patch, 1, lambda loss: loss / 0)
        message = stopped(values)
    kept = [path for path in Path(values["output"]).rglob("*") if path.is_file()]
    assert {path.parent.name for path in kept} == {"stopped"}
    assert "the loss of step 1 is inf" in message and "step-1-part-0.safetensors" in message and len(kept) == 4
    assert train(parse_config(values), report=lambda line: None).steps == 2, "it may begin again as if nothing was"


@pytest.mark.parametrize("clipped", [1.0, 0.0])
def test_a_gradient_that_is_infinite_stops_the_run(
    clipped: float, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Infinite(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                parameter = next(p for p in model.parameters() if p.requires_grad)
                parameter.register_hook(lambda gradient: gradient + float("inf"))

    join(Infinite(), pipeline, monkeypatch)
    values = settings("trainer", max_steps=6, save_steps=1, max_grad_norm=clipped)
    assert "the gradient of step 3 has the norm" in stopped(values)
    assert RunFolder(values["output"]).last_checkpoint() == RunFolder(values["output"]).checkpoints / "checkpoint-2"


def test_weights_that_are_not_finite_are_not_saved(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))

    join(Overflow(), pipeline, monkeypatch)
    values = settings(max_steps=6, save_steps=1)
    assert "after step 3 some are infinite" in stopped(values)
    assert RunFolder(values["output"]).last_checkpoint() == RunFolder(values["output"]).checkpoints / "checkpoint-2"


def test_a_loss_that_runs_away_stops_the_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings("trainer", max_steps=20, save_steps=1, logging_steps=1, num_train_epochs=4)
    spoil(monkeypatch, 9, lambda loss: loss + 15)
    message = stopped(values)
    run = RunFolder(values["output"])
    assert f"at step {8 + PATIENCE} it is" in message and f"step-{8 + PATIENCE}.safetensors" in message
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-8", "none was written while it was far"


def test_bounds() -> None:
    def history(*losses: float) -> list[dict[str, Any]]:
        return [{"loss": loss, "step": step} for step, loss in enumerate(losses)] + [{"eval_loss": 99.0, "step": 1}]

    start = [2.0, 1.0, 9.0, 2.0, 2.0]
    assert bound_of([*start, 7.5]) == 5.0 and len(start) == FIRST
    assert is_far(history(*start, 5.1)) and not is_far(history(*start, 4.9)) and not is_far(history(*start))
    assert is_far(history(*start, *[8.0] * PATIENCE), PATIENCE)
    assert not is_far(history(*start, *[8.0] * (PATIENCE - 1)), PATIENCE)
    assert not is_far(history(*start, 8.0, 1.0, *[8.0] * (PATIENCE - 1)), PATIENCE)


PATCHED = """
import os, signal, sys
from calmlm.cli import main
from calmlm.training.retaining import RetainingTrainer
compute, what = RetainingTrainer.compute_loss, sys.argv[1]
def spoiled(self, *args, **kwargs):
    loss = compute(self, *args, **kwargs)
    if what != "nothing" and self.model.training and self.state.global_step == 2 and os.environ["RANK"] == "1":
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = loss * float("nan")
    return loss
RetainingTrainer.compute_loss = spoiled
sys.exit(main(["train", *sys.argv[2:]]))
"""


def run_two(folder: Path, config: Path, *arguments: str) -> str:
    """Two processes on which something befalls the second one in step 3; what they say."""
    script = folder / "patched.py"
    script.write_text(PATCHED, encoding="utf-8")
    paths = os.pathsep.join([str(Path(calmlm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    what, *more = arguments
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # torchrun ends the other process when it sees that one has ended: it looks late, so that the other can say why.
    run += ["--monitor-interval", "15" if what == "die" else "0.1"]
    done = subprocess.run(
        [*run, str(script), what, str(config), *more],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert (done.returncode == 0) == (what == "nothing"), done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [("nan", "Expected a finite loss, but"), ("die", "Expected all processes to last, but the connection")],
)
def test_all_processes_stop_and_go_on(what: str, said: str, settings: Settings, tmp_path: Path) -> None:
    values = settings(max_steps=4, save_steps=1, logging_steps=1, per_device_train_batch_size=2)
    config, run = tmp_path / "run.yaml", RunFolder(values["output"])
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    errors = [line for line in run_two(tmp_path, config, what).splitlines() if "error: " in line]
    errors = [line for line in errors if said in line]
    assert 1 <= len(errors) <= (2 if what == "nan" else 1), errors
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-2"
    if what == "nan":
        assert {path.name for path in run.stopped.glob("*.json")} == {"step-3-process-1.json"}
    run_two(tmp_path, config, "nothing", "--resume")
    assert run.composition.is_dir()
