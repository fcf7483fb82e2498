"""Generation with caches equals its reference without any, token for token, in every mode that transformers offers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import calmlm
from compositions import (
    Streamer,
    assert_close,
    greedy_without_cache,
    logits_in_pieces,
    logits_of,
    pad,
    tiny_composition,
)
from tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import tokenizer, with_beginning

EVERYTHING = {"gate": True, "rotary": True, "query_key_bias": 1.5, "null_key": True}
OPENED: dict[str, Any] = {
    "tokenizer": tiny_tokenizer(),
    "augmenting_tokenizer": with_beginning(tiny_tokenizer()),
    "augmenting_prefix": "a fox:",
}
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "llama+gpt2": {},
    "llama+gpt2, all options": EVERYTHING,
    "gpt2+mistral": {"anchor": "gpt2", "augmenting": "mistral", "augmenting_options": {"sliding_window": 4}},
    "gemma3+llama": {"anchor": "gemma3_text", "augmenting": "llama", "anchor_options": {"sliding_window": 3}},
    "mistral+gemma3, all options": {
        "anchor": "mistral",
        "augmenting": "gemma3_text",
        "anchor_options": {"sliding_window": 5},
        "augmenting_options": {"sliding_window": 3},
        **EVERYTHING,
    },
    "bloom+falcon": {"anchor": "bloom", "augmenting": "falcon"},
    "qwen3+opt": {"anchor": "qwen3", "augmenting": "opt", "connections": [(0, 0), (4, 3)]},
    "mistral+gemma3, beginning and prefix": {
        "anchor": "mistral",
        "augmenting": "gemma3_text",
        "augmenting_options": {"sliding_window": 5},
        **OPENED,
    },
    "llama+gemma3, own tokens, beginning and prefix": {
        "anchor": "llama",
        "augmenting": "gemma3_text",
        "augmenting_options": {"sliding_window": 5, "vocab_size": len(tokenizer("bytes-large"))},
        **OPENED,
        "augmenting_tokenizer": with_beginning(tokenizer("bytes-large")),
        **EVERYTHING,
    },
}
FAMILIES_WITH_SDPA = [name for name in COMPOSITIONS if "bloom" not in name]
STATIC = FAMILIES_WITH_SDPA
NOT_ASSISTED = ["mistral+gemma3, all options", "qwen3+opt"]
ASSISTED = [name for name in COMPOSITIONS if name not in NOT_ASSISTED]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ROWS = [tiny_tokens(1, length, seed=length)[0] for length in (7, 3, 5)]


@pytest.fixture(params=COMPOSITIONS, scope="module")
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    return tiny_composition(**COMPOSITIONS[request.param])


@pytest.fixture(scope="module")
def llama() -> calmlm.CalmForCausalLM:
    return tiny_composition(**EVERYTHING)


def forget(model: calmlm.CalmForCausalLM) -> calmlm.CalmForCausalLM:
    """A copy whose cross-attention forgets the augmenting model: what a test of generation must tell from the model."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for connector in other.model.connectors["augmenting"]:
            connector.o_proj.weight.zero_()
    return other


# Logits


