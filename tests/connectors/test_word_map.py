"""A map of words: its formula, its closed form, and the heads that it is computed from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.bases.families import Backbone
from calmlm.bases.heads import output_matrix
from calmlm.connectors.gate import GATE, OPENING
from calmlm.connectors.word_map import WordMap, fit_map, mix
from calmlm.errors import ModelError
from calmlm.readers.speaking import expected_tokens
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.vocabularies import frequencies, shared_pieces
from compositions import assert_close, logits_of
from tiny import tiny_model, tiny_tokens
from tokenizers_tiny import tokenizer
from words import COMPOSITIONS, speaking


def test_the_mixture_by_hand() -> None:
    words = WordMap(2, 2)
    with torch.no_grad():
        words.map.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        words.map.bias.copy_(torch.tensor([0.5, 0.0]))
        words.gate_anchor.copy_(torch.tensor([1.0, 0.0]))
        words.opening.fill_(0.5 / OPENING)
        words.scale_augmenting.fill_(2.0)
        words.scale_anchor.fill_(3.0)
    anchor, theirs = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 1.0]]])
    unit = 3 / (12.5**0.5)
    g = 0.5 / (1 + 2.718281828459045 ** (-GATE * unit))
    said = torch.tensor([1 + 2 + 0.5, 1.0]) * 2
    expected = (1 - g) * (1 + 2 * g) * torch.tensor([3.0, 4.0]) + g * said
    assert_close(mix(anchor, [(words, theirs, None)])[0, 0], expected, 1e-5)
    unread = mix(anchor, [(words, theirs, torch.zeros(1, 1, dtype=torch.bool))])
    assert torch.equal(unread, anchor)


def test_several_share_one_softmax() -> None:
    torch.manual_seed(0)
    anchor = torch.randn(2, 3, 4)
    parts = []
    for size in (5, 6):
        words = WordMap(size, 4)
        torch.nn.init.normal_(words.map.weight)
        torch.nn.init.normal_(words.gate_augmenting)
        with torch.no_grad():
            words.opening.fill_(1 / OPENING)
        parts.append((words, torch.randn(2, 3, size), None))
    logits = torch.cat([words.gate(anchor, states) for words, states, _ in parts], dim=-1)
    shares = torch.cat((torch.zeros(2, 3, 1), logits), dim=-1).softmax(-1)
    expected = shares[..., :1] * anchor
    for index, (words, states, _) in enumerate(parts):
        expected = expected + shares[..., index + 1 : index + 2] * words.map(states)
    assert_close(mix(anchor, parts), expected, 1e-5)


def test_the_map_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    ours, wanted, weights = torch.randn(200, 6), torch.randn(6, 9), torch.rand(200)
    theirs = ours @ wanted + 3.0 + 0.1 * torch.randn(200, 9)
    share = (weights / weights.sum())[:, None].sqrt()
    centred = [table - (share.square() * table).sum(0) for table in (ours, theirs)]
    expected = torch.linalg.lstsq(share * centred[0], share * centred[1]).solution
    assert_close(fit_map(ours, theirs, weights, ridge=0.0), expected, 1e-4)
    assert_close(fit_map(ours, theirs, weights), wanted, 0.1)


def test_the_same_vocabulary_is_said_exactly() -> None:
    """Where the anchor's embeddings hold the other's, the map's logits are the other's own, but for a shift."""
    anchor, small = tiny_model("llama", tie_word_embeddings=False), tiny_model("mistral", tie_word_embeddings=False)
    with torch.no_grad():
        anchor.lm_head.weight[:, :40] = small.lm_head.weight
        anchor.lm_head.weight[:, 40:] = 0.01 * torch.randn(97, 8, generator=torch.Generator().manual_seed(0))
    model = calmlm.compose(anchor, small, "none", words="map")
    words = model.model.connectors["augmenting"][-1]
    with torch.no_grad():
        words.opening.fill_(1 / OPENING)
        words.gate_bias.fill_(100.0)
    ids = tiny_tokens(2, 8)
    with torch.no_grad():
        assert_close(logits_of(model, ids).log_softmax(-1), small(ids).logits.log_softmax(-1), 5e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "cohere", "granite", "phi", "gpt2", "opt"])
def test_heads_are_matrices(family: str) -> None:
    model = tiny_model(family)
    states: list[Tensor] = []
    backbone = Backbone.of(model, "anchor")
    handle = backbone.decoder.register_forward_hook(lambda _, __, output: states.append(output[0]))
    ids = tiny_tokens(1, 9)
    with torch.no_grad():
        logits = model(ids).logits
    handle.remove()
    matrix, bias = output_matrix(model, backbone, "anchor")
    found = states[0] @ matrix.T + (0 if bias is None else bias)
    cap = getattr(model.config, "final_logit_softcapping", None)
    assert_close(cap * torch.tanh(found / cap) if cap else found, logits, 1e-4)


def test_a_head_that_is_no_matrix_is_refused() -> None:
    class Squared(torch.nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states.repeat(1, 1, 3)[..., :97] ** 2 if states.ndim == 3 else states.repeat(1, 3)[..., :97] ** 2

    odd = tiny_model("mistral", tie_word_embeddings=False)
    odd.lm_head = Squared()
    with pytest.raises(ModelError, match="words need models whose logits"):
        calmlm.compose(tiny_model("llama"), odd, words="map")


def test_shared_tokens_write_the_same_bytes() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("bytes-large")
    first, second = shared_pieces(Alignment.between(ours, theirs), len(ours), len(theirs))
    assert len(first) > 250
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        assert ours.convert_ids_to_tokens(one) == theirs.convert_ids_to_tokens(other)
    counts = frequencies(len(ours), ours, ["the the quick fox"])
    assert counts[ours("the").input_ids[0]] > counts.median()


def test_what_the_anchor_writes_is_counted_by_default() -> None:
    anchor = tiny_model("llama", seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        anchor.lm_head.weight[:] *= 0.01
        anchor.lm_head.weight[7] = 0
    backbone = Backbone.of(anchor, "anchor")
    first, second = (expected_tokens(anchor, backbone) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (97,)
    assert_close(first / first.sum(), torch.full((97,), 1 / 97), 2e-3)
    model = calmlm.compose(anchor, tiny_model("mistral"), "none", words="map")
    found = model.model.connectors["augmenting"][-1].map.weight
    ours, theirs = (output_matrix(m, Backbone.of(m, "m"), "m")[0] for m in (anchor, tiny_model("mistral")))
    assert_close(found, fit_map(ours, theirs, first), 1e-4)


def test_a_gradient_that_would_open_it_less_than_not_at_all_is_dropped() -> None:
    words = WordMap(2, 2)
    words.opened().backward()
    assert words.opening.grad == 0  # less loss would need less than nothing
    words.opening.grad = None
    (-words.opened()).backward()
    assert words.opening.grad == -OPENING


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_hidden_state_that_losses_take_is_the_mixed_one(name: str) -> None:
    """Fused heads compute their loss from the base model's last state."""
    model, ids = speaking("map", name), tiny_tokens(1, 6)
    with torch.no_grad():
        state = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        matrix, bias = output_matrix(model.anchor, model.model.backbone(), "anchor")
    found = state @ matrix.T + (0 if bias is None else bias)
    cap = getattr(model.anchor.config, "final_logit_softcapping", None)
    assert_close(cap * torch.tanh(found / cap) if cap else found, logits_of(model, ids), 1e-4)
