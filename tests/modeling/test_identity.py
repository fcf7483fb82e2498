"""An untrained composition and a disabled one are the anchor, bit for bit."""

from __future__ import annotations

import pytest
import torch

import calmlm
from compositions import logits_of, pad, tiny_composition
from tiny import tiny_model, tiny_tokenizer, tiny_tokens

OPTIONS = [{}, {"norm": False}, {"gate": True}, {"rotary": True, "query_key_bias": 1.5, "null_key": True}]


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "default")
def test_an_untrained_composition_is_the_anchor(options: dict, dtype: torch.dtype, attn_implementation: str) -> None:
    anchor = tiny_model("llama", seed=1, dtype=dtype, attn_implementation=attn_implementation)
    # In float64, eager attention gives padding a little weight, and rows that begin with it are refused.
    ids, mask = pad([tiny_tokens(1, 8)[0], tiny_tokens(1, 5)[0]], "right" if dtype == torch.float64 else "left")
    expected = logits_of(anchor, ids, mask)
    augmenting = tiny_model("gpt2", seed=2, dtype=dtype, attn_implementation=attn_implementation)
    model = calmlm.compose(anchor, augmenting, connections=[(0, 0), (2, 2), (4, 4)], **options)
    assert torch.equal(logits_of(model, ids, mask), expected)


TEXTS = [f"{number} and {number} are {2 * number}, and so on" for number in range(12)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("connector", ["graft", "cross_attention"])
@pytest.mark.parametrize("words", ["map", "pointer"])
def test_shut_gates_leave_the_anchor_in_any_numbers(words: str, connector: str, dtype: torch.dtype) -> None:
    anchor, augmenting = (tiny_model(family, seed=1, dtype=dtype) for family in ("llama", "mistral"))
    options = {"init": "aligned", "plain_text": TEXTS, "opened": False} if connector == "graft" else {}
    made = tiny_tokenizer()
    model = calmlm.compose(
        anchor, augmenting, 2, connector=connector, words=words, tokenizer=made, augmenting_tokenizer=made, **options
    )
    ids = tiny_tokens(2, 8)
    assert torch.equal(logits_of(model, ids), logits_of(anchor, ids))


def test_a_disabled_composition_is_the_anchor_and_an_enabled_one_is_not() -> None:
    ids = tiny_tokens(2, 8)
    expected = logits_of(tiny_model("llama", seed=1), ids)
    model = tiny_composition()
    awake = logits_of(model, ids)
    assert (awake - expected).abs().max() > 0.1
    with model.disable_composition() as same:
        assert same is model
        assert torch.equal(logits_of(model, ids), expected)
        assert torch.equal(model(ids, labels=ids).loss, tiny_model("llama", seed=1)(ids, labels=ids).loss)
        assert torch.equal(model.model(ids).last_hidden_state, tiny_model("llama", seed=1).model(ids)[0])
    assert torch.equal(logits_of(model, ids), awake)
    assert torch.equal(logits_of(model.anchor, ids), expected), "the anchor itself must stay usable"


def test_the_switch_nests_and_survives_an_error() -> None:
    model = tiny_composition()
    ids = tiny_tokens()
    awake = logits_of(model, ids)
    with model.disable_composition():
        with model.disable_composition():
            pass
        assert torch.equal(logits_of(model, ids), logits_of(model.anchor, ids))
        with pytest.raises(RuntimeError, match="on purpose"), model.disable_composition():
            raise RuntimeError("on purpose")
        assert torch.equal(logits_of(model, ids), logits_of(model.anchor, ids))
    assert torch.equal(logits_of(model, ids), awake)


def test_a_disabled_composition_generates_what_the_anchor_generates() -> None:
    model = tiny_composition()
    ids = tiny_tokens(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = tiny_model("llama", seed=1).generate(ids, **options)
    with model.disable_composition():
        assert torch.equal(model.generate(ids, **options), expected)
    assert not torch.equal(model.generate(ids, **options), expected)


def test_an_error_within_a_call_leaves_nothing_behind() -> None:
    model = tiny_composition()
    ids = tiny_tokens()
    before, alone = logits_of(model, ids), logits_of(model.anchor, ids)

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    for layer in (model.model.backbone().layers[3], model.model.backbone("augmenting").layers[3]):
        handle = layer.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            logits_of(model, ids)
        handle.remove()
        assert torch.equal(logits_of(model.anchor, ids), alone), "a call in progress stayed on the hooks"
        assert torch.equal(logits_of(model, ids), before)


def test_two_compositions_may_share_their_bases() -> None:
    anchor, augmenting = tiny_model("llama", seed=1), tiny_model("gpt2", seed=2)
    ids = tiny_tokens()
    alone = logits_of(anchor, ids)
    first = calmlm.compose(anchor, augmenting, connections=2)
    with torch.no_grad():
        for connector in first.model.connectors["augmenting"]:
            connector.o_proj.weight.normal_()
    awake = logits_of(first, ids)
    second = calmlm.compose(anchor, augmenting, connections=1)
    assert torch.equal(logits_of(second, ids), alone)
    assert torch.equal(logits_of(first, ids), awake)
