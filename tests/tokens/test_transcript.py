"""Text from tokens as they come: what was handed out is the text of all tokens, whole characters at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest

from calmlm.tokens.transcript import BROKEN, Transcript
from tokenizers_tiny import AWKWARD, KINDS, tokenizer


def pieces(words: Any, prompt: list[int], new: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    found = Transcript(words, prompt, stops)
    handed = []
    for token in new:
        handed.append(found.add(token))
        if found.stopped:
            break
    handed.append(found.finish())
    assert found.text == "".join(handed)
    return handed


def decoded(words: Any, ids: list[int]) -> str:
    return words.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole(kind: str) -> None:
    words = tokenizer(kind)
    for text in filter(None, AWKWARD):
        ids = words(text).input_ids
        for cut in range(len(ids)):
            before, whole = decoded(words, ids[:cut]), decoded(words, ids)
            handed = pieces(words, ids[:cut], ids[cut:])
            if BROKEN not in before and (not cut or decoded(words, ids[max(0, cut - 5) : cut])):
                assert "".join(handed) == whole[len(before) :]
            assert not any(BROKEN in piece for piece in handed[:-1])


def test_bytes_that_are_no_text_come_to_an_end() -> None:
    """Random bytes: what is handed out is what the tokenizer makes of all of them."""
    words, chance = tokenizer("bytes"), random.Random(0)
    for _ in range(20):
        ids = [chance.randrange(4, len(words)) for _ in range(30)]
        assert "".join(pieces(words, [], ids)) == decoded(words, ids)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("wor",), "hello "),
        (("o w", "hello world"), "hell"),
        (("ld!", "d"), "hello worl"),
        (("xyz",), "hello world"),
        (("world and more",), "hello world"),
    ],
)
def test_stop_strings(stops: tuple[str, ...], expected: str) -> None:
    words = tokenizer("bytes")
    assert "".join(pieces(words, [], words("hello world").input_ids, stops)) == expected


def test_nothing_is_handed_out_that_a_stop_string_takes_back() -> None:
    words = tokenizer("characters")
    handed = pieces(words, [], words("a qu a que").input_ids, (" que",))
    assert "".join(handed) == "a qu a"
    assert handed[:5] == ["a", "", "", "", " qu"]
