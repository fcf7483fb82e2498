"""Models that keep their past as a state instead of keys and values, as anchors and as augmenting models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import calmlm
from compositions import assert_close, assert_helpful, awaken, greedy_without_cache, logits_of, pad
from decoding.test_cache_generation import GREEDY
from tiny import VOCAB_SIZE, tiny_model, tiny_tokens

SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "bamba": {
        "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "attn_layer_indices": [1, 3],
    },
}  # fmt: skip
CONTINUING = ("mamba2", "bamba")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def recurrent(family: str, seed: int = 1) -> PreTrainedModel:
    """A tiny model of linear attention, large enough in its weights that each token counts."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=4, **SPECIAL, **SIZES[family]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and "A_log" not in name:
                    parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def composition(family: str, position: str, **options: Any) -> calmlm.CalmForCausalLM:
    """A recurrent model with Llama."""
    pair = recurrent(family), tiny_model("llama", seed=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return awaken(calmlm.compose(*(pair if position == "anchor" else pair[::-1]), connections=2, **options))


@pytest.mark.parametrize("options", [{}, {"refresh": False}], ids=str)
def test_a_cache_counts_the_tokens_of_an_anchor_without_attention(options: dict[str, Any]) -> None:
    model, ids = composition("mamba2", "anchor", **options), tiny_tokens(1, 6)
    first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    assert first.past_key_values.get_seq_length() == 10
    text = torch.cat((first.sequences, tiny_tokens(1, 3, seed=5)), 1)
    expected = text
    for _ in range(6):
        prompt = torch.arange(expected.shape[1])[None] < 6
        given = {"prompt_mask": prompt} if options else {}
        with torch.no_grad():
            logits = model(input_ids=expected, use_cache=False, **given).logits
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), 1)
    found = model.generate(text, past_key_values=first.past_key_values, max_new_tokens=6, **GREEDY)
    assert torch.equal(found, expected)


def test_a_cache_counts_where_all_augmenting_models_are_silent() -> None:
    model, ids = composition("mamba2", "anchor"), tiny_tokens(2, 6)
    model.disable_augmenting("augmenting")
    expected = greedy_without_cache(model, ids, 5)
    found = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(found.sequences, expected[:, :9])
    cache = found.past_key_values
    assert cache.get_seq_length() == 8
    assert torch.equal(model.generate(found.sequences, past_key_values=cache, max_new_tokens=2, **GREEDY), expected)
    cache.reset()
    assert cache.get_seq_length() == 0


BOTH = pytest.mark.parametrize("position", ["anchor", "augmenting"])
FAMILY = pytest.mark.parametrize("family", SIZES)


@BOTH
@FAMILY
def test_a_padded_batch_with_a_cache(family: str, position: str) -> None:
    model = composition(family, position)
    rows = [tiny_tokens(1, length, seed=length)[0] for length in (3, 9)]
    ids, mask = pad(rows, "left")
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        following = torch.tensor([[11], [12]])
        longer = torch.cat((mask, torch.ones_like(following)), 1)
        found = model(input_ids=following, attention_mask=longer, past_key_values=cache).logits[:, -1]
    for index, row in enumerate(rows):
        expected = logits_of(model, torch.cat((row, following[index]))[None])[0, -1]
        assert_close(found[index], expected, 1e-4)
    expected = greedy_without_cache(model, ids, 8, mask)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY), expected)


@BOTH
@FAMILY
def test_several_tokens_behind_a_cache(family: str, position: str) -> None:
    """Some recurrent models forget their state where several tokens come at once: those are refused."""
    model, ids = composition(family, position), tiny_tokens(2, 9)
    expected = logits_of(model, ids)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        one = model(input_ids=ids[:, 5:6], past_key_values=cache).logits
        assert_close(one, expected[:, 5:6], 1e-4)
        if family in CONTINUING:
            assert_close(model(input_ids=ids[:, 6:], past_key_values=cache).logits, expected[:, 6:], 1e-4)
            return
        with pytest.raises(calmlm.DataError) as error:
            model(input_ids=ids[:, 6:], past_key_values=cache)
        assert_helpful(error.value, position, "one by one", "prefill_chunk_size")
        assert_close(model(input_ids=ids[:, 6:7], past_key_values=cache).logits, expected[:, 6:7], 1e-4)
    with pytest.raises(calmlm.DataError, match="one by one"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=4, **GREEDY)


@BOTH
@FAMILY
def test_a_static_cache(family: str, position: str) -> None:
    model = composition(family, position)
    ids, mask = pad([tiny_tokens(1, length, seed=length)[0] for length in (3, 9)], "left")
    expected = greedy_without_cache(model, ids, 6, mask)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, **static, **GREEDY), expected)


def test_drafts_come_back_when_the_recurrent_model_goes() -> None:
    bases = {"recurrent": recurrent("mamba2"), "other": tiny_model("gpt2", seed=4)}
    model, ids = awaken(calmlm.compose(tiny_model("llama", seed=2), bases, connections=2)), tiny_tokens(1, 6)
    options = {**GREEDY, "max_new_tokens": 6}
    with pytest.raises(calmlm.ConfigError, match="form of its own"):
        model.generate(ids, drafting=True, **options)
    model.disable_augmenting("recurrent")
    assert torch.equal(model.generate(ids, drafting=True, **options), greedy_without_cache(model, ids, 6))
    model.enable_augmenting("recurrent")
    model.remove_augmenting("recurrent")
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), greedy_without_cache(model, ids, 6))
