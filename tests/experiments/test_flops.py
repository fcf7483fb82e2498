"""The meter of operations, against counts by hand."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calmlm.experiments.fitting import Stage, fit
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
    assert meter.flops == 3 * by_hand(4, 6, 12)
    assert meter.trainable == sum(p.numel() for p in model.parameters())


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
