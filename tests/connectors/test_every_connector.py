"""What every connector promises, whatever its formula: a new one is tested here as soon as it is in ``CONNECTORS``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.config import KINDS
from calmlm.connectors import CONNECTORS, Connector, build_connector
from calmlm.connectors.cross_attention import rotary_angles
from compositions import assert_close, awaken, greedy_without_cache, logits_of, tiny_composition
from tiny import tiny_model, tiny_tokenizer, tiny_tokens

OPTIONS: list[dict[str, Any]] = [
    {},
    {"gate": True, "norm": False},
    {"rotary": True, "null_key": True, "rank": 2},
    {"projection": "residual"},
    {"projection": "residual", "rank": 2, "gate": True},
]


def options_of(kind: str) -> dict[str, Any]:
    """What a composition with such connectors needs besides."""
    texts = [f"the quick fox {number} jumps over {number * 7} lazy dogs" for number in range(9)]
    both = {"tokenizer": tiny_tokenizer(), "augmenting_tokenizer": tiny_tokenizer()}
    return {"init": "aligned", "plain_text": texts, **both} if kind == "graft" else {}


COMPOSITIONS: dict[str, dict[str, Any]] = {
    **{kind: {"connector": kind, **options_of(kind)} for kind in CONNECTORS},
    "legonn with the anchor's embeddings": {"connector": "legonn", "ingestor": "anchor", "top_k": 5},
    **{f"{kind}, residual": {"connector": kind, "projection": "residual"} for kind in ("cross_attention", "flamingo")},
}

every_connector = pytest.mark.parametrize("kind", CONNECTORS)
# Those that take the state beside each position have their formula tested in a file of their own.
every_attention = pytest.mark.parametrize("kind", [kind for kind in CONNECTORS if kind != "graft"])
every_composition = pytest.mark.parametrize("name", COMPOSITIONS)


def fresh(kind: str, options: dict[str, Any]) -> Connector:
    torch.manual_seed(0)
    return build_connector(kind, 11, 12, {"num_heads": 3, **options})


def awake(kind: str, options: dict[str, Any]) -> Connector:
    connector = fresh(kind, options)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return connector


def angles(options: dict[str, Any], length: int, start: int = 0) -> Any:
    return rotary_angles(torch.arange(length)[None] + start, 4) if options.get("rotary") else None


def states() -> tuple[Tensor, Tensor]:
    """Of the anchor, (2, 5, 12), and of the augmenting model, (2, 7, 11), as a distribution would be."""
    torch.manual_seed(1)
    return torch.randn(2, 5, 12), torch.randn(2, 7, 11).softmax(-1)


def test_the_configuration_knows_every_connector() -> None:
    assert tuple(CONNECTORS) == KINDS


@every_attention
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_starts_as_the_identity_and_can_learn(kind: str, options: dict[str, Any]) -> None:
    connector, (anchor, augmenting) = fresh(kind, options), states()
    keys, values = connector.keys_values(augmenting, angles(options, 7))
    found = connector(anchor, keys, values, None, angles(options, 5))
    assert torch.equal(found, anchor) and connector.is_identity
    found.square().sum().backward()
    gradients = [p.grad.abs().max() for p in connector.parameters() if p.grad is not None]
    assert max(gradients) > 0, "a start from which no gradient leads away"


@every_attention
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_keys_and_values_can_be_made_piece_by_piece(kind: str, options: dict[str, Any]) -> None:
    connector, (_, augmenting) = awake(kind, options), states()
    whole = connector.keys_values(augmenting, angles(options, 7))
    first = connector.keys_values(augmenting[:, :4], angles(options, 4))
    second = connector.keys_values(augmenting[:, 4:], angles(options, 3, start=4))
    for at_once, pieces in zip(whole, zip(first, second, strict=True), strict=True):
        assert at_once.shape[:1] + at_once.shape[2:3] == (2, 7)
        assert_close(torch.cat(pieces, dim=2), at_once, 1e-6)


@every_attention
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_a_position_that_sees_nothing_is_left_alone(kind: str, options: dict[str, Any]) -> None:
    connector, (anchor, augmenting) = awake(kind, options), states()
    keys, values = connector.keys_values(augmenting, angles(options, 7))
    seeing = torch.ones(2, 5, dtype=torch.bool)
    seeing[0, :2] = False
    found = connector(anchor, keys, values, None, angles(options, 5), seeing=seeing)
    assert torch.equal(found[~seeing], anchor[~seeing])
    assert not torch.allclose(found[seeing], anchor[seeing], atol=1e-3) and not connector.is_identity
    assert found.dtype == anchor.dtype


@every_composition
def test_a_whole_composition(name: str, tmp_path: Path) -> None:
    anchor, augmenting, ids = tiny_model("llama", seed=1), tiny_model("gpt2", seed=2), tiny_tokens(2, 8)
    model = calmlm.compose(anchor, augmenting, 2, **COMPOSITIONS[name])
    assert torch.equal(logits_of(model, ids), logits_of(anchor, ids))
    full = logits_of(awaken(model), ids)
    assert not torch.allclose(full, logits_of(anchor, ids), atol=1e-3)
    with model.disable_composition():
        assert torch.equal(logits_of(model, ids), logits_of(anchor, ids))
    expected = greedy_without_cache(model, ids, 4)
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0), expected
    )
    model.save_pretrained(tmp_path)
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=anchor, augmenting=augmenting)
    assert torch.equal(logits_of(again, ids), full)


@every_composition
def test_a_later_token_changes_no_earlier_logit(name: str) -> None:
    model, ids = tiny_composition(**COMPOSITIONS[name]), tiny_tokens(2, 8)
    changed = ids.clone()
    changed[:, 5:] = (ids[:, 5:] - 3 + 17) % 94 + 3
    difference = (logits_of(model, changed) - logits_of(model, ids)).abs().amax(-1)
    assert difference[:, :5].max() == 0
    assert difference[:, 5:].min() > 1e-3


@every_composition
def test_an_anchor_of_another_family_goes_on_from_its_cache(name: str) -> None:
    model, ids = tiny_composition("gpt2", "llama", **COMPOSITIONS[name]), tiny_tokens(2, 6)
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert_close(torch.cat((first.logits, second.logits), 1), logits_of(model, ids), 1e-4)
