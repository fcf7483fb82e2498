"""A run that is killed at any moment and gone on with ends as the run that nobody killed, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from training.forked import Runs, forking

Settings = Callable[..., dict[str, Any]]
KILLS = 10  # of each kind of run


def losses_of(output: Path) -> dict[int, dict[str, float]]:
    """What the last checkpoint has logged of each step, without times."""
    last = max((output / "checkpoints").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second")
    return {
        entry["step"]: {key: value for key, value in entry.items() if not key.endswith(timed)}
        for entry in history
        if "loss" in entry
    }


def check_whole(output: Path) -> None:
    """Nothing stands in a run's folder that a killed process has left."""
    assert not [path for path in output.rglob(".*") if path.is_file() or path.suffix in (".new", ".old")]


def chain(
    runs: Runs, config: Path, output: Path, seconds: float, events: int, numbers: random.Random, kills: int
) -> int:
    """Start a run, kill it and go on with it until it ends or was killed so often; how often it was."""
    cache, killed, resume = Path(f"{output}.activations"), 0, []
    arguments = ["train", str(config), "--output", str(output)]
    while killed < kills:
        at = {"kill_at": numbers.randint(1, events)} if killed % 2 else {"after": numbers.uniform(0, seconds)}
        ended = runs.go([*arguments, *resume], [output, cache], **at)
        resume = ["--resume"]
        if ended.status == 0:
            return killed
        assert ended.status == -9, ended.said
        killed += 1
    ended = runs.go([*arguments, *resume], [output, cache])
    assert ended.status == 0, ended.said
    return killed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["sft", "trainer"])
def test_killed_runs_end_as_one_that_was_not(kind: str, settings: Settings, tmp_path: Path) -> None:
    values = settings(kind, num_train_epochs=2, save_steps=2, logging_steps=3, gradient_accumulation_steps=2)
    values["trainer"] |= {"eval_strategy": "steps", "eval_steps": 4}
    values["data"]["eval"] = values["data"]["train"]
    values["model"] |= {"connections": [[1, 2], [3, 3]]}
    values["activation_cache"] = "disk"
    if kind == "trainer":
        text = tmp_path / "text.txt"
        text.write_text("\n".join(f"{n}+{n}={2 * n} and so on" for n in range(12)), encoding="utf-8")
        values["align"] = {"text": str(text), "trainer": {"max_steps": 3, "save_steps": 1}}
        values["retain"] = {"text": str(text)}
        values["trainer"]["save_total_limit"] = 1
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    numbers = random.Random(kind)
    with forking(tmp_path) as runs:
        whole = tmp_path / "whole"
        alone = runs.go(["train", str(config), "--output", str(whole)], [whole, Path(f"{whole}.activations")])
        assert alone.status == 0, alone.said
        expected = load_file(whole / "composition" / "model.safetensors")
        killed = turn = 0
        while killed < KILLS:
            output = tmp_path / f"killed-{turn}"
            killed += chain(runs, config, output, alone.seconds, alone.events, numbers, KILLS - killed)
            found = load_file(output / "composition" / "model.safetensors")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            assert losses_of(output) == losses_of(whole)
            check_whole(output)
            shutil.rmtree(output)
            turn += 1
            assert turn < 3 * KILLS
