"""What ``compose`` does where plain text is given and nothing else is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import calmlm
from calmlm.composing.manner import RECIPE
from compositions import assert_helpful, logits_of
from readers.test_readers import ENCODERS
from tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import tokenizer

TEXTS = [f"the quick fox {number} jumps over a lazy dog and {number * 7} more of them" for number in range(12)]
EXAMPLES = [{"prompt": text[:20], "completion": text[20:]} for text in TEXTS]


def made(other: str | None = None, **options: Any) -> calmlm.CalmForCausalLM:
    """A composition of two models that share tokens, or of one with tokens of its own."""
    ours = tiny_tokenizer() if other is None else tokenizer("bytes")
    theirs = ours if other is None else tokenizer(other)
    anchor = tiny_model("llama", seed=1, vocab_size=len(ours))
    augmenting = tiny_model("gpt2", seed=2, vocab_size=len(theirs))
    torch.manual_seed(0)
    return calmlm.compose(anchor, augmenting, tokenizer=ours, augmenting_tokenizer=theirs, **options)


@pytest.mark.parametrize("given", [{}, {"development": EXAMPLES}], ids=["middle", "searched"])
@pytest.mark.parametrize("other", [None, "unigram"], ids=["shared", "own tokens"])
def test_it_is_what_it_stands_for(other: str | None, given: dict[str, Any], tmp_path: Path) -> None:
    model, expected = made(other, plain_text=TEXTS, **given), made(other, plain_text=TEXTS, **given, **RECIPE)
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert model.config.augmenting == expected.config.augmenting
    entry = model.config.augmenting["augmenting"]
    assert entry["connector"]["kind"] == "graft" and entry["words"]["kind"] == "map" and entry["adapters"]
    ids = tiny_tokens(2, 6)
    assert not torch.equal(logits_of(model, ids), logits_of(model.anchor, ids)), "the graft is open"
    with model.disable_composition():
        assert torch.equal(logits_of(model, ids), logits_of(model.anchor, ids))
    model.save_pretrained(tmp_path)
    again = calmlm.CalmForCausalLM.from_pretrained(
        tmp_path, anchor=model.anchor, augmenting=model.augmenting["augmenting"]
    )
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@pytest.mark.parametrize(
    "choice",
    [
        {"connections": "every-4"}, {"connector": "cross_attention"}, {"num_heads": 1}, {"words": "map"},
        {"gate": True}, {"norm": False}, {"rank": 4}, {"projection": "residual"},
    ],
    ids=str,
)  # fmt: skip
def test_one_choice_takes_it_back(choice: dict[str, Any]) -> None:
    entry = made(plain_text=TEXTS, **choice).config.augmenting["augmenting"]
    assert entry["connector"]["kind"] == "cross_attention" and "adapters" not in entry
    assert ("words" in entry) == ("words" in choice)
    assert entry["connections"] == made().config.augmenting["augmenting"]["connections"]


def test_its_gate_may_be_shut_and_its_text_come_once() -> None:
    model = made(plain_text=(text for text in TEXTS), opened=False)
    assert model.config.augmenting["augmenting"]["connector"]["opened"] is False
    ids = tiny_tokens(2, 6)
    assert torch.equal(logits_of(model, ids), logits_of(model.anchor, ids))


def test_an_encoder_has_no_part_in_it() -> None:
    with pytest.raises(calmlm.ConfigError) as caught:
        calmlm.compose(
            tiny_model("llama"), {"eyes": ENCODERS["bert"][0]()}, plain_text=TEXTS, tokenizer=tiny_tokenizer()
        )
    assert_helpful(caught.value, "plain_text", "encoder")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(calmlm.DataError, match="plain_text, text 2: expected text in Unicode, but got half of a"):
        made(plain_text=["the fox", "the \ud800 dog"])
