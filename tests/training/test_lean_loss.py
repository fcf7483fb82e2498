"""Both trainers compute logits where there are labels, and everything else is as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import calmlm
from calmlm.data.labels import IGNORE
from calmlm.training import backends
from calmlm.training.lean_loss import lean
from calmlm.training.pipeline import train
from calmlm.training.schema import parse_config
from compositions import assert_close, own, tiny_composition
from tiny import tiny_tokens

SYSTEMS: dict[str, dict[str, Any]] = {
    "cross-attention": {},
    "map": {"words": "map", "anchor": "gemma3_text"},
    "pointer": {"words": "pointer", "augmenting": "qwen3"},
    "own tokens, pointer": {"words": "pointer", **own("unigram")},
    "prompt alone": {"refresh": False},
    "without logits_to_keep": {"anchor": "xglm"},
}


def batch() -> dict[str, torch.Tensor]:
    """Three rows whose labels begin in other columns; one has none."""
    ids = tiny_tokens(3, 9)
    labels = ids.clone()
    labels[0, :5], labels[1, :6], labels[2] = IGNORE, IGNORE, IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("name", SYSTEMS)
def test_loss_and_gradients_are_the_same(name: str) -> None:
    model = tiny_composition(**SYSTEMS[name]).train()
    given, found = batch(), []
    for inputs in (given, lean(given)):
        model.zero_grad()
        output = model(**inputs, num_items_in_batch=torch.tensor(7), use_cache=False)
        output.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
        found.append((output.loss.detach(), gradients, output.logits.shape[:-1]))
    assert_close(found[1][0], found[0][0], 1e-6)
    assert len(found[1][1]) == len(found[0][1]) > 0
    for one, other in zip(found[1][1], found[0][1], strict=True):
        assert_close(one, other, 1e-6)
    assert (found[0][2], found[1][2]) == ((3, 9), (7,))


def test_positions_are_those_that_predict_a_label() -> None:
    found, labels = lean(batch()), batch()["labels"]
    assert found["logits_to_keep"].nonzero().tolist() == [[0, n] for n in (4, 5, 6, 7)] + [[1, n] for n in (5, 6, 7)]
    assert found["shift_labels"].tolist() == [*labels[0, 5:].tolist(), *labels[1, 6:].tolist()]
    for kept in ({"labels": None}, batch() | {"logits_to_keep": 3}, {"input_ids": tiny_tokens()}):
        assert lean(kept) is kept
    none, every = batch(), batch()
    none["labels"] = torch.full_like(none["labels"], IGNORE)
    assert lean(none) is none
    every["labels"] = every["input_ids"]
    assert lean(every) is every


def test_states_of_columns() -> None:
    model = tiny_composition(words="map", anchor="gemma3_text").eval()
    ids = tiny_tokens(3, 9)
    every = model.model(ids).last_hidden_state
    assert torch.equal(model.model(ids, logits_to_keep=2).last_hidden_state, every[:, -2:])
    columns = torch.tensor([1, 4])
    assert torch.equal(model.model(ids, logits_to_keep=columns).last_hidden_state, every[:, columns])
    positions = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(model.model(ids, logits_to_keep=positions).last_hidden_state, every[positions])


@pytest.mark.parametrize("backend", ["trainer", "sft"])
def test_a_run_is_the_same(backend: str, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values, lengths = settings(backend, max_steps=6), []
    values["data"]["eval"] = values["data"]["train"]

    def go(folder: str) -> dict[str, torch.Tensor]:
        found = train(parse_config(values | {"output": values["output"] + folder}), report=lambda line: None)
        return calmlm.CalmForCausalLM.from_pretrained(found.composition).composition_tensors()

    with monkeypatch.context() as patch:
        patch.setattr(backends, "lean", lambda inputs: inputs)
        expected = go("-whole")
    with monkeypatch.context() as patch:
        patch.setattr(backends, "lean", lambda inputs: lengths.append(lean(inputs)) or lengths[-1])
        found = go("-lean")
    assert any("logits_to_keep" in inputs for inputs in lengths)
    for name, tensor in expected.items():
        assert_close(found[name], tensor, 1e-5)


def test_label_smoothing_sees_all_logits(settings: Any) -> None:
    values = settings("trainer", max_steps=2, label_smoothing_factor=0.1)
    assert train(parse_config(values), report=lambda line: None).composition


def test_any_trainer_may_ask_for_it() -> None:
    model = tiny_composition()

    class Lean(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, lean(inputs), *args, **kwargs)

    rows = [
        {"input_ids": row, "labels": label} for row, label in zip(batch()["input_ids"], batch()["labels"], strict=True)
    ]
    arguments = TrainingArguments(output_dir="unused", max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    assert Lean(model, arguments, train_dataset=rows).train().training_loss > 0
