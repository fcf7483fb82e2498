"""LegoNN's connector over the anchor's own input embeddings, of which nothing is learned, copied or saved."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import calmlm
import equalities
from calmlm.bases.embeddings import embed_with
from calmlm.connectors.ingestor import AnchorIngestor
from calmlm.errors import CheckpointError, ConfigError, ModelError
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.spelling import token_bytes
from calmlm.tokens.vocabularies import first_tokens, with_firsts
from compositions import (
    assert_close,
    assert_helpful,
    awaken,
    greedy_without_cache,
    logits_of,
    own,
    tiny_composition,
)
from tiny import tiny_model, tiny_tokens
from tokenizers_tiny import tokenizer

OPTIONS: dict[str, Any] = {"connector": "legonn", "ingestor": "anchor", "top_k": 6}


COMPOSITIONS: dict[str, dict[str, Any]] = {
    "llama+gpt2": {"anchor": "llama", "augmenting": "gpt2"},
    "phi+mistral, rotary": {"anchor": "phi", "augmenting": "mistral", "rotary": True},
    "gemma3+opt, own tokens": {"anchor": "gemma3_text", "augmenting": "opt", **own("bytes-large")},
    "qwen2+llama, own tokens": {"anchor": "qwen2", "augmenting": "llama", **own("sentencepiece")},
    "opt+phi3, transcoded": {"anchor": "opt", "augmenting": "phi3", **own("unigram"), "alignment": "transcode"},
}  # fmt: skip


@pytest.fixture(params=COMPOSITIONS, scope="module")
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    return tiny_composition(**OPTIONS, **COMPOSITIONS[request.param])


# The formulas


def test_the_two_likeliest_by_hand() -> None:
    ingestor = AnchorIngestor(torch.tensor([2, -1, 0, 1]), top_k=2)
    logits = torch.tensor([math.log(3.0), 9.0, math.log(1.0), math.log(2.0)])
    vectors = torch.tensor([[1.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
    found = ingestor(logits[None, None], lambda ids: vectors[ids])
    # 9.0 has no token of the anchor's; of the rest 3 : 2 : 1 the first two count, as tokens 2 and 1.
    assert_close(found, torch.tensor([[[0.6 * 5, 0.6 * 5 + 0.4 * 10]]]), 1e-6)
    # One known token is taken whole, whatever else would fill the top k.
    alone = AnchorIngestor(torch.tensor([-1, -1, 1, -1]), top_k=9)
    assert torch.equal(alone(logits[None, None], lambda ids: vectors[ids])[0, 0], vectors[1])


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_connections_are_given_the_reference(name: str) -> None:
    """Token by token from the model's own distribution, over the tokens that it has read."""
    model = tiny_composition(**OPTIONS, **COMPOSITIONS[name])
    inner, given = model.model, []
    connector = inner.connectors["augmenting"][0]
    connector.attention.augmenting_norm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    read: list[dict[str, Tensor]] = []
    inner.augmenting["augmenting"].register_forward_hook(lambda _, __, output: read.append(output.logits))
    logits_of(model, tiny_tokens(1, 6))
    embedding, first = model.anchor.get_input_embeddings(), inner.ingestors["augmenting"].tokens
    probabilities = read[-1][0].softmax(-1)
    assert given[-1].shape == (1, len(probabilities), embedding(torch.tensor([0])).shape[-1])
    for place, row in enumerate(probabilities):
        known = sorted((index for index in range(len(row)) if first[index] >= 0), key=lambda index: -float(row[index]))
        total = sum(float(row[index]) for index in known[:6])
        expected = sum(float(row[index]) / total * embedding(first[index]).detach() for index in known[:6])
        assert_close(given[-1][0, place], expected, 1e-5)


@pytest.mark.parametrize("kinds", [("bytes", "bytes-large"), ("unigram", "bytes"), ("bytes", "sentencepiece")])
def test_first_tokens_begin_with_the_same_bytes(kinds: tuple[str, str]) -> None:
    ours, theirs = map(tokenizer, kinds)
    alignment = with_firsts(Alignment.between(ours, theirs), ours, theirs)
    found = first_tokens(alignment, len(ours), len(theirs)).tolist()
    assert sum(index >= 0 for index in found) > 70  # a tokenizer without bytes cannot begin parts of characters
    our_bytes, their_bytes = token_bytes(ours), token_bytes(theirs)
    for piece, index in zip(their_bytes, found, strict=True):
        if piece is not None and index >= 0:
            assert our_bytes[index] is not None and piece.startswith(our_bytes[index])
        if piece in our_bytes and piece is not None and not piece.isspace():
            assert index >= 0
    assert found[theirs.eos_token_id] == ours.eos_token_id
    cut = first_tokens(alignment, 100, len(theirs) + 3)
    assert cut.max() < 100 and cut[-3:].tolist() == [-1] * 3


def test_shared_ids_are_their_own_first_tokens() -> None:
    assert first_tokens(None, 5, 3).tolist() == [0, 1, 2]
    assert first_tokens(None, 3, 5).tolist() == [0, 1, 2, -1, -1]


# In a composition


def test_an_untrained_one_is_the_anchor_and_learns() -> None:
    model = tiny_composition(awake=False, **OPTIONS)
    ids = tiny_tokens(2, 9)
    before = copy.deepcopy(model.anchor.state_dict())
    assert torch.equal(logits_of(model, ids), logits_of(model.anchor, ids))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.anchor.state_dict().items())


