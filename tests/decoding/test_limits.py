"""Drafts hold nothing that a model of the composition cannot read, and the text is the same for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

import calmlm
from calmlm.decoding.limits import Bounded, DraftLimits
from compositions import awaken, tiny_composition
from decoding.test_cache_generation import GREEDY
from decoding.test_drafting import ASSISTED, Until, eager
from tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import tokenizer


def sized(anchor: int, augmenting: int, family: str = "llama") -> calmlm.CalmForCausalLM:
    """A composition of models with vocabularies of these sizes."""
    shared = {"tokenizer": tiny_tokenizer(), "augmenting_tokenizer": tiny_tokenizer()}
    sizes = {"anchor_options": {"vocab_size": anchor}, "augmenting_options": {"vocab_size": augmenting}}
    return tiny_composition("llama", family, **sizes, **shared)


def test_a_draft_holds_no_id_that_another_augmenting_model_lacks() -> None:
    model, other, ids = sized(104, 104), sized(104, 97, "gpt2"), tiny_tokens(1, 6)
    model.add_augmenting("other", other)
    with torch.no_grad():
        model.anchor.lm_head.weight[97:] = 0  # no text has an id from there on
        model.augmenting["augmenting"].lm_head.weight[99] *= 20  # what it would like to draft
    expected = model.generate(ids, max_new_tokens=14, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=14, drafting=eager(), **GREEDY), expected)


def test_another_models_draft_ends_before_an_id_that_an_augmenting_model_lacks() -> None:
    model, assistant, ids = sized(104, 97), tiny_model("llama", seed=5, vocab_size=104), tiny_tokens(1, 6)
    assistant.generation_config.assistant_confidence_threshold = 0
    with torch.no_grad():
        model.anchor.lm_head.weight[97:] = 0  # no text has an id from there on
        assistant.lm_head.weight[:97] = 0
    expected = model.generate(ids, max_new_tokens=14, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=14, assistant_model=assistant, **GREEDY), expected)


@pytest.mark.slow
@pytest.mark.parametrize("assisted", [ASSISTED[1], {"assistant_model": "llama"}], ids=["lookup", "assistant"])
@pytest.mark.parametrize("alignment", ["transcode", "retokenize"])
def test_drafts_end_with_the_context_of_a_model_with_tokens_of_its_own(
    alignment: str, assisted: dict[str, Any]
) -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("unigram")
    anchor = tiny_model("llama", seed=1, vocab_size=len(ours))
    ids = ours("hello world hello world hello", return_tensors="pt").input_ids
    seen = []
    for most in range(27, 40, 3):
        small = tiny_model("gpt2", seed=2, vocab_size=len(theirs), n_positions=most)
        options = {"tokenizer": ours, "augmenting_tokenizer": theirs, "alignment": alignment}
        model = awaken(calmlm.compose(anchor, small, 2, **options))
        if "assistant_model" in assisted:
            assisted = {"assistant_model": tiny_model("llama", seed=9, vocab_size=len(ours))}
        lengths = range(ids.shape[1] + 1, ids.shape[1] + 12)
        for length in lengths:
            settings = {**GREEDY, "max_new_tokens": 40, "stopping_criteria": [Until(length)]}
            try:
                plain = model.generate(ids, **settings)
            except calmlm.DataError:
                break
            seen.append(length)
            assert torch.equal(model.generate(ids, **settings, **assisted), plain)
    assert len(set(seen)) > 3, "hardly any text fits"


class Fixed(CandidateGenerator):
    """Proposes the same tokens each time, with the scores that it is given."""

    requires_model_outputs = False

    def __init__(self, tokens: list[int], scores: Tensor) -> None:
        self.tokens, self.scores = torch.tensor([tokens]), scores

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return torch.cat((input_ids, self.tokens), dim=1), self.scores

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None: ...


def test_scores_of_a_cut_draft_give_nothing_to_what_it_may_not_hold() -> None:
    model, ids = sized(104, 97), tiny_tokens(1, 6)
    limits = DraftLimits(model.model, model.model.new_cache(), 0, 20, [])
    given = torch.randn(1, 4, 104)
    found, scores = Bounded(Fixed([5, 6, 99, 7], given), limits).get_candidates(ids)
    assert found[0, 6:].tolist() == [5, 6]
    assert scores is not None
    assert torch.equal(scores[..., :97], given[:, :2, :97])
    assert bool((scores[..., 97:] == float("-inf")).all())
    short = DraftLimits(model.model, model.model.new_cache(), 0, 8, [])
    assert Bounded(Fixed([5, 6, 99, 7], given), short).get_candidates(ids)[0].shape[1] == 7
