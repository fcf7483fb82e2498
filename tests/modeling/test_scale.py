"""A composition scaled from 0, the anchor, to 1: each thing that it adds, against its own formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.connectors.adapters import Adapter
from calmlm.errors import ConfigError
from compositions import assert_close, assert_helpful, logits_of, tiny_composition
from connectors.test_adapters import adapted
from connectors.test_every_connector import COMPOSITIONS as CONNECTED
from connectors.test_graft import grafted
from tiny import tiny_tokens
from words import speaking

MODELS = {
    **{name: lambda name=name: tiny_composition(**CONNECTED[name]) for name in CONNECTED if name != "graft"},
    "own tokens, grafts": lambda: grafted("mistral+gemma3, own tokens"),
    "grafts, words, adapters": lambda: grafted("qwen2+llama, own tokens, words"),
    "words": lambda: speaking("map", "gpt2+qwen3, words alone"),
    "pointer": lambda: speaking("pointer", "llama+mistral"),
    "adapters": lambda: adapted("llama"),
}
IDS = tiny_tokens(2, 9)


@pytest.mark.parametrize("name", MODELS)
def test_zero_is_the_anchor_and_one_changes_nothing(name: str) -> None:
    model = MODELS[name]()
    whole = logits_of(model, IDS)
    with model.disable_composition():
        alone = logits_of(model, IDS)
    with model.composition_scale(0) as same:
        assert same is model
        assert torch.equal(logits_of(model, IDS), alone)
        with model.composition_scale(1):
            assert torch.equal(logits_of(model, IDS), alone)
    with model.composition_scale(1):
        assert torch.equal(logits_of(model, IDS), whole)
    with model.composition_scale(1e-7):  # there is no jump beside 0
        assert_close(logits_of(model, IDS), alone, 1e-3)
    with pytest.raises(KeyError), model.composition_scale(0.5):
        raise KeyError
    assert torch.equal(logits_of(model, IDS), whole)
    assert not torch.allclose(whole, alone, atol=1e-3)


@torch.no_grad()
def first_change(model: calmlm.CalmForCausalLM, scale: float) -> Tensor:
    """The state behind the lowest layer that the composition changes, or the last one."""
    found: list[Tensor] = []
    backbone = model.model.backbone()
    connected = any(entry["connections"] for entry in model.config.augmenting.values())
    where = backbone.layers[model.model.lowest()] if connected else backbone.decoder

    def keep(module: Any, given: Any, output: Any) -> None:
        found.append(output[0] if not isinstance(output, Tensor) else output)

    handle = where.register_forward_hook(keep)
    try:
        with model.composition_scale(scale):
            logits_of(model, IDS)
    finally:
        handle.remove()
    return found[0]


@pytest.mark.parametrize("name", ["cross_attention", "legonn", "own tokens, grafts", "words"])
def test_in_between_as_much_is_added_as_the_scale_says(name: str) -> None:
    model = MODELS[name]()
    if name == "cross_attention":  # one into each layer, so that the lowest one's output is a single connection's
        model = tiny_composition(connections=[(1, 1), (2, 3)])
    plain, whole = first_change(model, 0), first_change(model, 1)
    norms = []
    for scale in (0.0, 0.25, 0.5, 0.75, 1.0):
        new = first_change(model, scale)
        norms.append(float((new - plain).norm()))
        if name != "own tokens, grafts":  # two of these lead into one layer, the second reads what the first has made
            assert_close(new, plain + scale * (whole - plain), 1e-5)
    assert norms[0] == 0
    assert norms == sorted(norms) and len(set(norms)) == len(norms)


def test_each_part_is_scaled_as_its_own_weights_would_be() -> None:
    """The scale is the same as smaller output weights of all connections, or smaller adapters."""
    model = tiny_composition(connections=[(0, 0), (1, 2), (3, 2)])
    other = tiny_composition(connections=[(0, 0), (1, 2), (3, 2)])
    with torch.no_grad():
        for connector in other.model.connectors["augmenting"]:
            connector.o_proj.weight.mul_(0.3)
    with model.composition_scale(0.6), model.composition_scale(0.5):
        assert_close(logits_of(model, IDS), logits_of(other, IDS), 1e-5)
    model, other = adapted("gpt2"), adapted("gpt2")
    for part in other.modules():
        if isinstance(part, Adapter):
            part.scaling *= 0.3
    with model.composition_scale(0.3):
        assert_close(logits_of(model, IDS), logits_of(other, IDS), 1e-5)


def test_a_pointer_mixes_probabilities_so_far() -> None:
    model = speaking("pointer", "llama+gpt2, own tokens, words alone")
    with model.disable_composition():
        alone = logits_of(model, IDS).softmax(-1)
    whole = logits_of(model, IDS).softmax(-1)
    with model.composition_scale(0.4):
        assert_close(logits_of(model, IDS).softmax(-1), 0.6 * alone + 0.4 * whole, 1e-4)


def test_generation_follows_the_scale() -> None:
    model, ids = tiny_composition(), tiny_tokens(1, 5)
    with model.composition_scale(0):
        assert torch.equal(model.generate(ids, max_new_tokens=8), model.anchor.generate(ids, max_new_tokens=8))
    with model.composition_scale(0.5):
        cached = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), "1", True, None], ids=str)
def test_other_scales_are_refused(wrong: Any) -> None:
    model = tiny_composition()
    with pytest.raises(ConfigError) as caught, model.composition_scale(wrong):
        pass
    assert_helpful(caught.value, repr(wrong))
