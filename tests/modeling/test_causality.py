"""No logit depends on a later token, neither through the anchor nor through the augmenting model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import calmlm
from compositions import logits_of, tiny_composition
from tiny import tiny_tokens

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"norm": False},
    "default": {},
    "gate": {"gate": True},
    "everything": {"gate": True, "rotary": True, "query_key_bias": 1.5, "null_key": True, "num_heads": 6},
}


@pytest.fixture(params=OPTIONS, scope="module")
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    return tiny_composition(connections=[(0, 1), (2, 2), (4, 2), (3, 4)], **OPTIONS[request.param])


def test_a_later_token_changes_no_earlier_logit(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(2, 9)
    before = logits_of(model, ids)
    for position in range(1, 9):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] - 3 + 17) % 94 + 3
        difference = (logits_of(model, changed) - before).abs().amax(-1)
        assert (difference[:, :position] == 0).all()
        assert (difference[:, position:] > 1e-3).all()


def test_the_augmenting_model_reaches_its_own_position_and_all_later_ones(model: calmlm.CalmForCausalLM) -> None:
    # Only the augmenting model's embedding of one token changes, so whatever moves comes through the connections.
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    before = logits_of(model, ids)
    for position, token in enumerate(ids[0].tolist()):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.augmenting["augmenting"].get_input_embeddings().weight[token].neg_()
        difference = (logits_of(changed, ids) - before).abs().amax(-1)[0]
        assert (difference[:position] == 0).all()
        assert (difference[position:] > 1e-4).all()


def test_no_gradient_flows_back_from_an_earlier_logit() -> None:
    # The same in the form in which a leak would be learned: d logit_t / d (augmenting state at s) is 0 for s > t.
    model = tiny_composition(connections=[(2, 1)])
    connector = model.model.connectors["augmenting"][0]
    states: list[torch.Tensor] = []

    def lead_in(module: torch.nn.Module, args: Any) -> tuple[torch.Tensor]:
        states.append(args[0].detach().requires_grad_())
        return (states[-1],)

    connector.f_proj.register_forward_pre_hook(lead_in)
    ids = tiny_tokens(1, 6)
    for position in range(6):
        states.clear()
        model(input_ids=ids, use_cache=False).logits[0, position].square().sum().backward()
        reached = states[0].grad[0].abs().amax(-1)
        assert (reached[: position + 1] > 0).all()
        assert (reached[position + 1 :] == 0).all()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_a_mask_given_for_all_tokens_changes_nothing(attn_implementation: str) -> None:
    model = tiny_composition(attn_implementation=attn_implementation, null_key=True)
    ids = tiny_tokens(2, 7)
    assert torch.equal(logits_of(model, ids), logits_of(model, ids, torch.ones_like(ids)))


def test_sdpa_is_causal() -> None:
    model = tiny_composition(attn_implementation="sdpa")
    ids = tiny_tokens(2, 9)
    before = logits_of(model, ids)
    changed = ids.clone()
    changed[:, 5:] = 50
    difference = (logits_of(model, changed) - before).abs().amax(-1)
    assert difference[:, :5].max() <= 1e-6 * before.abs().max()
    assert (difference[:, 5:] > 1e-3).all()
