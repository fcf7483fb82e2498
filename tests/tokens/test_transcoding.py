"""The table from one tokenizer to another at its edges: ids that it lacks, roles that one token shares, families."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import calmlm
from calmlm.tokens.alignment import LOOKBACK, Alignment
from calmlm.tokens.spelling import Spelling
from calmlm.tokens.transcoding import Transcoder
from compositions import assert_close, assert_helpful, awaken, logits_of, pad
from tiny import CHAT_TEMPLATE, tiny_model
from tokenizers_tiny import CORPUS, SPECIAL, _unigram, _wrapped, tokenizer


def written(ours: Any, theirs: Any, ids: list[int]) -> list[int]:
    batch = torch.tensor([ids], dtype=torch.long)
    transcoder = Transcoder(Alignment.between(ours, theirs))
    return transcoder(batch, torch.ones_like(batch, dtype=torch.bool), torch.full((1, LOOKBACK), -1)).ids[0].tolist()


def test_a_tokenizer_is_looked_at_once_and_not_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, look = [], Spelling.of
    monkeypatch.setattr(Spelling, "of", lambda *given: calls.append(given) or look(*given))
    Alignment.between(tokenizer("bytes"), tokenizer("unigram"))
    assert len(calls) < 5


def test_the_first_token_after_the_beginning_is_the_first_of_the_text() -> None:
    pieces, ours = tokenizer("sentencepiece"), tokenizer("bytes")
    text = "hello world"
    for one, other in ((pieces, ours), (ours, pieces)):
        ids = [one.bos_token_id, *one(text, add_special_tokens=False).input_ids]
        found = written(one, other, ids)
        assert found[0] == other.bos_token_id
        assert other.decode(found[1:]) == text
        assert found[1:] == written(one, other, ids[1:])


def test_a_token_with_several_roles_keeps_the_one_that_counts() -> None:
    ours, theirs = copy.deepcopy(tokenizer("bytes")), copy.deepcopy(tokenizer("unigram"))
    ours.add_special_tokens(dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|end|>"))
    end, letter = ours.eos_token_id, ours("h", add_special_tokens=False).input_ids
    found = written(ours, theirs, [end, *letter, end])
    assert (found[0], found[-1]) == (theirs.bos_token_id, theirs.eos_token_id)


def test_ids_beyond_the_tokenizer_say_nothing() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("bytes-large")
    ids = ours("hello", add_special_tokens=False).input_ids
    for k in range(len(ids) + 1):
        padded = [*ids[:k], len(ours) + 7, *ids[k:]]
        assert theirs.decode(written(ours, theirs, padded)) == "hello"
    model = calmlm.compose(
        tiny_model("llama", vocab_size=len(ours) + 20),
        tiny_model("gpt2", vocab_size=len(theirs)),
        2,
        tokenizer=ours,
        augmenting_tokenizer=theirs,
    )
    logits_of(awaken(model), torch.tensor([[len(ours) + 19, *ids, len(ours) + 3, *ids]]))


def test_a_mark_at_the_end_of_words_is_written_word_by_word() -> None:
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    ours, theirs = tokenizer("bytes-large"), _wrapped(backend)
    ids = ours("hello world, 12", add_special_tokens=False).input_ids
    assert "<unk>" not in theirs.convert_ids_to_tokens(written(ours, theirs, ids))
    assert theirs.decode(written(ours, theirs, ids)).replace(" ", "") == "helloworld,12"


def test_a_tokenizer_too_large_for_its_model_is_refused() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("bytes-large")
    with pytest.raises(calmlm.ModelError) as caught:
        calmlm.compose(
            tiny_model("llama", vocab_size=len(ours)),
            tiny_model("gpt2", vocab_size=100),
            2,
            tokenizer=ours,
            augmenting_tokenizer=theirs,
        )
    assert_helpful(caught.value, "100", "augmenting tokenizer")


@pytest.mark.parametrize("kind", ["cross_attention", "flamingo"])
def test_a_token_that_sees_nothing_is_left_alone_with_a_null_key_too(kind: str) -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("unigram")
    model = calmlm.compose(
        tiny_model("llama", vocab_size=len(ours)),
        tiny_model("gpt2", vocab_size=len(theirs)),
        2,
        connector=kind,
        null_key=True,
        tokenizer=ours,
        augmenting_tokenizer=theirs,
    )
    awaken(model)
    ids = ours("😀 hello", return_tensors="pt", add_special_tokens=False).input_ids
    full = logits_of(model, ids)
    assert torch.equal(full[:, :1], model.anchor(ids).logits[:, :1])
    with torch.no_grad():
        first = model(ids[:, :1], use_cache=True)
        rest = model(ids[:, 1:], past_key_values=first.past_key_values)
    assert_close(torch.cat((first.logits, rest.logits), dim=1), full, 1e-4)


def test_a_changed_tokenizer_is_noticed(tmp_path: Path) -> None:
    for name, kind, family in (("m_B", "bytes", "llama"), ("m_A", "unigram", "gpt2")):
        tiny_model(family, vocab_size=len(tokenizer(kind))).save_pretrained(tmp_path / name)
        tokenizer(kind).save_pretrained(tmp_path / name)
    calmlm.compose(tmp_path / "m_B", tmp_path / "m_A", 2).save_pretrained(tmp_path / "composition")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition")
    tokenizer("wordpiece").save_pretrained(tmp_path / "m_A")
    with pytest.warns(UserWarning, match="tokenizer"):
        calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition")


def test_case_and_accents_are_those_of_the_augmenting_tokenizer() -> None:
    backend = _unigram()
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    ours, theirs = tokenizer("bytes"), _wrapped(backend)
    ids = ours("Hello Wörld", add_special_tokens=False).input_ids
    assert theirs.decode(written(ours, theirs, ids)) == "hello world"


def test_leading_spaces_survive_a_prepended_one() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("sentencepiece")
    for text in ("hello", " hello", "  hello"):
        ids = ours(text, add_special_tokens=False).input_ids
        assert theirs.decode(written(ours, theirs, ids)) == text


@pytest.mark.parametrize(("ours", "theirs"), [("wordpiece", "bytes"), ("unigram", "bytes-large"), ("bytes", "unigram")])
@pytest.mark.parametrize("gap", [2, 40])
def test_padding_between_turns_is_passed_over(ours: str, theirs: str, gap: int) -> None:
    transcoder = Transcoder(Alignment.between(tokenizer(ours), tokenizer(theirs)))
    before = tokenizer(ours)("hello world the", add_special_tokens=False).input_ids[-LOOKBACK:]
    ids = tokenizer(ours)("quick fox", add_special_tokens=False).input_ids
    padded = torch.tensor([[0] * gap + ids])
    real = torch.tensor([[False] * gap + [True] * len(ids)])
    alone = torch.tensor([ids])
    for past in (before, []):
        previous = torch.tensor([[-1] * (LOOKBACK - len(past)) + past])
        expected = transcoder(alone, torch.ones_like(alone, dtype=torch.bool), previous).ids
        assert torch.equal(transcoder(padded, real, previous).ids, expected)


def test_an_augmenting_tokenizer_without_an_unknown_token_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"hello": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(calmlm.ModelError) as caught:
        Alignment.between(tokenizer("bytes"), theirs)
    assert_helpful(caught.value, "unknown token")


@pytest.mark.parametrize("text", ["1+1", "\nhi", "你", " x", "  x", "hello"])
def test_a_space_that_begins_a_text_is_neither_lost_nor_doubled(text: str) -> None:
    """Llama's tokenizer begins some texts with a token that is its own space and nothing else."""
    ours, theirs = tokenizer("sentencepiece"), copy.deepcopy(tokenizer("sentencepiece"))
    theirs.add_tokens(["something else"])
    ids = ours(text, add_special_tokens=False).input_ids
    assert written(ours, theirs, ids) == ids


