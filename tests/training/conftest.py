"""A small task on disk and configurations that train on it within a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty sums as prompt and completion, of several lengths."""
    path = tmp_path_factory.mktemp("task") / "train.jsonl"
    numbers = random.Random(0)
    lines = []
    for _ in range(40):
        terms = [numbers.randint(0, 9) for _ in range(numbers.randint(1, 4))]
        lines.append(json.dumps({"prompt": "+".join(map(str, terms)) + "=", "completion": str(sum(terms))}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def settings(task: Path, anchor_folder: Path, augmenting_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that gives the values of a configuration file; keyword arguments change its trainer arguments."""

    def make(backend: str = "sft", **trainer: Any) -> dict[str, Any]:
        return {
            "output": str(tmp_path / "run"),
            "backend": backend,
            "model": {"anchor": str(anchor_folder), "augmenting": str(augmenting_folder), "connections": "top"},
            "data": {"train": str(task)},
            "trainer": {
                "use_cpu": True,
                "disable_tqdm": True,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 4,
                "learning_rate": 0.01,
                "logging_steps": 5,
                "save_steps": 5,
                **trainer,
            },
        }

    return make
