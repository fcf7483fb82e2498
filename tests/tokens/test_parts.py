"""Variants of a tokenizer that share its vocabulary read as the tokenizer itself, which stays as it is."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from calmlm.errors import ModelError
from calmlm.tokens.alignment import digest, is_of
from calmlm.tokens.parts import SavedTokenizer, literal, literal_encoder, parts_of
from tokenizers_tiny import AWKWARD, KINDS, tokenizer, with_beginning


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_reads_as_the_tokenizer(kind: str) -> None:
    backend = tokenizer(kind).backend_tokenizer
    before = backend.to_str()
    reader = literal(backend)
    for text in AWKWARD[:-1]:
        assert reader.encode(text).ids == backend.encode(text, add_special_tokens=False).ids
    assert reader.get_vocab() == backend.get_vocab()
    assert backend.to_str() == before


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_the_saved_tokenizer(kind: str) -> None:
    backend = tokenizer(kind).backend_tokenizer
    saved = json.loads(backend.to_str())
    found = parts_of(backend)
    assert {name: found[name] for name in ("normalizer", "pre_tokenizer", "decoder")} == {
        name: saved[name] for name in ("normalizer", "pre_tokenizer", "decoder")
    }
    assert found["model"]["type"] == saved["model"]["type"]


def test_special_tokens_are_text_and_nothing_is_added() -> None:
    made = with_beginning(tokenizer("bytes"))
    backend = made.backend_tokenizer
    backend.enable_truncation(3)
    assert backend.encode("a</s>bcdef").ids[:1] == [made.bos_token_id]
    ids = literal_encoder(backend)("a</s>bcdef")
    assert made.eos_token_id not in ids
    assert made.decode(ids) == "a</s>bcdef"
    assert backend.truncation is not None


def test_added_tokens_stay_text_of_their_own() -> None:
    backend = Tokenizer.from_str(tokenizer("bytes").backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("brown fox", normalized=False)])
    assert literal_encoder(backend)("a brown fox") == backend.encode("a brown fox", add_special_tokens=False).ids


def test_code_in_a_tokenizer_is_refused() -> None:
    class Splitter:
        def pre_tokenize(self, text: object) -> None: ...

    backend = Tokenizer.from_str(tokenizer("bytes").backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Splitter())
    with pytest.raises(ModelError, match="parts that can be saved"):
        parts_of(backend)


def test_a_saved_tokenizer_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tokenizer("unigram").backend_tokenizer.to_str()
    first = SavedTokenizer(saved, "<unk>")
    monkeypatch.setattr(Tokenizer, "from_str", None)
    second = SavedTokenizer(saved, "<unk>")
    assert second.backend_tokenizer is first.backend_tokenizer
    assert second.get_vocab() == tokenizer("unigram").get_vocab()
    assert second.unk_token_id == tokenizer("unigram").unk_token_id


def test_digests_of_both_versions_notice_changes() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("unigram")
    for old in (True, False):
        mark = digest(ours, theirs, old=old)
        assert is_of(mark, ours, theirs, templates=False)
        assert not is_of(mark, ours, tokenizer("sentencepiece"), templates=False)
        padded = with_beginning(theirs)
        padded.backend_tokenizer.post_processor = theirs.backend_tokenizer.post_processor
        padded.backend_tokenizer.enable_truncation(4)
        padded.backend_tokenizer.enable_padding(length=9)
        assert is_of(mark, ours, padded, templates=False)