def test_a_space_comes_before_a_character_that_begins_in_bytes() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("sentencepiece")
    text = "😀 hi"
    found = written(ours, theirs, ours(text, add_special_tokens=False).input_ids)
    assert found == theirs(text, add_special_tokens=False).input_ids


def test_byte_level_tokenizers_may_begin_texts_with_a_space_of_their_own() -> None:
    ours, theirs = tokenizer("bytes"), copy.deepcopy(tokenizer("bytes-large"))
    data = json.loads(theirs.backend_tokenizer.to_str())
    data["pre_tokenizer"]["add_prefix_space"] = True
    theirs._tokenizer = Tokenizer.from_str(json.dumps(data))
    for text in ("hello world", " hello"):
        found = written(ours, theirs, ours(text, add_special_tokens=False).input_ids)
        assert theirs.decode(found) == theirs.decode(theirs(text, add_special_tokens=False).input_ids)


def test_padding_needs_no_embedding() -> None:
    ours, theirs = tokenizer("bytes"), copy.deepcopy(tokenizer("unigram"))
    size = len(theirs)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    for alignment in ("transcode", "retokenize"):
        models = tiny_model("llama", vocab_size=len(ours)), tiny_model("gpt2", vocab_size=size)
        model = calmlm.compose(*models, 1, tokenizer=ours, augmenting_tokenizer=theirs, alignment=alignment)
        rows = [ours(text, return_tensors="pt").input_ids[0] for text in ("hello world, the quick", "def")]
        ids, mask = pad(rows, "left")
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("changed", ["role", "anchor's template", "augmenting model's template"])
def test_changed_roles_and_templates_are_noticed(changed: str, tmp_path: Path) -> None:
    ours, theirs = copy.deepcopy(tokenizer("bytes")), copy.deepcopy(tokenizer("bytes-large"))
    ours.chat_template = theirs.chat_template = CHAT_TEMPLATE
    for name, made, family in (("anchor", ours, "llama"), ("augmenting", theirs, "gpt2")):
        tiny_model(family, vocab_size=len(made)).save_pretrained(tmp_path / name)
        made.save_pretrained(tmp_path / name)
    model = calmlm.compose(tmp_path / "anchor", tmp_path / "augmenting", 1, augmenting_view="template")
    model.save_pretrained(tmp_path / "composition")
    calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition")  # unchanged, it says nothing
    ours.pad_token = ours.eos_token
    ours.save_pretrained(tmp_path / "anchor")
    calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition")  # nor of what pads
    if changed == "role":
        ours.bos_token = "</s>"
    else:
        (ours if "anchor" in changed else theirs).chat_template = CHAT_TEMPLATE + " "
    ours.save_pretrained(tmp_path / "anchor")
    theirs.save_pretrained(tmp_path / "augmenting")
    with pytest.warns(UserWarning, match="is not the one that this composition was made with"):
        calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition")


def test_marks_on_letters_do_not_break_words() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("wordpiece")
    for text in ("naïve", "naïve café"):
        found = written(ours, theirs, ours(text, add_special_tokens=False).input_ids)
        assert theirs.decode(found) == theirs.decode(theirs(text, add_special_tokens=False).input_ids)
