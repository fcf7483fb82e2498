"""Frozen models compute as those that learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import calmlm
from tiny import tiny_model, tiny_tokens


class Products(TorchDispatchMode):
    """Collects the shapes of what is multiplied batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.shapes += [tuple(each.shape) for each in args]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "phi", "bloom"])
@torch.no_grad()
def test_a_frozen_head_multiplies_all_rows_at_once(family: str, dtype: torch.dtype, batch: int) -> None:
    model: Any = tiny_model(family, seed=1).to(dtype).eval()
    ids = tiny_tokens(batch, 7)
    expected = model(ids, logits_to_keep=1).logits
    for seed in (2, 3):  # a model may be the base of two compositions
        calmlm.compose(model, tiny_model("gpt2", seed=seed), 2)
    for each in (model, copy.deepcopy(model)):
        with Products() as products:
            found = each(ids, logits_to_keep=1).logits
        assert torch.equal(found, expected)
        assert not [shape for shape in products.shapes if model.config.vocab_size in shape]


def test_a_composition_that_is_off_is_its_anchor_in_parts_of_texts() -> None:
    anchor = tiny_model("llama", seed=1).to(torch.bfloat16)
    ids = tiny_tokens(3, 7)
    with torch.no_grad():
        expected = anchor(ids, logits_to_keep=2).logits
        model = calmlm.compose(anchor, tiny_model("gpt2", seed=2), 2)
        with model.disable_composition():
            assert torch.equal(model(ids, logits_to_keep=2).logits, expected)
