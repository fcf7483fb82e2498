"""Text is handed on as it is written, and as a whole it is what stands behind the prompt."""

from __future__ import annotations

import pytest
import torch

from calmlm.tokens.emitter import TextEmitter
from tokenizers_tiny import tokenizer as tokenizer_of


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram", "wordpiece", "characters"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_the_first_space_is_kept(kind: str, at_once: int) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer("hello world hello", add_special_tokens=False).input_ids
    prompt, new = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    before = tokenizer.decode(prompt)
    pieces: list[str] = []
    assert prompt
    emitter = TextEmitter(tokenizer, pieces.append)
    emitter.put(torch.tensor([prompt]))
    for start in range(0, len(new), at_once):
        emitter.put(torch.tensor(new[start : start + at_once]))
    emitter.end()
    emitter.end()
    assert before + "".join(pieces) == tokenizer.decode(ids) and all(pieces)
