"""Drafts, static caches and compilation where the augmenting model reads the text in tokens of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import calmlm
from calmlm.tokens.respelling import Respelling
from compositions import awaken, greedy_without_cache, pad
from decoding.test_cache_generation import GREEDY
from decoding.test_drafting import eager
from readers.test_own_text import PAIRS, SCRIPTS, composed
from readers.test_readers import ENCODERS
from tiny import tiny_model, tiny_tokens
from tokenizers_tiny import tokenizer, with_beginning

TEXTS = ("hello world", "naïve café 😀 hé", SCRIPTS[8])


def repeating(
    pair: Any = PAIRS[0], text: str = "xwg", model: calmlm.CalmForCausalLM | None = None
) -> calmlm.CalmForCausalLM:
    """Composition and augmenting model go on with ``text`` over and over, whatever else they would say."""
    model = composed(pair) if model is None else model
    for kind, part in zip(pair[:2], (model, model.augmenting["augmenting"]), strict=True):
        ids = tokenizer(kind)(text * 3, add_special_tokens=False).input_ids
        ids = ids[len(ids) // 3 : 2 * len(ids) // 3]
        following = dict(zip(ids, ids[1:] + ids[:1], strict=True))
        part.register_forward_hook(_prefer(following, ids[0]), with_kwargs=True)
    return model


def _prefer(following: dict[int, int], first: int) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        ids = ids[:, -output.logits.shape[1] :]
        for row in range(len(ids)):
            for place in range(ids.shape[1]):
                output.logits[row, place, following.get(int(ids[row, place]), first)] += 100

    return hook


@pytest.mark.parametrize("options", [{}, {"augmenting_prefix": "a fox: "}], ids=["plain", "prefix"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_drafts_in_other_tokens_change_nothing(pair: Any, options: dict[str, Any]) -> None:
    model = composed(pair, augmenting_tokenizer=with_beginning(tokenizer(pair[1])), **options)
    drafted = 0
    for text in TEXTS:
        ids = tokenizer(pair[0])(text, return_tensors="pt", add_special_tokens=False).input_ids
        expected = greedy_without_cache(model, ids, 10)
        for drafting in (True, eager(), {}):
            given = {"drafting": drafting} if drafting else {"prompt_lookup_num_tokens": 3}
            assert torch.equal(model.generate(ids, max_new_tokens=10, **given, **GREEDY), expected)
            drafted += drafting.statistics.drafted if isinstance(drafting, calmlm.DraftConfig) else 0
    assert drafted or "wordpiece" in pair, "nothing was tried"


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2], PAIRS[4], PAIRS[6]], ids="+".join)
def test_drafts_that_are_accepted_spare_calls_of_the_anchor(pair: Any) -> None:
    model, drafting = repeating(pair), eager(num_tokens=6)
    ids = tokenizer(pair[0])("def xwg", return_tensors="pt", add_special_tokens=False).input_ids
    calls = []
    handle = model.model.backbone().decoder.register_forward_hook(lambda *_: calls.append(1))
    found = model.generate(ids, max_new_tokens=30, drafting=drafting, **GREEDY)
    handle.remove()
    assert torch.equal(found, greedy_without_cache(model, ids, 30))
    statistics = drafting.statistics
    assert statistics.acceptance > 0.9
    assert len(calls) == statistics.passes < 30 / 4
    assert statistics.tokens == 30


def test_drafts_end_where_the_text_ends_and_sampling_takes_them() -> None:
    model = repeating()
    ours = tokenizer("bytes")
    ids = ours("def xwg", return_tensors="pt", add_special_tokens=False).input_ids
    for token in ours("xwg").input_ids:
        options: dict[str, Any] = {"max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": token}
        plain = model.generate(ids, do_sample=False, **options)
        assert torch.equal(model.generate(ids, drafting=eager(), do_sample=False, **options), plain)
    options["eos_token_id"], drafting = None, eager()
    sampled = model.generate(ids, drafting=drafting, do_sample=True, **options)
    assert torch.equal(sampled, model.generate(ids, do_sample=False, **options)), "one token has all of the probability"
    assert drafting.statistics.acceptance > 0.9


def test_a_conversation_with_drafts_goes_on_with_its_cache() -> None:
    for model in (repeating(), composed(PAIRS[0])):
        text = tokenizer("bytes")("hello é", return_tensors="pt").input_ids
        told, cache = torch.ones_like(text, dtype=torch.bool), None
        for turn in range(3):
            expected = greedy_without_cache(model, text, 6, given=told)
            options = {**GREEDY, "attention_mask": torch.ones_like(text), "return_dict_in_generate": True}
            output = model.generate(text, max_new_tokens=6, past_key_values=cache, drafting=eager(), **options)
            assert torch.equal(output.sequences, expected)
            cache, new = output.past_key_values, tiny_tokens(1, 3, seed=turn)
            # The last token that was written has not been read: it comes with what is given next.
            written = torch.zeros(1, expected.shape[1] - text.shape[1] - 1, dtype=torch.bool)
            told = torch.cat((told, written, torch.ones(1, 4, dtype=torch.bool)), dim=1)
            text = torch.cat((expected, new), dim=1)


@pytest.mark.parametrize("assisted", [{"drafting": eager()}, {"prompt_lookup_num_tokens": 3}], ids=["drafts", "lookup"])
def test_drafts_end_with_the_positions_of_the_augmenting_model(assisted: dict[str, Any]) -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("characters")
    own = tiny_model("gpt2", seed=2, vocab_size=len(theirs), n_positions=24, max_position_embeddings=24)
    anchor = tiny_model("llama", seed=1, vocab_size=len(ours))
    composition = calmlm.compose(anchor, own, 2, tokenizer=ours, augmenting_tokenizer=theirs)
    model = repeating(("bytes", "characters"), model=awaken(composition))
    ids = ours("the", return_tensors="pt").input_ids
    for length in range(1, 40):  # as long as decoding token by token gets
        try:
            expected = model.generate(ids, max_new_tokens=length, **GREEDY)
        except calmlm.DataError:
            break
        assert torch.equal(model.generate(ids, max_new_tokens=length, **assisted, **GREEDY), expected)
    assert 1 < length < 39


def test_only_models_that_can_draft_are_asked() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("unigram")

    def made(**options: Any) -> calmlm.CalmForCausalLM:
        own = {"a": tiny_model("gpt2", vocab_size=len(theirs)), "b": tiny_model("qwen3", vocab_size=len(ours))}
        anchor = tiny_model("llama", seed=1, vocab_size=len(ours))
        tokenizers = {"tokenizer": ours, "augmenting_tokenizer": {"a": theirs}}
        return awaken(calmlm.compose(anchor, own, 2, **tokenizers, **options))

    ids = ours("hello", return_tensors="pt").input_ids
    model = made()
    expected = greedy_without_cache(model, ids, 8)
    for name in ("a", "b", None):
        drafting = eager(augmenting=name)
        assert torch.equal(model.generate(ids, max_new_tokens=8, drafting=drafting, **GREEDY), expected)
    transcoding = made(alignment={"a": "transcode"})
    with pytest.raises(calmlm.ConfigError, match="name one of these"):
        transcoding.generate(ids, max_new_tokens=2, drafting=calmlm.DraftConfig(augmenting="a"))


# Static caches and compilation


@pytest.mark.parametrize("alignment", ["own", "transcode", "retokenize"])
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[3], PAIRS[6]], ids="+".join)
def test_static_caches_change_nothing(pair: Any, alignment: str) -> None:
    model = composed(pair, alignment=alignment, augmenting_prefix="a fox: ")
    rows = [tokenizer(pair[0])(text, add_special_tokens=False, return_tensors="pt").input_ids[0] for text in TEXTS]
    ids, mask = pad(rows, "left")
    static = {**GREEDY, "cache_implementation": "static", "attention_mask": mask, "max_new_tokens": 8}
    expected = greedy_without_cache(model, ids, 8, mask)
    for _ in range(2):  # a static cache that is used again must start empty
        assert torch.equal(model.generate(ids, **static), expected)
    beams = {**static, "num_beams": 3}
    uncached = {**beams, "cache_implementation": None, "use_cache": False}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **uncached))


def test_static_caches_beside_encoders_and_models_that_share_ids() -> None:
    static = {**GREEDY, "cache_implementation": "static", "max_new_tokens": 8}
    parts = {"eyes": ENCODERS["bert"][0]().eval(), "shared": tiny_model("qwen3", seed=3)}
    model = awaken(calmlm.compose(tiny_model("llama", seed=1), parts, 2))
    ids, given = tiny_tokens(3, 6), {"augmenting_inputs": {"eyes": {"input_ids": tiny_tokens(3, 5) % 50}}}
    expected = model.generate(ids, max_new_tokens=8, use_cache=False, **GREEDY, **given)
    assert torch.equal(model.generate(ids, **static, **given), expected)


@pytest.mark.parametrize("beside", ["own", "transcode", "encoder"])
def test_static_caches_of_an_anchor_that_counts_its_keys_in_the_mask(beside: str) -> None:
    """Bloom's biases are as many as the mask has columns."""
    ours, theirs = tokenizer("bytes"), tokenizer("bytes-large")
    anchor, given = tiny_model("bloom", seed=1, vocab_size=len(ours)), {}
    rows = [ours(text, add_special_tokens=False, return_tensors="pt").input_ids[0] for text in TEXTS]
    ids, mask = pad(rows, "left")
    if beside == "encoder":
        model = calmlm.compose(anchor, {"eyes": ENCODERS["bert"][0]().eval()}, 2)
        given = {"augmenting_inputs": {"eyes": {"input_ids": tiny_tokens(len(rows), 5) % 50}}}
    else:
        own = tiny_model("llama", seed=2, vocab_size=len(theirs))
        model = calmlm.compose(anchor, own, 2, tokenizer=ours, augmenting_tokenizer=theirs, alignment=beside)
    options = {**GREEDY, **given, "attention_mask": mask, "max_new_tokens": 8}
    expected = awaken(model).generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("alignment", ["own", "transcode"])
def test_a_compiled_model_is_the_same(alignment: str) -> None:
    model = composed(PAIRS[0], alignment=alignment)
    rows = [tokenizer("bytes")(text, return_tensors="pt").input_ids[0] for text in ("hello world", "naïve")]
    ids, mask = pad(rows, "left")
    expected = greedy_without_cache(model, ids, 4, mask)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    for kind in (None, "static"):
        options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 4, "cache_implementation": kind}
        assert torch.equal(model.generate(ids, disable_compile=True, **options), expected)


# Spelling


def test_the_longest_token_that_fits_is_taken() -> None:
    write = Respelling([b"a", None, b"ab", b"b", b"", b" a", b"ab", "é".encode(), b"\xf0"])
    assert write(b"abab a") == [6, 6, 5], "of two of the same bytes, the later one"
    assert write("éa".encode()) == [7, 0]
    assert write(b"aZb") == [0], "what no token begins ends it"
    assert write(b"") == []
    assert Respelling([None])(b"a") == []
