"""Special tokens that an augmenting tokenizer has beyond its model's embeddings say nothing; other ids are refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import calmlm
from compositions import assert_close, assert_helpful, awaken, logits_of
from tiny import CHAT_TEMPLATE, tiny_model
from tokenizers_tiny import tokenizer


def with_added(kind: str, content: str, *, special: bool = True, role: str | None = None) -> Any:
    """A copy of a tokenizer with one more token, as transformers' Qwen2 class adds one that its file lacks."""
    made = copy.deepcopy(tokenizer(kind))
    if role is not None:
        made.add_special_tokens({role: content})
    elif special:
        made.add_special_tokens({"additional_special_tokens": [content]})
    else:
        made.add_tokens([content])
    return made


def composed(ours: Any, theirs: Any, embeddings: int, **options: Any) -> calmlm.CalmForCausalLM:
    anchor = tiny_model("llama", seed=1, vocab_size=len(ours))
    augmenting = tiny_model("mistral", seed=2, vocab_size=embeddings)
    made = calmlm.compose(anchor, augmenting, 2, tokenizer=ours, augmenting_tokenizer=theirs, **options)
    return awaken(made)


@pytest.mark.parametrize("options", [{}, {"alignment": "retokenize"}, {"augmenting_view": "bare"}], ids=str)
@pytest.mark.parametrize("special", [True, False])
def test_a_token_without_an_embedding_says_nothing(options: dict[str, Any], special: bool) -> None:
    ours, theirs = with_added("bytes", "<|extra|>"), with_added("bytes-large", "<|extra|>", special=special)
    ours.chat_template = theirs.chat_template = CHAT_TEMPLATE
    with pytest.warns(UserWarning, match=r"<\|extra\|>.*no embedding"):
        model = composed(ours, theirs, len(theirs) - 1, **options)
    ids = torch.tensor([ours("hello <|extra|> world").input_ids])
    assert ours.convert_tokens_to_ids("<|extra|>") in ids[0]
    assert torch.isfinite(logits_of(model, ids)).all()
    stream = model.model.transcoders["augmenting"]
    highest = stream.alignment.highest
    assert highest < len(theirs) - 1


def test_where_it_stands_the_stream_is_that_of_the_rest() -> None:
    ours, theirs = with_added("bytes", "<|extra|>"), with_added("bytes-large", "<|extra|>")
    with pytest.warns(UserWarning, match="no embedding"):
        model = composed(ours, theirs, len(theirs) - 1)
    extra = ours.convert_tokens_to_ids("<|extra|>")
    ids = torch.tensor([[*ours("hello").input_ids, extra]])
    plain = composed(ours, tokenizer("bytes-large"), len(theirs) - 1)
    assert_close(logits_of(model, ids), logits_of(plain, ids), 1e-5)


def test_the_token_of_a_role_may_be_missing_too() -> None:
    ours = with_added("bytes", "<|fin|>", role="eos_token")
    theirs = with_added("bytes-large", "<|pad-and-end|>", role="eos_token")
    with pytest.warns(UserWarning, match="no embedding"):
        model = composed(ours, theirs, len(theirs) - 1)
    ids = torch.tensor([[*ours("hello").input_ids, ours.eos_token_id]])
    assert torch.isfinite(logits_of(model, ids)).all()


def test_one_vocabulary_of_which_the_augmenting_model_lacks_the_last() -> None:
    ours = with_added("bytes", "<|extra|>")
    with pytest.warns(UserWarning, match="no embedding"):
        model = composed(ours, copy.deepcopy(ours), len(ours) - 1)
    extra = ours.convert_tokens_to_ids("<|extra|>")
    ids = torch.tensor([[*ours("hello world").input_ids, extra, *ours(" again").input_ids]])
    assert torch.isfinite(logits_of(model, ids)).all()
    assert torch.equal(model.generate(ids[:, :3], max_new_tokens=3, do_sample=False)[:, :3], ids[:, :3])


def test_models_with_embeddings_for_all_of_it_share_ids_without_a_word() -> None:
    ours = with_added("bytes", "<|extra|>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = composed(ours, copy.deepcopy(ours), len(ours))
    assert model.config.augmenting["augmenting"]["reads"] == "tokens"


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    ours, theirs = with_added("bytes", "<|extra|>"), with_added("bytes-large", "<|extra|>")
    tiny_model("llama", seed=1, vocab_size=len(ours)).save_pretrained(tmp_path / "anchor")
    tiny_model("mistral", seed=2, vocab_size=len(theirs) - 1).save_pretrained(tmp_path / "augmenting")
    ours.save_pretrained(tmp_path / "anchor")
    theirs.save_pretrained(tmp_path / "augmenting")
    with pytest.warns(UserWarning, match="no embedding"):
        model = awaken(calmlm.compose(tmp_path / "anchor", tmp_path / "augmenting", 2))
    model.save_pretrained(tmp_path / "composition")
    ids = torch.tensor([ours("hello <|extra|> world").input_ids])
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition")
    assert_close(logits_of(again, ids), logits_of(model, ids), 1e-5)


def test_another_models_tokenizer_is_refused() -> None:
    with pytest.raises(calmlm.ModelError) as caught:
        composed(tokenizer("bytes"), tokenizer("bytes-large"), 350, alignment="retokenize")
    assert_helpful(caught.value, "350")
