"""What goes to other processes can be pickled, as the start method `spawn` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calmlm.training import pipeline
from calmlm.training.pipeline import train
from calmlm.training.schema import parse_config

BACKENDS = ["sft", "trainer"]
Settings = Callable[..., dict[str, Any]]


def sent(value: Any) -> Any:
    """As it arrives in another process."""
    return ForkingPickler.loads(ForkingPickler.dumps(value))


@pytest.mark.parametrize(
    ("backend", "packing", "refresh"),
    [
        ("sft", False, True),
        ("sft", False, False),
        ("sft", True, True),
        ("trainer", False, True),
        ("trainer", False, False),
    ],
)
def test_loaders(backend: str, packing: bool, refresh: bool, settings: Settings) -> None:
    values = settings(backend, max_steps=1, **({"packing": True} if packing else {}))
    values["data"]["eval"] = values["data"]["train"]
    values["model"]["refresh"] = refresh
    made: list[Any] = []
    make = pipeline.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_trainer", lambda *args: made.append(make(*args)) or made[-1])
        train(parse_config(values), report=lambda line: None)
    for loader in (made[0].get_train_dataloader(), made[0].get_eval_dataloader()):
        dataset, collate, begin = sent((loader.dataset, loader.collate_fn, loader.worker_init_fn))
        rows = [dataset[index] for index in range(2)]
        ours = loader.collate_fn([loader.dataset[index] for index in range(2)])
        theirs = collate(rows)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(torch.as_tensor(theirs[key]), torch.as_tensor(ours[key])) for key in ours)
        assert refresh or "prompt_mask" in theirs
        assert begin is None or callable(begin)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_with_workers_that_are_spawned(backend: str, settings: Settings, tmp_path: Path) -> None:
    values = settings(backend, max_steps=2)
    values["data"]["eval"] = values["data"]["train"]
    values["model"]["refresh"] = False
    one = train(parse_config(values), report=lambda line: None).composition
    values["trainer"] |= {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn"}
    two = train(parse_config(values | {"output": str(tmp_path / "two")}), report=lambda line: None).composition
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor)


def test_configurations(settings: Settings) -> None:
    config = parse_config(settings())
    assert sent(config) == config
    assert dataclasses.asdict(sent(config)) == config.to_dict()
