"""Retokenising: the augmenting tokenizer's own tokens, committed where nothing that follows can change them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calmlm
from calmlm.tokens.boundaries import class_of, literal_encoder
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.stream import Rewriter
from compositions import assert_close, awaken, greedy_without_cache, logits_of, pad
from tiny import tiny_model
from tokenizers_tiny import AWKWARD, KINDS, first_space_only, tokenizer

# One of these tokenizers has tokens that reach across words: its model reads late, and no less.
pytestmark = pytest.mark.filterwarnings("ignore:The augmenting tokenizer has tokens that reach across")

PAIRS = [
    ("bytes", "bytes-large"),
    ("bytes", "unigram"),
    ("bytes-large", "wordpiece"),
    ("sentencepiece", "bytes-large"),
    ("bytes", "sentencepiece"),
    ("characters", "bytes"),
    ("unigram", "bytes-large"),
]
# Anchors that write every byte, so that what they read is the text itself.
EXACT = [pair for pair in PAIRS if pair[0] in ("bytes", "bytes-large", "sentencepiece")]
FAMILIES = ["llama", "mistral", "gpt2", "gemma3_text", "qwen3", "bloom", "opt"]
TEXT = st.text(max_size=30) | st.text(alphabet="ab 1\n\t.'é你😀", max_size=30)


def rewriter(ours: str, theirs: str) -> Rewriter:
    made = Rewriting.between(tokenizer(ours), tokenizer(theirs), "retokenize", None)
    return Rewriter(Rewriting.from_json(json.loads(json.dumps(made.to_json()))))


REWRITERS = {pair: rewriter(*pair) for pair in PAIRS}


@pytest.mark.parametrize("pair", EXACT, ids="+".join)
@pytest.mark.parametrize("text", AWKWARD[:-1])
def test_a_text_that_has_ended_is_tokenized_as_its_tokenizer_does(pair: tuple[str, str], text: str) -> None:
    ours, theirs = tokenizer(pair[0]), tokenizer(pair[1])
    ids = ours(text, add_special_tokens=False).input_ids
    written = [index for index, _ in REWRITERS[pair].write([*ids, ours.eos_token_id])]
    assert written[:-1] == theirs(text, add_special_tokens=False).input_ids
    assert written[-1] == theirs.eos_token_id


def test_what_looks_like_a_special_token_stays_text() -> None:
    ours, theirs = tokenizer("characters"), tokenizer("bytes")
    ids = [index for letter in "<s>" for index in ours(letter, add_special_tokens=False).input_ids]
    written = [index for index, _ in REWRITERS["characters", "bytes"].write([*ids, ours.eos_token_id])]
    assert theirs.bos_token_id not in written


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@given(text=TEXT)
@settings(max_examples=25, deadline=None)
def test_the_stream_grows_at_its_end_alone(pair: tuple[str, str], text: str) -> None:
    writer, ids = REWRITERS[pair], tokenizer(pair[0])(text).input_ids
    full = writer.write(ids)
    for length in range(len(ids)):
        assert writer.write(ids[:length]) == [token for token in full if token[1] < length]


@pytest.mark.parametrize(("ours", "theirs"), [pair for pair in EXACT if pair[1].startswith("bytes")])
@given(text=TEXT)
@settings(max_examples=40, deadline=None)
def test_any_text_is_tokenized_canonically(ours: str, theirs: str, text: str) -> None:
    ids = tokenizer(ours)(text, add_special_tokens=False).input_ids
    whole = tokenizer(ours).decode(ids, clean_up_tokenization_spaces=False, skip_special_tokens=False)
    if whole != text:
        return  # a special token's name, or bytes that the anchor writes in another way
    written = [index for index, _ in REWRITERS[ours, theirs].write([*ids, tokenizer(ours).eos_token_id])][:-1]
    assert written == literal_encoder(tokenizer(theirs).backend_tokenizer)(text)


def test_nothing_is_committed_while_it_may_change() -> None:
    ours = tokenizer("bytes")
    ids = ours("the quick brown", add_special_tokens=False).input_ids
    writer = REWRITERS["bytes", "bytes-large"]
    committed = tokenizer("bytes-large").decode([index for index, _ in writer.write(ids)])
    assert committed == "the quick"  # "brown" may go on


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_reaches_across_a_place_that_counts_as_stable(kind: str) -> None:
    made = Rewriting.between(
        tokenizer("characters" if kind != "characters" else "bytes"), tokenizer(kind), "retokenize", None
    )
    theirs = tokenizer(kind)
    for token in theirs.get_vocab():
        text = theirs.decode([theirs.convert_tokens_to_ids(token)])
        if token not in theirs.all_special_tokens and "\ufffd" not in text:
            pairs = itertools.pairwise(class_of(character) for character in text)
            assert not set(pairs) & set(made.stable), token


@pytest.fixture(params=PAIRS, ids="+".join, scope="module")
def model(request: pytest.FixtureRequest) -> tuple[tuple[str, str], calmlm.CalmForCausalLM]:
    index = PAIRS.index(request.param)
    ours, theirs = (tokenizer(kind) for kind in request.param)
    made = calmlm.compose(
        tiny_model(FAMILIES[index], vocab_size=len(ours)),
        tiny_model(FAMILIES[(index + 1) % len(FAMILIES)], vocab_size=len(theirs)),
        2,
        tokenizer=ours,
        augmenting_tokenizer=theirs,
        alignment="retokenize",
    )
    return request.param, awaken(made)


def test_steps_equal_teacher_forcing(model: Any) -> None:
    pair, composed = model
    for text in AWKWARD[:5]:
        ids = tokenizer(pair[0])(text, return_tensors="pt").input_ids
        full, cache, parts = logits_of(composed, ids), None, []
        if REWRITERS[pair].write(ids[0].tolist()):  # of a text without a space nothing may be settled
            with composed.disable_composition():
                assert not torch.allclose(logits_of(composed, ids), full, atol=1e-3)
        with torch.no_grad():
            for position in range(ids.shape[1]):
                output = composed(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
        assert_close(torch.cat(parts, dim=1), full, 1e-4)


def test_batches_and_beams_equal_their_references(model: Any) -> None:
    pair, composed = model
    rows = [tokenizer(pair[0])(text, return_tensors="pt").input_ids[0] for text in AWKWARD[:3]]
    ids, mask = pad(rows, "left")
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}
    expected = greedy_without_cache(composed, ids, 6, mask)
    assert torch.equal(composed.generate(ids, attention_mask=mask, **options), expected)
    beams = [
        composed.generate(ids, attention_mask=mask, num_beams=3, use_cache=cached, **options)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)
    drafted = composed.generate(rows[0][None], prompt_lookup_num_tokens=3, **options)
    assert torch.equal(drafted[0], expected[0][mask.shape[1] - len(rows[0]) :])


def test_the_first_space_is_put_once_in_a_text() -> None:
    """With ``prepend_scheme="first"`` nothing is put before what follows a special token."""
    theirs = first_space_only(copy.deepcopy(tokenizer("sentencepiece")))
    writer = Rewriter(Rewriting.between(tokenizer("bytes"), theirs, "retokenize", None))
    text = "x</s>hi</s>"
    written = [index for index, _ in writer.write(tokenizer("bytes")(text).input_ids)]
    assert written == theirs(text, add_special_tokens=False).input_ids


def test_an_added_token_of_two_words_keeps_no_word_back() -> None:
    theirs = copy.deepcopy(tokenizer("bytes-large"))
    theirs.add_tokens(["New York"])
    writer = Rewriter(Rewriting.between(tokenizer("bytes"), theirs, "retokenize", None))
    text = "the quick brown fox is in New York and jumps"
    written = theirs.decode([index for index, _ in writer.write(tokenizer("bytes")(text).input_ids)])
    assert written == text.removesuffix(" jumps")


@pytest.mark.parametrize(("kind", "late"), [("bytes", False), ("unigram", False), ("sentencepiece", True)])
def test_tokens_that_reach_across_words_are_warned_of(kind: str, late: bool) -> None:
    ours, theirs = tokenizer("bytes"), tokenizer(kind)
    models = tiny_model("llama", vocab_size=len(ours)), tiny_model("gpt2", vocab_size=len(theirs))
    options = {"tokenizer": ours, "augmenting_tokenizer": theirs, "alignment": "retokenize"}
    with pytest.warns(UserWarning, match="across the ends of words") if late else contextlib.nullcontext():
        calmlm.compose(*models, 1, **options)
