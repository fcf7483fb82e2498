"""Rows of a batch that end sooner are filled up with padding: their conversation goes on as if nothing stood there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from compositions import assert_close, assert_helpful, awaken, greedy_without_cache, pad, tiny_composition
from decoding.test_cache_generation import GREEDY
from readers.test_readers import ENCODERS
from tiny import tiny_model, tiny_tokens
from tokenizers_tiny import tokenizer


def aligned(**options: Any) -> calmlm.CalmForCausalLM:
    """Bytes and a unigram model, each with its own tokenizer."""
    ours, theirs = tokenizer("bytes"), tokenizer("unigram")
    anchor = tiny_model("llama", seed=1, vocab_size=len(ours))
    augmenting = tiny_model("gpt2", seed=2, vocab_size=len(theirs))
    return awaken(
        calmlm.compose(anchor, augmenting, 2, tokenizer=ours, augmenting_tokenizer=theirs, num_heads=4, **options)
    )


def seeing(**options: Any) -> calmlm.CalmForCausalLM:
    """An anchor beside an encoder of text."""
    torch.manual_seed(0)
    anchor = tiny_model("llama", seed=1)
    return awaken(calmlm.compose(anchor, {"eyes": ENCODERS["bert"][0]().eval()}, 2, num_heads=4, **options))


MODELS = {
    "shared": lambda: tiny_composition(rotary=True),
    "own": aligned,
    "own, rotary": lambda: aligned(rotary=True, null_key=True),
    "transcode, rotary": lambda: aligned(alignment="transcode", rotary=True, null_key=True),
    "retokenize": lambda: aligned(alignment="retokenize"),
    "encoder, rotary": lambda: seeing(rotary=True),
}


def conversation(model: calmlm.CalmForCausalLM, **given: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Three rows of which one has ended sooner, the next turn behind them, its mask, what was given, and the cache."""
    if model.model.transcoders:
        rows = [torch.tensor(tokenizer("bytes")(text).input_ids) for text in ("hello world", "naïve café", "def f(x):")]
    else:
        rows = [tiny_tokens(1, length, seed=length)[0] for length in (5, 3, 8)]
    ids, mask = pad(rows, "left")
    end = int(model.generate(ids, attention_mask=mask, max_new_tokens=3, **GREEDY, **given)[0, -1])
    options = {**GREEDY, "eos_token_id": end, "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options, **given)
    new = first.sequences[:, ids.shape[1] :]
    written = ((new == end).cumsum(1) - (new == end).long()) == 0
    text = torch.cat((first.sequences, tiny_tokens(3, 3, seed=5)), dim=1)
    all_mask = torch.cat((mask, written.long(), torch.ones(3, 3, dtype=torch.long)), dim=1)
    told = torch.ones_like(all_mask, dtype=torch.bool)
    told[:, ids.shape[1] : first.sequences.shape[1]] = False
    return text, all_mask, told, first.past_key_values


@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_goes_on_behind_an_ended_row(name: str) -> None:
    model = MODELS[name]()
    given = {"augmenting_inputs": {"eyes": {"input_ids": tiny_tokens(3, 5) % 50}}} if "encoder" in name else {}
    text, mask, told, cache = conversation(model, **given)
    assert int(mask.sum(1)[0]) < int(mask[0].shape[0]), "no row has ended sooner"
    options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 8}
    # A model that reads its own tokens reads generated text otherwise than given text.
    prompt = {"prompt_mask": told} if model.model.wants_prompts else {}
    expected = model.generate(text, use_cache=False, **options, **prompt, **given)
    if not given:
        assert torch.equal(expected, greedy_without_cache(model, text, 8, mask, given=told))
    assert torch.equal(model.generate(text, past_key_values=cache, **options, **given), expected)


@torch.no_grad()
def test_the_last_generated_token_sees_what_it_saw_before_given_text_followed() -> None:
    model = aligned()
    ids = torch.tensor([tokenizer("bytes")("hello \x01\x02\x03\x04 1 1").input_ids])  # unknown ones become one token
    for end in range(1, ids.shape[1]):  # generated are the two tokens before
        told = torch.ones_like(ids, dtype=torch.bool)
        told[:, max(0, end - 2) : end] = False
        whole = model(ids, prompt_mask=told).logits
        first = model(ids[:, :end], prompt_mask=told[:, :end], use_cache=True)
        then = model(ids[:, end:], prompt_mask=told, past_key_values=first.past_key_values)
        assert_close(torch.cat((first.logits, then.logits), dim=1), whole, 1e-5)


def test_text_cannot_become_padding_once_other_text_follows_it() -> None:
    model = aligned()
    ids = torch.tensor([tokenizer("bytes")("hello world").input_ids])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        mask = torch.ones(1, ids.shape[1] + 1, dtype=torch.long)
        mask[0, 4] = 0
        for _ in range(2):  # the first time changes nothing, so that the second is refused as well
            with pytest.raises(calmlm.DataError) as error:
                model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    assert_helpful(error.value, "attention_mask", "padding")
