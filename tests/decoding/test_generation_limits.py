"""Where generation meets a limit of one of the models, it goes on as without a cache, or an error says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, OpenAIGPTConfig, OpenAIGPTLMHeadModel, SynthIDTextWatermarkingConfig

import calmlm
from compositions import assert_helpful, greedy_without_cache, pad, tiny_composition
from decoding.test_cache_generation import GREEDY
from decoding.test_drafting import ASSISTED
from tiny import tiny_model, tiny_tokens


@pytest.mark.parametrize("assisted", [*ASSISTED, {"assistant_model": tiny_model("qwen3", seed=9)}], ids=str)
def test_padding_takes_no_room_in_a_learned_context(assisted: dict[str, Any]) -> None:
    """Three columns of padding before fourteen tokens leave room for ten in a context of 24."""
    model = tiny_composition("gpt2", "llama", anchor_options={"n_positions": 24, "max_position_embeddings": 24})
    ids, mask = pad([tiny_tokens(1, 14)[0], tiny_tokens(1, 17)[0]], "left")
    options = {**GREEDY, "attention_mask": mask[:1], "max_new_tokens": 11}
    expected = model.generate(ids[:1], **options)
    assert expected.shape[1] == 28
    assert torch.equal(model.generate(ids[:1], **options, **assisted), expected)


@pytest.mark.parametrize("assisted", ASSISTED, ids=["drafting", "lookup"])
def test_an_error_before_the_anchors_first_call_comes_out(assisted: dict[str, Any]) -> None:
    sizes = {"n_positions": 16, "max_position_embeddings": 16}
    model = tiny_composition("mistral", "gpt2", anchor_options={"sliding_window": 5}, augmenting_options=sizes)
    with pytest.raises(calmlm.DataError, match="at most 16 tokens"):
        model.generate(tiny_tokens(1, 17), max_new_tokens=4, **assisted, **GREEDY)


@pytest.mark.parametrize("assisted", ASSISTED, ids=["drafting", "lookup"])
def test_a_watermark_that_keeps_a_state_takes_no_drafts(assisted: dict[str, Any]) -> None:
    model, watermark = tiny_composition(), SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3, 4])
    with pytest.raises(calmlm.ConfigError) as error:
        model.generate(tiny_tokens(1, 6), watermarking_config=watermark, max_new_tokens=3, **assisted, **GREEDY)
    assert_helpful(error.value, "SynthID")


@pytest.mark.parametrize("position", ["anchor", "augmenting"])
def test_models_that_cannot_cache(position: str) -> None:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
    old = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)).eval()
    pair = (old, tiny_model("llama")) if position == "anchor" else (tiny_model("llama"), old)
    model, ids = calmlm.compose(*pair, connections=2), tiny_tokens(1, 6)
    assert torch.equal(model.generate(ids, max_new_tokens=3, **GREEDY), greedy_without_cache(model, ids, 3))
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model("qwen3")}):
        with pytest.raises(calmlm.ConfigError) as error:
            model.generate(ids, max_new_tokens=3, **options, **GREEDY)
        assert_helpful(error.value, "cache")
    for call in (
        lambda: model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=3, **GREEDY),
        lambda: model(input_ids=ids, past_key_values=DynamicCache()),
    ):
        with pytest.raises(calmlm.ConfigError) as error:
            call()
        assert_helpful(error.value, "past_key_values")


def test_lookup_without_a_cache_is_refused() -> None:
    with pytest.raises(calmlm.ConfigError) as error:
        tiny_composition().generate(tiny_tokens(1, 6), prompt_lookup_num_tokens=3, use_cache=False, max_new_tokens=3)
    assert_helpful(error.value, "use_cache=False")


def test_the_prompt_is_known_however_it_is_given() -> None:
    """Without a cache everything is read at each step, and what was generated is no part of the prompt."""
    model, ids = tiny_composition(refresh=False), tiny_tokens(2, 5)
    options = {**GREEDY, "max_new_tokens": 8}
    expected = model.generate(ids, **options)
    for given in ({"input_ids": ids}, {"inputs": ids}, {"inputs": None, "input_ids": ids}):
        assert torch.equal(model.generate(**given, use_cache=False, **options), expected)
    for further in ({}, {"composition_mask": torch.tensor([True, False])}):
        alone = [model.generate(bos_token_id=1, use_cache=use, **further, **options) for use in (True, False)]
        assert torch.equal(*alone)
        assert alone[0].shape == (max(1, len(further.get("composition_mask", []))), 9)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"drafting": True}], ids=str)
def test_token_types_reach_an_anchor_that_takes_them(options: dict[str, Any]) -> None:
    model, ids = tiny_composition("gpt2", "llama", awake=False), tiny_tokens(1, 6)
    types = torch.tensor([[5, 5, 7, 7, 5, 9]])
    common = {**GREEDY, "max_new_tokens": 6}
    expected = model.anchor.generate(
        ids, token_type_ids=types, **common, **{k: v for k, v in options.items() if k != "drafting"}
    )
    assert torch.equal(model.generate(ids, token_type_ids=types, **common, **options), expected)
    assert not torch.equal(model.generate(ids, **common), expected)
    with pytest.raises(ValueError, match="token_type_ids"):
        tiny_composition("llama", "gpt2").generate(ids, token_type_ids=types, **common)