def test_cached_logits_equal_uncached_ones_token_by_token(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(2, 12)
    expected = logits_of(model, ids)
    cache = None
    with torch.no_grad():
        for position in range(12):
            output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            assert isinstance(cache, calmlm.CalmCache)
            assert cache.get_seq_length() == position + 1
            assert_close(output.logits[:, 0], expected[:, position], 1e-4)


@pytest.mark.parametrize("pieces", [(5, 7), (1, 4, 4, 3), (11, 1)], ids=str)
def test_a_prompt_may_come_in_pieces(model: calmlm.CalmForCausalLM, pieces: tuple[int, ...]) -> None:
    ids = tiny_tokens(2, 12)
    assert_close(logits_in_pieces(model, ids, pieces), logits_of(model, ids), 1e-4)


def test_each_model_keeps_its_own_cache_and_the_cross_attention_its_own() -> None:
    model = tiny_composition("llama", "gpt2", connections=3)
    with torch.no_grad():
        cache = model(input_ids=tiny_tokens(2, 6), use_cache=True).past_key_values
    # Llama: 2 key-value heads of width 8, 5 layers. GPT-2: 5 of width 7, 5 layers. Cross: 6 heads of width 8, 3 layers.
    assert [tuple(layer.keys.shape) for layer in cache.anchor.layers] == [(2, 2, 6, 8)] * 5
    assert [tuple(layer.keys.shape) for layer in cache.augmenting["augmenting"].layers] == [(2, 5, 6, 7)] * 5
    assert [tuple(layer.keys.shape) for layer in cache.cross["augmenting"].layers] == [(2, 6, 6, 8)] * 3


def test_an_empty_cache_of_the_callers_is_filled(llama: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(1, 6)
    expected = logits_of(llama, ids)
    static = StaticCache(config=llama.anchor.config, max_cache_len=9)
    for given in (DynamicCache(), DynamicCache(config=llama.anchor.config), static):
        with torch.no_grad():
            first = llama(input_ids=ids[:, :4], past_key_values=given)
            second = llama(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
        assert_close(torch.cat((first.logits, second.logits), dim=1), expected, 1e-4)


def test_a_cache_can_be_cropped_selected_repeated_and_reset(llama: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(3, 8)
    with torch.no_grad():
        full = llama(input_ids=ids, use_cache=True).past_key_values
        for change, rows in (
            (lambda cache: cache.crop(-3), [0, 1, 2]),
            (lambda cache: (cache.crop(-3), cache.batch_select_indices(torch.tensor([2, 0]))), [2, 0]),
            (lambda cache: (cache.crop(-3), cache.reorder_cache(torch.tensor([1, 1, 0]))), [1, 1, 0]),
            (lambda cache: (cache.crop(-3), cache.batch_repeat_interleave(2)), [0, 0, 1, 1, 2, 2]),
        ):
            cache = copy.deepcopy(full)
            change(cache)
            found = llama(input_ids=ids[rows, 5:], past_key_values=cache).logits
            assert_close(found, logits_of(llama, ids[rows])[:, 5:], 1e-4)


# Generation


@pytest.mark.parametrize("side", ["none", "left"])
def test_greedy(model: calmlm.CalmForCausalLM, side: str) -> None:
    if side == "left":
        ids, mask = pad(ROWS, "left")
    else:
        ids = tiny_tokens(2, 5)
        mask = torch.ones_like(ids)
    expected = greedy_without_cache(model, ids, 10, mask)
    for use_cache in (True, False):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=10, use_cache=use_cache, **GREEDY)
        assert torch.equal(found, expected)
    assert not torch.equal(greedy_without_cache(forget(model), ids, 10, mask), expected)


@pytest.mark.parametrize("name", FAMILIES_WITH_SDPA)
def test_greedy_with_sdpa(name: str) -> None:
    model = tiny_composition(attn_implementation="sdpa", **COMPOSITIONS[name])
    ids, mask = pad(ROWS, "left")
    found = model.generate(ids, attention_mask=mask, max_new_tokens=10, **GREEDY)
    assert torch.equal(found, greedy_without_cache(tiny_composition(**COMPOSITIONS[name]), ids, 10, mask))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "temperature": 1.7, "top_p": 0.9, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=lambda options: "+".join(options),
)
def test_sampling_and_beams_equal_their_uncached_reference(
    model: calmlm.CalmForCausalLM, options: dict[str, Any]
) -> None:
    ids, mask = pad(ROWS, "left")
    options = {**GREEDY, "eos_token_id": 2, "max_new_tokens": 9, **options}
    results = []
    for use_cache in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            results.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*results)
    assert results[0].shape[0] == 3 * options.get("num_return_sequences", 1)


def test_scores_of_generation_are_the_logits(llama: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(2, 5)
    output = llama.generate(ids, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **GREEDY)
    expected = logits_of(llama, output.sequences)[:, 4:-1]
    assert_close(torch.stack(output.logits, dim=1), expected, 1e-4)
    assert isinstance(output.past_key_values, calmlm.CalmCache)


@pytest.mark.parametrize("name", ASSISTED)
def test_assisted_generation(name: str) -> None:
    model = tiny_composition(**COMPOSITIONS[name])
    ids = torch.cat((ROWS[0], ROWS[0], ROWS[0]))[None]
    expected = greedy_without_cache(model, ids, 14)
    options = {**GREEDY, "max_new_tokens": 14}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **options), expected)
    # A draft that is often wrong, one that is always right, and the composition's own anchor.
    drafts = {
        "other": tiny_model("qwen2", seed=5),
        "composition": tiny_composition(**COMPOSITIONS[name]),
        "anchor": copy.deepcopy(model.anchor),
    }
    for draft in drafts.values():
        draft.generation_config.num_assistant_tokens = 4
        assert torch.equal(model.generate(ids, assistant_model=draft, **options), expected)


