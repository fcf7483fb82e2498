"""A map of words: in closed form, behind a gate that is exactly 0 at the start, wherever a composition works."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.bases.families import Backbone
from calmlm.bases.heads import output_matrix
from calmlm.connectors.gate import GATE, OPENING
from calmlm.connectors.word_map import WordMap, fit_map, mix
from calmlm.errors import ConfigError, ModelError
from calmlm.readers.speaking import expected_tokens
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.vocabularies import frequencies, shared_pieces
from compositions import assert_close, greedy_without_cache, logits_in_pieces, logits_of, pad, tiny_composition
from tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import tokenizer, with_beginning

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ROWS = [tiny_tokens(1, length, seed=length)[0] for length in (7, 3, 5)]


def own(kind: str) -> dict[str, Any]:
    """Options of a composition whose augmenting model has this tokenizer."""
    theirs = with_beginning(tokenizer(kind))
    return {
        "tokenizer": tiny_tokenizer(),
        "augmenting_tokenizer": theirs,
        "augmenting_options": {"vocab_size": len(theirs)},
    }


COMPOSITIONS: dict[str, dict[str, Any]] = {
    "llama+mistral": {"anchor": "llama", "augmenting": "mistral"},
    "gpt2+qwen3, words alone": {"anchor": "gpt2", "augmenting": "qwen3", "connections": "none"},
    "gemma3+opt, words alone": {"anchor": "gemma3_text", "augmenting": "opt", "connections": "none"},
    "phi+gpt_neox": {"anchor": "phi", "augmenting": "gpt_neox"},  # an anchor with biases in its head
    "mistral+gemma3, own tokens": {"anchor": "mistral", "augmenting": "gemma3_text", **own("bytes-large")},
    "llama+gpt2, own tokens, words alone": {
        "anchor": "llama", "augmenting": "gpt2", "connections": "none", **own("bytes"),
    },
    "qwen2+llama, own tokens": {"anchor": "qwen2", "augmenting": "llama", **own("sentencepiece")},
    "opt+phi3, transcoded, words alone": {
        "anchor": "opt", "augmenting": "phi3", "connections": "none", **own("unigram"), "alignment": "transcode",
    },
}  # fmt: skip


def speaking(name: str, *, awake: bool = True) -> calmlm.CalmForCausalLM:
    """A composition with words, its gates open."""
    model = tiny_composition(awake=awake, words="map", **COMPOSITIONS[name])
    if awake:
        fit = tiny_composition(awake=False, words="map", **COMPOSITIONS[name]).model.connectors["augmenting"][-1].map
        words = model.model.connectors["augmenting"][-1]
        words.map.load_state_dict(fit.state_dict())
        with torch.no_grad():
            words.opening.fill_(0.7 / OPENING)
            words.scale_anchor.fill_(1.3)
            words.scale_augmenting.fill_(0.8)
    return model


@pytest.fixture(params=COMPOSITIONS, scope="module")
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    return speaking(request.param)


# The formulas


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


# In a composition


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_an_untrained_one_is_the_anchor_and_learns(name: str) -> None:
    model = speaking(name, awake=False)
    ids = tiny_tokens(2, 9)
    with model.disable_composition():
        alone = logits_of(model, ids)
    assert torch.equal(logits_of(model, ids), alone)
    words = model.model.connectors["augmenting"][-1]
    assert not words.map.weight.requires_grad and float(words.map.weight.abs().max()) > 0
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert words.opening.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3
    with model.disable_composition():
        assert torch.equal(logits_of(model, ids), alone)


def test_a_gradient_that_would_open_it_less_than_not_at_all_is_dropped() -> None:
    words = WordMap(2, 2)
    words.opened().backward()
    assert words.opening.grad == 0  # less loss would need less than nothing
    words.opening.grad = None
    (-words.opened()).backward()
    assert words.opening.grad == -OPENING


def test_steps_equal_teacher_forcing(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(2, 10)
    expected = logits_of(model, ids)
    with model.disable_composition():
        assert not torch.allclose(logits_of(model, ids), expected, atol=1e-2)
    for pieces in ((1,) * 10, (4, 1, 5)):
        assert_close(logits_in_pieces(model, ids, pieces), expected, 1e-4)


def test_nothing_of_later_text_is_said(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(1, 10)
    before = logits_of(model, ids)
    for place in (3, 6, 9):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 7) % 90 + 3
        after = logits_of(model, changed)
        assert_close(after[:, :place], before[:, :place], 1e-5)
        assert not torch.allclose(after[:, place:], before[:, place:], atol=1e-3)


def test_padding_and_batches_change_nothing(model: calmlm.CalmForCausalLM) -> None:
    for side in ("left", "right"):
        ids, mask = pad(ROWS, side)
        found = logits_of(model, ids, mask)
        for row, alone in enumerate(ROWS):
            assert_close(found[row, mask[row].bool()], logits_of(model, alone[None])[0], 1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 2}])
def test_generation_equals_its_uncached_reference(model: calmlm.CalmForCausalLM, options: dict[str, Any]) -> None:
    ids, mask = pad(ROWS[:1] if "prompt_lookup_num_tokens" in options else ROWS, "left")
    found = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options, **GREEDY)
    if "num_beams" in options:
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=False, **options, **GREEDY)
    else:
        expected = greedy_without_cache(model, ids, 8, mask)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama+mistral", "gpt2+qwen3, words alone"])
def test_static_caches_and_drafts(name: str) -> None:
    model = speaking(name)
    ids = ROWS[0][None]
    expected = greedy_without_cache(model, ids, 8)
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in (static, {"drafting": True}):
        assert torch.equal(model.generate(ids, max_new_tokens=8, **options, **GREEDY), expected)


def test_saved_and_loaded_and_copied(model: calmlm.CalmForCausalLM, tmp_path: Path) -> None:
    ids = tiny_tokens(2, 6)
    model.save_pretrained(tmp_path)
    bases = copy.deepcopy(model.anchor), copy.deepcopy(model.augmenting["augmenting"])
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=bases[0], augmenting=bases[1])
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert torch.equal(logits_of(copy.deepcopy(model), ids), logits_of(model, ids))
    trained = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    assert not any(".map." in name for name in trained)


def test_rows_without_the_composition_are_the_anchors(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(2, 6)
    found = logits_of(model, ids, composition_mask=torch.tensor([True, False]))
    with model.disable_composition():
        assert torch.equal(found[1], logits_of(model, ids)[1])
    assert_close(found[0], logits_of(model, ids)[0], 1e-5)


def test_joined_and_removed() -> None:
    model, other = speaking("llama+mistral"), speaking("llama+mistral")
    ids = tiny_tokens(1, 6)
    before = logits_of(model, ids)
    model.add_augmenting("other", other)
    assert not torch.allclose(logits_of(model, ids), before, atol=1e-3)
    model.remove_augmenting("other")
    assert torch.equal(logits_of(model, ids), before)


def test_the_hidden_state_that_losses_take_is_the_mixed_one(model: calmlm.CalmForCausalLM) -> None:
    """Fused heads compute their loss from the base model's last state."""
    ids = tiny_tokens(1, 6)
    with torch.no_grad():
        state = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        matrix, bias = output_matrix(model.anchor, model.model.backbone(), "anchor")
    assert_close(state @ matrix.T + (0 if bias is None else bias), logits_of(model, ids), 1e-4)


def test_what_does_not_fit_is_refused() -> None:
    llama, mistral = tiny_model("llama"), tiny_model("mistral")
    for options, message in (
        ({"words": "letters"}, "words must be one of map"),
        ({"connections": "none"}, "connections='none' needs words"),
        ({"words": "map", "refresh": False}, "prompt alone"),
        ({"words": {"nobody": "map"}}, "words must name augmenting models"),
    ):
        with pytest.raises(ConfigError, match=message):
            calmlm.compose(llama, mistral, **options)
    assert list(itertools.chain(*llama._forward_hooks.values())) == []
