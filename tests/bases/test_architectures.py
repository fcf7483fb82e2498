"""Every family composes with another one: causal, padded, cached, identical when off, frozen, saved and loaded.

Each is the anchor of one composition and the augmenting model of another, with other widths, depths and heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import calmlm
from calmlm.tokens.lookup import find_tokenizer
from compositions import assert_close, awaken, greedy_without_cache, logits_of, pad
from tiny import EAGER_ONLY, FAMILIES, MIXTURES, tiny_config, tiny_model, tiny_tokens

NAMES = list(FAMILIES)
# Seven further on: no family meets a sibling, and widths differ in every pair.
PAIRS = [(name, NAMES[(index + 7) % len(NAMES)]) for index, name in enumerate(NAMES)]
IDS = tiny_tokens(2, 8)
# Connections into the first layer, the last one and one between.
CONNECTIONS = [(1, 0), (0, 2), (3, 3)]

pytestmark = pytest.mark.parametrize(("anchor", "augmenting"), PAIRS, ids=[f"{a}+{b}" for a, b in PAIRS])


def composition(anchor: str, augmenting: str, **options: Any) -> calmlm.CalmForCausalLM:
    bases = tiny_model(anchor, seed=1, **options), tiny_model(augmenting, seed=2, **options)
    return awaken(calmlm.compose(*bases, connections=CONNECTIONS))


def exact(anchor: str, augmenting: str) -> float:
    """How far equal tokens may drift apart when others change: not at all, except through experts' kernels."""
    return 1e-4 if {anchor, augmenting} & MIXTURES else 0.0


def test_the_pair_differs(anchor: str, augmenting: str) -> None:
    model = composition(anchor, augmenting)
    above, below = model.model.backbone(), model.model.backbone("augmenting")
    assert above.size != below.size
    assert len(above.layers) == model.anchor.config.num_hidden_layers
    assert len(below.layers) == model.augmenting["augmenting"].config.num_hidden_layers
    assert above.num_heads == model.anchor.config.num_attention_heads
    connector = model.model.connectors["augmenting"][0]
    assert connector.f_proj.weight.shape == (above.size, below.size)
    assert above.num_heads % connector.num_heads == 0 or above.size % above.num_heads


def test_causal(anchor: str, augmenting: str) -> None:
    model = composition(anchor, augmenting)
    before = logits_of(model, IDS)
    for position in (1, 4, 7):
        changed = IDS.clone()
        changed[:, position:] = (IDS[:, position:] - 3 + 17) % 94 + 3
        difference = (logits_of(model, changed) - before).abs().amax(-1)
        assert difference[:, :position].max() <= exact(anchor, augmenting)
        assert difference[:, position:].min() > 1e-3


def test_the_augmenting_model_is_heard_from_its_own_token_on(anchor: str, augmenting: str) -> None:
    model = composition(anchor, augmenting)
    ids = torch.arange(5, 13)[None]
    before = logits_of(model, ids)
    with torch.no_grad():
        model.augmenting["augmenting"].get_input_embeddings().weight[9].neg_()
    difference = (logits_of(model, ids) - before).abs().amax(-1)[0]
    assert difference[:4].max() <= exact(anchor, augmenting)
    assert difference[4:].min() > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(anchor: str, augmenting: str, side: str) -> None:
    model = composition(anchor, augmenting)
    rows = [tiny_tokens(1, length, seed=length)[0] for length in (8, 3, 5)]
    ids, mask = pad(rows, side)
    batched = logits_of(model, ids, mask)
    for row, single in enumerate(rows):
        assert_close(batched[row][mask[row].bool()], logits_of(model, single[None])[0], 1e-5)


def test_cache(anchor: str, augmenting: str) -> None:
    model = composition(anchor, augmenting)
    expected = logits_of(model, IDS)
    cache, parts = None, []
    with torch.no_grad():
        for piece in IDS.split((3, 1, 4), dim=1):
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1), expected, 1e-4)


def test_generation(anchor: str, augmenting: str) -> None:
    model = composition(anchor, augmenting)
    ids, mask = pad([IDS[0, :6], IDS[1, :3]], "left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, do_sample=False, **options)
    assert torch.equal(found, greedy_without_cache(model, ids, 6, mask))
    beams = [model.generate(ids, num_beams=3, use_cache=use, do_sample=False, **options) for use in (True, False)]
    assert torch.equal(*beams)


def test_identity(anchor: str, augmenting: str) -> None:
    attentions = ["eager"] if {anchor, augmenting} & EAGER_ONLY else ["eager", "sdpa"]
    for attention in attentions:
        bases = [tiny_model(n, seed=s, attn_implementation=attention) for s, n in enumerate((anchor, augmenting), 1)]
        expected = logits_of(bases[0], IDS)
        model = calmlm.compose(*bases, connections=CONNECTIONS)
        assert torch.equal(logits_of(model, IDS), expected)
        awake = logits_of(awaken(model), IDS)
        assert (awake - expected).abs().max() > 1e-2
        with model.disable_composition():
            assert torch.equal(logits_of(model, IDS), expected)
        assert torch.equal(logits_of(model, IDS), awake)


def test_frozen(anchor: str, augmenting: str) -> None:
    model = composition(anchor, augmenting).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not any(module.training for base in model.model.bases() for module in base.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        ids = tiny_tokens(2, 6, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is None for base in model.model.bases() for p in base.parameters())
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(model.composition_tensors())


def test_round_trip(anchor: str, augmenting: str, tmp_path: Path) -> None:
    for seed, (name, family) in enumerate({"anchor": anchor, "augmenting": augmenting}.items(), 1):
        tiny_model(family, seed=seed).save_pretrained(tmp_path / name)
    options = {"attn_implementation": "eager"}
    model = awaken(calmlm.compose(tmp_path / "anchor", tmp_path / "augmenting", connections=CONNECTIONS, **options))
    model.save_pretrained(tmp_path / "composition")
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition", **options)
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
    assert torch.equal(logits_of(again.anchor, IDS), logits_of(tiny_model(anchor, seed=1), IDS))
    own = sum(t.numel() * t.element_size() for t in model.composition_tensors().values())
    assert sum(path.stat().st_size for path in (tmp_path / "composition").iterdir()) < own + 16_000


def test_a_folder_without_a_tokenizer_has_none(anchor: str, augmenting: str, tmp_path: Path) -> None:
    # For some families transformers makes up an empty one, which would differ from any other model's.
    tiny_config(anchor).save_pretrained(tmp_path)
    assert find_tokenizer(tmp_path) is None
