"""The dtype that a machine is fast in."""

from __future__ import annotations

import pytest
import torch

import calmlm
from calmlm.bases import speed
from tiny import tiny_model, tiny_tokens


def test_float32_takes_as_long_as_itself() -> None:
    assert speed.slowness(torch.float32) == 1.0
    assert speed.slowness(torch.bfloat16) > 0


@pytest.mark.parametrize(("times", "chosen"), [(0.3, torch.bfloat16), (30.0, torch.float32)])
def test_the_faster_one_is_taken(times: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "slowness", lambda dtype: times)
    assert speed.faster_dtype("cpu") == chosen
    assert speed.faster_dtype("cuda") == torch.bfloat16


@pytest.mark.parametrize("anchor", ["gemma", "llama", "gpt2"])
def test_short_texts_in_bfloat16_are_learned_with_plain_products(anchor: str) -> None:
    """The losses and gradients are the same up to rounding, and afterwards all is as it was."""
    small = tiny_model("llama", seed=1, attn_implementation="sdpa").bfloat16()
    model = calmlm.compose(tiny_model(anchor, attn_implementation="sdpa").bfloat16(), small, [(0, 1)]).train()
    tokens = tiny_tokens()
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0

    def learn() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss = model(tokens, attention_mask=mask, labels=tokens.where(mask == 1, -100)).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    def kinds() -> list[str]:
        parts = (model, model.model, model.anchor, *model.model.augmenting.values())
        return [part.config._attn_implementation for part in parts]

    loss, gradients = learn()
    with speed.faster_attention(model, tokens.shape[1]) as other:
        assert other and kinds() == ["eager"] * 3 + ["sdpa"]
        again, others = learn()
    assert kinds() == ["sdpa"] * 4
    torch.testing.assert_close(again, loss, rtol=5e-3, atol=5e-3)
    for one, two in zip(others, gradients, strict=True):
        assert (one - two).norm() <= 0.1 * two.norm() + 1e-6


def test_other_attention_is_left_alone() -> None:
    """Long texts, float32, what was chosen, and what cannot change."""

    def other(model: calmlm.CalmForCausalLM, longest: int) -> bool:
        with speed.faster_attention(model, longest) as found:
            return found

    small = tiny_model("llama", seed=1, attn_implementation="sdpa")
    model = calmlm.compose(tiny_model("llama", attn_implementation="sdpa").bfloat16(), small, [(0, 1)])
    assert other(model, speed.SHORT) and not other(model, speed.SHORT + 1)
    model.set_attn_implementation("eager")
    assert not other(model, 1)
    falcon = tiny_model("falcon", attn_implementation="sdpa").bfloat16()  # which cannot change it
    assert not other(calmlm.compose(falcon, small, [(0, 1)]), 1) and falcon.config._attn_implementation == "sdpa"
    assert not other(calmlm.compose(tiny_model("llama", attn_implementation="sdpa"), small, [(0, 1)]), 1)
