"""What keeps the anchor's skills: the divergence by hand, batches that are the same on resuming, and runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import calmlm
from calmlm.errors import ConfigError, DataError
from calmlm.training import pipeline
from calmlm.training.mean_gates import GATE
from calmlm.training.pipeline import train
from calmlm.training.retaining import Retained, divergence
from calmlm.training.schema import parse_config
from compositions import tiny_composition
from training.callbacks import interrupt_at

Settings = Callable[..., dict[str, Any]]
SHARED = {"anchor_options": {"vocab_size": 97}, "augmenting_options": {"vocab_size": 97}}


@pytest.fixture
def general(tmp_path: Path) -> str:
    path = tmp_path / "general.txt"
    path.write_text("\n".join(f"{n}-{n}={0} and more {n}" for n in range(7)))
    return str(path)


@pytest.mark.parametrize("words", [None, "map", "pointer"])
def test_the_divergence_by_hand(words: str | None) -> None:
    model = tiny_composition(words=words, **SHARED)
    rows = Retained([[5, 6, 7, 8, 9], [10, 11, 12]], 1.0, 2, 3, 0, 0)
    batch, columns = rows.batch(0)
    assert len(columns) == 3
    found = divergence(model.train(), model, batch, columns)
    expected = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[mask.bool()][None]
        with torch.no_grad():
            ours = model(row, use_cache=False).logits[0].log_softmax(-1)
            with model.disable_composition():
                theirs = model(row, use_cache=False).logits[0].log_softmax(-1)
        expected += [float((theirs[c].exp() * (theirs[c] - ours[c])).sum()) for c in columns if c < row.shape[1]]
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert found.item() > 0.01
    found.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.model.connectors.parameters())
    assert all(p.grad is None for p in model.anchor.parameters())


def test_an_untrained_composition_is_the_anchor() -> None:
    model = tiny_composition(awake=False, **SHARED)
    batch, columns = Retained([[5, 6, 7, 8]], 1.0, 1, 9, 0, 0).batch(3)
    assert divergence(model, model, batch, columns).item() == pytest.approx(0.0, abs=1e-6)


def test_every_line_comes_once_in_each_pass_and_in_the_same_order_again() -> None:
    rows = [[n, n + 1] for n in range(5)]
    one, other = Retained(rows, 1.0, 2, 4, 0, 3), Retained(rows, 1.0, 2, 4, 0, 3)
    read = [row[0] for number in range(5) for row in one.batch(number)[0]["input_ids"].tolist()]
    assert sorted(read[:5]) == sorted(read[5:]) == [0, 1, 2, 3, 4]
    assert read[:5] != read[5:]
    assert torch.equal(other.batch(4)[0]["input_ids"], one.batch(4)[0]["input_ids"])  # whoever begins there
    assert Retained([[1], *rows], 1.0, 2, 4, 0, 3).rows == rows


@pytest.mark.parametrize("backend", ["sft", "trainer"])
def test_it_keeps_a_run_near_the_anchor(backend: str, general: str, settings: Settings) -> None:
    drift = {}
    for weight in (None, 30.0):
        values = settings(backend, num_train_epochs=3)
        if weight is not None:
            values["retain"] = {"text": general, "weight": weight, "lines": 4}
        composition = train(parse_config(values), overwrite=True, report=lambda line: None).composition
        model = calmlm.CalmForCausalLM.from_pretrained(composition)
        rows = Retained([list(range(5, 20))], 1.0, 1, 99, 0, 0)
        drift[weight] = divergence(model, model, *rows.batch(0)).item()
    assert drift[30.0] < 0.5 * drift[None]


def test_parts_of_a_batch_weigh_as_the_whole(general: str, settings: Settings) -> None:
    """A weight that is far above the loss of the data: as strong in two parts as in one."""
    norms = []
    for rows, parts in ((4, 1), (2, 2)):
        values = settings("trainer", max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=parts)
        values["trainer"] |= {
            "optim": "sgd",
            "learning_rate": 1e-3,
            "max_grad_norm": 0,
            "lr_scheduler_type": "constant",
        }
        values["retain"] = {"text": general, "weight": 1e4, "lines": 4 // parts, "positions": 999}
        lines: list[str] = []
        composition = train(parse_config(values), overwrite=True, report=lines.append).composition
        tensors = calmlm.CalmForCausalLM.from_pretrained(composition).composition_tensors()
        norms.append(sum(float(tensor.float().norm()) for tensor in tensors.values()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_gates_are_those_of_the_batches_alone(general: str, settings: Settings) -> None:
    logged = []
    for weight in (None, 1e-30):  # nothing, also of what Adam makes of it
        values = settings("trainer", max_steps=4, save_steps=4, logging_steps=2)
        values["model"] |= {"words": "pointer", "connections": "none"}
        if weight is not None:
            values["retain"] = {"text": general, "weight": weight, "lines": 6}
        run = train(parse_config(values), overwrite=True, report=lambda line: None).composition.parent
        state = json.loads((run / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
        logged.append([entry[f"{GATE}augmenting/pointer"] for entry in state["log_history"] if "loss" in entry])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    assert logged[0][-1] > 0


def test_the_last_batch_of_an_epoch_weighs_as_the_others(
    general: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten parts, eight to a batch: the second batch has two, whose text counts as much as that of eight."""
    monkeypatch.setattr("calmlm.training.retaining.divergence", lambda *_: torch.tensor(1.0))
    values = settings("trainer", num_train_epochs=1, gradient_accumulation_steps=8, learning_rate=1e-6)
    values["retain"] = {"text": general, "weight": 1000.0}
    assert train(parse_config(values), report=lambda line: None).loss == pytest.approx(1000.0, rel=0.02)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    general: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings("trainer", max_steps=6, save_steps=3)
    values["retain"] = {"text": general, "weight": 1.0}
    whole = train(parse_config(values), report=lambda line: None).composition
    expected = calmlm.CalmForCausalLM.from_pretrained(whole).composition_tensors()
    values["output"] += "-again"
    with monkeypatch.context() as patched:
        interrupt_at(4, pipeline, patched)
        with pytest.raises(KeyboardInterrupt):
            train(parse_config(values), report=lambda line: None)
    again = train(parse_config(values), resume=True, report=lambda line: None).composition
    found = calmlm.CalmForCausalLM.from_pretrained(again).composition_tensors()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


def test_what_cannot_be_retained(general: str, settings: Settings, tmp_path: Path) -> None:
    values = settings("trainer", max_steps=1)
    with pytest.raises(ConfigError, match="retain.weight: expected more than 0, but got -1"):
        parse_config({**values, "retain": {"text": general, "weight": -1.0}})
    (tmp_path / "short.txt").write_text("1\n2\n")
    with pytest.raises(DataError, match="Expected lines of two tokens or more in .*short.txt, but got none"):
        train(parse_config({**values, "retain": {"text": str(tmp_path / "short.txt")}}), report=lambda line: None)
    values["model"]["refresh"] = False
    with pytest.raises(ConfigError, match="retain: expected augmenting models that read the text as it grows, but"):
        train(parse_config({**values, "retain": {"text": general}}), report=lambda line: None)
