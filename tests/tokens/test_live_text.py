"""Token by token, a stream holds what the augmenting tokenizer makes of the text so far, however long the text is."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from calmlm.tokens.live_text import LONG, OwnStream, OwnWriter
from calmlm.tokens.parts import literal_encoder
from calmlm.tokens.retokenization import Rewriting
from tokenizers_tiny import AWKWARD, CORPUS, tokenizer

PROSE = " ".join(CORPUS[:3])


def changed(made: Any, **parts: Any) -> Any:
    """A copy of a tokenizer with other parts, as data."""
    made = copy.deepcopy(made)
    made._tokenizer = Tokenizer.from_str(json.dumps(json.loads(made.backend_tokenizer.to_str()) | parts))
    return made


def word_by_word() -> Any:
    """Spaces are left out, and each word is written behind one of its own: T5, XLM-RoBERTa, mBART, ALBERT."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    parts = [{"type": "WhitespaceSplit"}, metaspace]
    return changed(tokenizer("unigram"), pre_tokenizer={"type": "Sequence", "pretokenizers": parts})


def check_every_token(theirs: Any, text: str, given: int = 0) -> None:
    """Against the tokenizer itself on the text so far; byte-level anchor, so that its bytes are the text's.

    Args:
        theirs: the augmenting tokenizer.
        text: what comes.
        given: how many of its tokens were given; the tokens of these stay.
    """
    ours = tokenizer("bytes")
    stream = OwnStream(OwnWriter(Rewriting.between(ours, theirs, "own", None)))
    encode = literal_encoder(theirs.backend_tokenizer)
    ids = ours(text, add_special_tokens=False).input_ids
    found: list[int] = []
    for place, token in enumerate(ids):
        found += [index for index, _, _ in stream.read(token, place < given)]
        if place + 1 < given:
            continue
        so_far = ours.decode(ids[: place + 1])
        if "\ufffd" not in so_far:
            now = [*found, *(index for index, _, _ in stream.pending())]
            assert now == encode(so_far), so_far


@pytest.mark.parametrize("kind", ["bytes-large", "sentencepiece", "unigram", "wordpiece", "word by word"])
def test_long_texts(kind: str) -> None:
    theirs = word_by_word() if kind == "word by word" else tokenizer(kind)
    text = "\n".join((PROSE, *AWKWARD[:7]))
    assert len(text) > 2 * LONG
    check_every_token(theirs, text)


def test_words_that_each_bring_a_space_go_on_behind_a_prompt() -> None:
    check_every_token(word_by_word(), "hello world, the quick brown fox", given=9)


def test_a_word_is_unknown_as_a_whole() -> None:
    """WordPiece knows one word, and not what it is when letters of another script follow."""
    theirs = copy.deepcopy(tokenizer("wordpiece"))
    model = json.loads(theirs.backend_tokenizer.to_str())["model"]
    model["vocab"] |= {"पर": len(model["vocab"])}
    check_every_token(changed(theirs, model=model), "hello पर पर" + "x" * LONG)