def test_off_switch(model: calmlm.CalmForCausalLM) -> None:
    equalities.assert_off_switch(model)


def test_steps_equal_teacher_forcing(model: calmlm.CalmForCausalLM) -> None:
    equalities.assert_steps(model)


def test_nothing_comes_from_later_text(model: calmlm.CalmForCausalLM) -> None:
    equalities.assert_causal(model)


def test_padding_and_batches_change_nothing(model: calmlm.CalmForCausalLM) -> None:
    equalities.assert_padding(model)


@pytest.mark.parametrize("options", equalities.GENERATION, ids=str)
def test_generation(model: calmlm.CalmForCausalLM, options: dict[str, Any]) -> None:
    equalities.assert_generates(model, options)


def test_static_caches_drafts_and_the_prompt_alone() -> None:
    equalities.assert_static_and_drafts(tiny_composition(**OPTIONS))
    once, ids = tiny_composition(refresh=False, **OPTIONS), equalities.ROWS[0][None]
    found = once.generate(ids, max_new_tokens=6, **equalities.GREEDY)
    assert torch.equal(found, greedy_without_cache(once, ids, 6))


def test_saved_without_embeddings_and_loaded_and_copied(model: calmlm.CalmForCausalLM, tmp_path: Path) -> None:
    ids = tiny_tokens(2, 6)
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "ingestor" in name]  # noqa: SIM118
    bases = copy.deepcopy(model.anchor), copy.deepcopy(model.augmenting["augmenting"])
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=bases[0], augmenting=bases[1])
    assert torch.equal(logits_of(again, ids), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(logits_of(copied, ids), expected)
    with torch.no_grad():  # the copy asks its own anchor's embeddings
        copied.anchor.get_input_embeddings().weight.mul_(-1)
    assert torch.equal(logits_of(model, ids), expected)


def test_the_embeddings_are_the_anchors_at_the_call() -> None:
    """What is said changes with the anchor's table, although its ids and m_A stay the same."""
    model, ids = tiny_composition(**OPTIONS), tiny_tokens(1, 6)
    given: list[Tensor] = []
    attention = model.model.connectors["augmenting"][0].attention
    attention.augmenting_norm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    logits_of(model, ids)
    with torch.no_grad():
        model.anchor.get_input_embeddings().weight.mul_(2)
    logits_of(model, ids)
    assert torch.equal(given[1], 2 * given[0])


def test_joined_and_removed() -> None:
    name = "gemma3+opt, own tokens"
    model, other = (tiny_composition(**OPTIONS, **COMPOSITIONS[name]) for _ in range(2))
    equalities.assert_joins(model, other)
    assert list(model.model.ingestors) == ["augmenting"]


def test_embeddings_that_cannot_be_read_are_refused() -> None:
    class Odd(torch.nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids)[..., 0].long() if ids.shape[-1] == 2 else super().forward(ids)

    anchor = tiny_model("llama")
    anchor.model.embed_tokens = Odd(97, 48)
    with pytest.raises(ModelError) as caught:
        calmlm.compose(anchor, tiny_model("gpt2"), 2, connector="legonn", ingestor="anchor")
    assert_helpful(caught.value, "ingestor='anchor'", "LlamaForCausalLM")


def test_what_does_not_fit_is_refused() -> None:
    llama, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    for options, mention in (
        ({"ingestor": "anchor"}, "cross_attention"),
        ({"connector": "flamingo", "ingestor": "anchor"}, "flamingo"),
        ({"connector": "legonn", "ingestor": "mine"}, "mine"),
        ({"connector": "legonn", "top_k": 4}, "top_k"),
        ({"connector": "legonn", "ingestor": "anchor", "top_k": 0}, "top_k"),
    ):
        with pytest.raises(ConfigError) as caught:
            calmlm.compose(llama, gpt2, 2, **options)
        assert_helpful(caught.value, mention)


def test_an_alignment_without_first_tokens_is_refused(tmp_path: Path) -> None:
    model = tiny_composition(**COMPOSITIONS["qwen2+llama, own tokens"])
    model.config.augmenting["augmenting"]["connector"] |= {"kind": "legonn", "ingestor": "anchor", "top_k": 3}
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=model.anchor, augmenting=model.augmenting["augmenting"])
    assert_helpful(caught.value, "first tokens")


def test_embeddings_in_another_form_are_asked_alike() -> None:
    """A module that makes its vectors when it is asked, as quantised and offloaded ones do."""

    class Packed(torch.nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.scale = weight.abs().amax(1, keepdim=True) / 127
            self.num_embeddings = len(weight)
            self.register_buffer("packed", (weight / self.scale).round().to(torch.int8))

        def forward(self, ids: Tensor) -> Tensor:
            return self.packed[ids] * self.scale[ids]

    anchor = tiny_model("llama", seed=1, tie_word_embeddings=False)
    dense = copy.deepcopy(anchor)
    anchor.model.embed_tokens = Packed(anchor.model.embed_tokens.weight.detach())
    with torch.no_grad():
        dense.model.embed_tokens.weight.copy_(embed_with(anchor)(torch.arange(97)))
    models = []
    for each in (anchor, dense):
        torch.manual_seed(0)
        models.append(awaken(calmlm.compose(each, tiny_model("gpt2", seed=2), 2, **OPTIONS)))
    ids = tiny_tokens(2, 6)
    assert_close(logits_of(models[0], ids), logits_of(models[1], ids), 1e-5)