def test_a_composition_may_draft_for_another_model() -> None:
    target = tiny_model("llama", seed=1)
    ids = tiny_tokens(1, 6)
    options = {**GREEDY, "max_new_tokens": 12}
    assert torch.equal(
        target.generate(ids, assistant_model=tiny_composition(), **options), target.generate(ids, **options)
    )


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_chunked_prefill(name: str) -> None:
    model = tiny_composition(**COMPOSITIONS[name])
    ids, mask = pad([torch.cat((ROWS[0], ROWS[1])), ROWS[2]], "left")
    expected = greedy_without_cache(model, ids, 6, mask)
    for size in (1, 4, 64):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, prefill_chunk_size=size, **GREEDY)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", STATIC)
def test_static_cache(name: str, attn_implementation: str) -> None:
    model = tiny_composition(attn_implementation=attn_implementation, **COMPOSITIONS[name])
    ids, mask = pad(ROWS, "left")
    expected = greedy_without_cache(model, ids, 8, mask)
    options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 8, "cache_implementation": "static"}
    # Without compilation, whose own tests take minutes.
    found = model.generate(ids, disable_compile=True, **options)
    assert torch.equal(found, expected)
    again = model.generate(ids, disable_compile=True, **options)
    assert torch.equal(again, expected), "a static cache that is used again must start empty"
    beams = {**options, "num_beams": 3, "disable_compile": True}
    uncached = {**beams, "cache_implementation": None, "use_cache": False}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **uncached))


def test_a_conversation_goes_on_with_its_cache(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(1, 5)
    cache = None
    for turn in range(3):
        expected = greedy_without_cache(model, ids, 5)
        # The mask is given, since generate takes a generated padding token for padding otherwise.
        options = {**GREEDY, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
        output = model.generate(ids, max_new_tokens=5, past_key_values=cache, **options)
        assert torch.equal(output.sequences, expected)
        cache = output.past_key_values
        ids = torch.cat((output.sequences, tiny_tokens(1, 3, seed=turn)), dim=1)


def test_an_ended_row_is_padded_and_the_others_go_on(llama: calmlm.CalmForCausalLM) -> None:
    ids, mask = pad(ROWS, "left")
    free = greedy_without_cache(llama, ids, 8, mask)
    end = int(free[0, ids.shape[1] + 2])
    found = llama.generate(ids, attention_mask=mask, max_new_tokens=8, **{**GREEDY, "eos_token_id": end})
    for row in range(3):
        new = free[row, ids.shape[1] :].tolist()
        stop = new.index(end) + 1 if end in new else len(new)
        assert found[row, ids.shape[1] :].tolist() == (new[:stop] + [0] * len(new))[: found.shape[1] - ids.shape[1]]


def test_generation_leaves_the_cache_switch_and_the_models_as_they_were(llama: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(1, 5)
    before = logits_of(llama, ids)
    llama.generate(ids, max_new_tokens=3, num_beams=2, **GREEDY)
    assert llama.model.slot.call is None
    assert torch.equal(logits_of(llama, ids), before)


def test_a_streamer_gets_every_token(llama: calmlm.CalmForCausalLM) -> None:
    streamer, ids = Streamer(), tiny_tokens(1, 5)
    found = llama.generate(ids, max_new_tokens=6, streamer=streamer, **GREEDY)
    assert streamer.tokens == [*found[0].tolist(), -1]


@pytest.mark.slow
def test_a_compiled_static_cache_equals_the_reference() -> None:
    model = tiny_composition(attn_implementation="sdpa", **EVERYTHING)
    ids, mask = pad(ROWS, "left")
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    expected = greedy_without_cache(model, ids, 6, mask)
    model.forward = step
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, cache_implementation="static", disable_compile=True, **GREEDY
    )
    assert torch.equal(found, expected)
