"""The meter of operations, against counts by hand."""

from __future__ import annotations

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calmlm.experiments.fitting import Stage, fit, in_batches
from calmlm.experiments.flops import Meter

WIDTH, INNER, VOCABULARY = 8, 16, 11


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def by_hand(rows: int, length: int, labels: int) -> float:
    """Forward and backward of one layer and the head: each weight is multiplied thrice, attention twice more."""
    tokens = rows * length
    weights = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
    attention = 2 * rows * length * length * WIDTH  # queries with keys, and weights with values
    return 3 * 2 * (tokens * weights + attention + labels * WIDTH * VOCABULARY)


def test_a_training_is_counted() -> None:
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, -100, 4, 5, 6]} for _ in range(12)]
    meter, model = Meter(), llama()
    fit(model, rows, 0, Stage(3, 4, 1e-3), seed=0, meter=meter)
    assert math.isclose(meter.flops, 3 * by_hand(4, 6, 12), rel_tol=1e-9)
    assert meter.trainable == sum(p.numel() for p in model.parameters())


def test_batches_of_all_lengths_are_counted() -> None:
    lengths = [3, 9, 4, 30, 5, 17, 3, 8, 60, 6, 21, 7]
    rows = [{"input_ids": [1] * n, "labels": [-100] * (n // 2) + [1] * (n - n // 2)} for n in lengths for _ in range(4)]
    meter, counted = Meter(), in_batches(rows, 4, 0)
    fit(llama(), rows, 0, Stage(15, 4, 1e-3), seed=0, meter=meter)
    expected = 0.0
    for step in range(15):  # one pass over the twelve batches, and the first three again
        batch = counted[4 * (step % 12) :][:4]
        width = max(len(row["input_ids"]) for row in batch)
        expected += by_hand(4, width, sum(label != -100 for row in batch for label in row["labels"][1:]))
    assert math.isclose(meter.flops, expected, rel_tol=1e-6)


def test_frozen_weights_cost_no_gradients() -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]} for _ in range(4)]
    full, part = Meter(), Meter()
    fit(llama(), rows, 0, Stage(2, 4, 1e-3), seed=0, meter=full)
    model = llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    fit(model, rows, 0, Stage(2, 4, 1e-3), seed=0, meter=part)
    assert part.flops < full.flops / 2
    assert part.trainable == WIDTH * VOCABULARY


def test_probing_changes_no_weight() -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]} for _ in range(8)]
    plain, probed = (llama() for _ in range(2))
    probed.load_state_dict(plain.state_dict())
    fit(plain, rows, 0, Stage(2, 4, 1e-3), seed=0)
    fit(probed, rows, 0, Stage(2, 4, 1e-3), seed=0, meter=Meter())
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), probed.state_dict().values(), strict=True)
    )


def test_experts_are_counted() -> None:
    meter = Meter()
    tokens, experts = torch.randn(8, 16), torch.randn(2, 16, 24)
    with meter.counting():
        torch.nn.functional.grouped_mm(tokens, experts, offs=torch.tensor([4, 8], dtype=torch.int32))
    assert meter.flops == 2 * 8 * 16 * 24
