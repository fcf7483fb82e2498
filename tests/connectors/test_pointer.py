"""A pointer: its formula, what tokens stand for, and the positions that it is computed at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import calmlm
from calmlm.bases.families import Backbone
from calmlm.bases.heads import head_logits, head_scale
from calmlm.connectors.gate import GATE, OPENING
from calmlm.connectors.pointer import MOST, NOTHING, Pointer, point
from calmlm.errors import CheckpointError, ModelError
from calmlm.files.inspection import describe
from calmlm.modeling import probabilities
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.spelling import token_bytes
from calmlm.tokens.vocabularies import first_tokens, with_firsts
from compositions import assert_close, assert_helpful, logits_of, tiny_composition
from tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import tokenizer
from words import COMPOSITIONS, speaking

FAMILIES = ["llama", "gemma2", "gemma3_text", "cohere", "granite", "phi", "gpt2", "opt"]


# The formulas


def test_the_mixture_by_hand() -> None:
    own, said = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.0, 0.6, 0.2]])
    found = point(own.log() + 7, torch.tensor([[0.4]]), [said]).softmax(-1)
    expected = 0.6 * own + 0.4 * (said + 0.2 * own)
    assert_close(found, expected, 1e-5)
    logits = torch.randn(5, 3)
    assert torch.equal(point(logits, torch.zeros(5, 1), [said.expand(5, -1)]), logits)


def test_its_logits_stay_probabilities() -> None:
    """For several models, sure anchors and open gates: the softmax takes nothing away, and nothing overflows."""
    torch.manual_seed(0)
    logits = (8 * torch.randn(64, 11)).requires_grad_()
    said = [0.7 * torch.randn(64, 11).mul(3).softmax(-1), torch.eye(11)[torch.randint(11, (64,))]]
    gates = torch.rand(64, 2).requires_grad_()
    shares = torch.cat((gates.detach()[:32] / 2, torch.eye(2).repeat(16, 1))).requires_grad_()
    found = point(logits, shares, said)
    assert_close(found.exp().sum(-1).log(), logits.exp().sum(-1).log(), 1e-4)
    own = logits.softmax(-1)
    expected = own + sum(
        MOST * share * (other - other.sum(-1, keepdim=True) * own)
        for share, other in zip(shares.split(1, dim=-1), said, strict=True)
    )
    assert_close(found.softmax(-1), expected, 1e-5)
    for far in (1e3, 1e4):
        extreme = torch.tensor([[0.0, -far], [0.0, -far]], requires_grad=True)
        share = torch.tensor([[0.0], [1.0]], requires_grad=True)
        mixed = point(extreme, share, [torch.tensor([[0.0, 1.0], [0.0, 1.0]])])
        torch.nn.functional.cross_entropy(mixed, torch.tensor([1, 1])).backward()
        assert all(bool(t.isfinite().all()) for t in (mixed, extreme.grad, share.grad))
        assert torch.equal(mixed[0], extreme[0]) and float(share.grad[0]) < 0


def test_what_is_said_leads_through_the_table() -> None:
    pointer = Pointer(2, 2, table=torch.tensor([2, NOTHING, 0, 2, 9]))
    likely = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25]])
    assert_close(pointer.said(likely.log(), 3), torch.tensor([[0.3, 0.0, 0.25]]), 1e-6)
    wider = torch.cat((likely * 0.5, torch.tensor([[0.5]])), dim=-1)  # a head with more rows than there are tokens
    assert_close(pointer.said(wider.log(), 3), torch.tensor([[0.15, 0.0, 0.125]]), 1e-6)
    shared = Pointer(2, 2)
    assert_close(shared.said(likely.log(), 3), likely[:, :3], 1e-6)
    assert_close(shared.said(likely.log(), 7), torch.nn.functional.pad(likely, (0, 2)), 1e-6)


PAIRS = [
    ("bytes", "bytes-large"), ("sentencepiece", "bytes-large"), ("bytes-large", "sentencepiece"),
    ("unigram", "sentencepiece"), ("bytes", "wordpiece"),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_token_stands_for_the_first_one_of_its_bytes(ours: str, theirs: str) -> None:
    anchor, other = tokenizer(ours), tokenizer(theirs)
    alignment = with_firsts(Alignment.between(anchor, other), anchor, other)
    table = first_tokens(alignment, len(anchor), len(other) + 3).tolist()
    written, pieces = token_bytes(anchor), token_bytes(other)
    assert len(table) == len(other) + 3 and table[-3:] == [NOTHING] * 3
    mapped = 0
    for index, piece in enumerate(pieces):
        if piece is None or table[index] == NOTHING:
            continue
        mapped += 1
        assert piece.startswith(written[table[index]] or b"?")
        whole = [i for i, text in enumerate(written) if text == piece]
        assert table[index] in whole or not whole or ours == "unigram"
    assert mapped > 60
    assert table[other.eos_token_id] == anchor.eos_token_id
    for silent in (other.bos_token_id, other.pad_token_id, other.unk_token_id):
        assert table[silent] == NOTHING
    assert anchor.unk_token_id not in table
    few = first_tokens(alignment, 40, len(other))
    assert int(few.max()) < 40


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_give_their_models_own_logits(family: str) -> None:
    model = tiny_model(family)
    states: list[Tensor] = []
    backbone = Backbone.of(model, "anchor")
    handle = backbone.decoder.register_forward_hook(lambda _, __, output: states.append(output[0]))
    with torch.no_grad():
        logits = model(tiny_tokens(1, 9)).logits
    handle.remove()
    scale = head_scale(model, backbone, "anchor")
    assert_close(head_logits(model, states[0], scale), logits, 1e-4)


def test_a_head_that_does_something_else_is_refused() -> None:
    odd = tiny_model("mistral")
    forward = odd.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits**2
        return output

    odd.forward = shifted
    with pytest.raises(ModelError, match="words need models whose logits"):
        calmlm.compose(tiny_model("llama"), odd, words="pointer")


# In a composition


def written(writer: Any, ids: list[int]) -> list[int]:
    """The augmenting tokens of a text."""
    if hasattr(writer, "write"):
        return [index for index, _ in writer.write(ids)]
    row = torch.tensor([ids])
    return writer(row, torch.ones_like(row, dtype=torch.bool), torch.full((1, 3), -1)).ids[0].tolist()


def reference(model: calmlm.CalmForCausalLM, ids: Tensor) -> Tensor:
    """The probabilities (T, V_B) for one row (T,): each position by itself, from both models' own logits."""
    words, small = model.model.connectors["augmenting"][-1], model.augmenting["augmenting"]
    entry = model.config.augmenting["augmenting"]
    states: dict[str, Tensor] = {}
    found = []
    for end in range(1, len(ids) + 1):
        given = [int(i) for i in ids[:end]]
        if entry["reads"] == "text":
            given = written(model.model.transcoders["augmenting"], given)
        given = [*model.model.opening("augmenting").ids, *given]
        both = (("anchor", model.anchor, [int(i) for i in ids[:end]]), ("small", small, given))
        logits = {}
        for name, base, tokens in both:
            decoder = Backbone.of(base, name).decoder
            handle = decoder.register_forward_hook(lambda _, __, out, name=name: states.update({name: out[0][0, -1]}))
            with torch.no_grad(), model.disable_composition():
                logits[name] = base(torch.tensor([tokens])).logits[0, -1]
            handle.remove()
        unit = {name: state * (state.square().mean() + 1e-6).rsqrt() for name, state in states.items()}
        gate = unit["anchor"] @ words.gate_anchor + unit["small"] @ words.gate_augmenting + words.gate_bias
        share = MOST * OPENING * words.opening * (GATE * gate).sigmoid()
        own, other = logits["anchor"].softmax(-1), logits["small"].softmax(-1)
        said = torch.zeros_like(own)
        for index, value in enumerate(other.tolist()):
            place = index if words.table is None else int(words.table[index])
            if 0 <= place < len(own):
                said[place] += value
        found.append((1 - share) * own + share * (said + (1 - said.sum()) * own))
    return torch.stack(found)


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if "alone" in name])
def test_both_models_probabilities_are_mixed(name: str) -> None:
    model, ids = speaking("pointer", name), tiny_tokens(1, 7)
    assert_close(logits_of(model, ids)[0].softmax(-1), reference(model, ids[0]), 1e-5)


@pytest.mark.parametrize("name", ["llama+mistral", "qwen2+llama, own tokens"])
def test_the_loss_is_that_of_the_mixture_where_there_are_labels(name: str) -> None:
    model, ids = speaking("pointer", name), tiny_tokens(2, 8)
    labels = ids.clone()
    labels[0, :3] = labels[1, :5] = labels[1, 7] = -100
    prompt = {"prompt_mask": torch.zeros_like(ids, dtype=torch.bool)}
    logits = logits_of(model, ids, **prompt)
    with model.disable_composition():
        alone = logits_of(model, ids)
    wanted = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    expected = torch.nn.functional.nll_loss(logits.log_softmax(-1)[:, :-1].transpose(1, 2), labels[:, 1:])
    output = model(input_ids=ids, labels=labels, **prompt)
    assert_close(output.loss, expected, 1e-5)
    assert_close(output.logits, logits, 1e-5)
    output = model.train()(input_ids=ids, labels=labels, **prompt)
    assert_close(output.loss, expected, 1e-5)
    assert_close(output.logits[wanted], logits[wanted], 1e-5)
    if "alone" in name:
        assert torch.equal(output.logits[~wanted], alone[~wanted])
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    again = model(input_ids=ids, labels=labels, shift_labels=shifted, **prompt)
    assert_close(again.loss, expected, 1e-5)
    unlabelled = model(input_ids=ids, labels=torch.full_like(ids, -100), **prompt)
    unlabelled.logits.sum().backward()
    model.eval()


def test_positions_that_have_no_loss_keep_the_anchors_logits() -> None:
    model, ids = speaking("pointer", "gpt2+qwen3, words alone"), tiny_tokens(2, 8)
    labels = ids.clone()
    labels[:, :5] = -100
    with model.disable_composition():
        alone = logits_of(model, ids)
    with torch.no_grad():
        found = model.train()(input_ids=ids, labels=labels, use_cache=False).logits
    assert torch.equal(found[:, :4], alone[:, :4]) and torch.equal(found[:, 7], alone[:, 7])
    assert float((found[:, 4:7] - alone[:, 4:7]).abs().amax(-1).min()) > 1e-3


@pytest.mark.parametrize("name", ["llama+mistral", "gemma3+opt, words alone", "mistral+gemma3, own tokens"])
def test_the_logits_that_are_kept(name: str) -> None:
    model, ids = speaking("pointer", name), tiny_tokens(2, 8)
    logits = logits_of(model, ids)
    chosen = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    composed = torch.tensor([True, False])
    partly = logits_of(model, ids, composition_mask=composed)
    for keep, expected in (
        (3, logits[:, -3:]),
        (torch.tensor([1, 6]), logits[:, [1, 6]]),
        (torch.tensor([[1, 2], [5, 3]]), torch.stack((logits[0, [1, 2]], logits[1, [5, 3]]))),
        (chosen, logits[chosen]),
    ):
        assert_close(logits_of(model, ids, logits_to_keep=keep), expected, 1e-5)
    assert_close(logits_of(model, ids, logits_to_keep=2, composition_mask=composed), partly[:, -2:], 1e-5)


def test_a_few_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = speaking("pointer", "qwen2+llama, own tokens").train(), tiny_tokens(2, 8)
    labels = ids.clone()
    labels[:, :3] = -100
    results = []
    for most in (probabilities.AT_ONCE, 1, 700):
        monkeypatch.setattr(probabilities, "AT_ONCE", most)
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        grads = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]
        results.append((torch.cat(grads), logits_of(model.eval(), ids)))
        model.train()
    for grads, logits in results[1:]:
        assert_close(grads, results[0][0], 1e-5)
        assert_close(logits, results[0][1], 1e-5)
    assert all(p.grad is None for base in model.model.bases() for p in base.parameters())


def test_in_half_precision_a_shut_gate_changes_nothing() -> None:
    model = calmlm.compose(tiny_model("llama").bfloat16(), tiny_model("gpt2").bfloat16(), "none", words="pointer")
    ids = tiny_tokens(2, 6)
    with model.disable_composition():
        alone = logits_of(model, ids)
    found = logits_of(model, ids)
    assert found.dtype == torch.bfloat16 and torch.equal(found, alone)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.model.connectors["augmenting"][-1].opening.grad != 0


def test_a_map_changes_the_state_before_a_pointer_does_the_probabilities() -> None:
    bases = {"said": tiny_model("mistral", seed=2), "spelled": tiny_model("gpt2", seed=3)}
    model = calmlm.compose(tiny_model("llama"), bases, "none", words={"said": "map", "spelled": "pointer"})
    for name in bases:
        with torch.no_grad():
            model.model.connectors[name][-1].opening.fill_(0.7 / OPENING)
    ids = tiny_tokens(1, 6)
    model.disable_augmenting("spelled")
    mapped = logits_of(model, ids)
    assert model.base_model(input_ids=ids).last_hidden_state.shape[:2] == ids.shape
    model.enable_augmenting("spelled")
    with torch.no_grad():
        other = bases["spelled"](ids).logits.softmax(-1)
    share = MOST * 0.7 * 0.5
    assert_close(logits_of(model, ids).softmax(-1), (1 - share) * mapped.softmax(-1) + share * other, 1e-5)


def test_losses_that_take_states_are_refused() -> None:
    model = speaking("pointer", "llama+mistral")
    with pytest.raises(ModelError) as caught:
        model.base_model(input_ids=tiny_tokens(1, 6))
    assert_helpful(caught.value, "words='map'", "logits")
    with model.disable_composition():
        assert model.base_model(input_ids=tiny_tokens(1, 6)).last_hidden_state.shape[1] == 6


# Files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    speaking("pointer", "llama+gpt2, own tokens, words alone").save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> calmlm.CalmForCausalLM:
    fresh = speaking("pointer", "llama+gpt2, own tokens, words alone", awake=False)
    return calmlm.CalmForCausalLM.from_pretrained(
        folder, anchor=fresh.anchor, augmenting=fresh.augmenting["augmenting"]
    )


def test_the_table_stands_in_the_alignment_alone(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    assert not any("table" in name for name in tensors)
    lines = dict(describe(str(saved)))
    assert lines["words"] == "into the anchor's probabilities, as a pointer"
    whole = sum((saved / name).stat().st_size for name in ("model.safetensors", "alignment.augmenting.json"))
    assert lines["size"] == f"{whole / 1e6:,.1f} MB"
    assert "words (pointer)" in (saved / "README.md").read_text(encoding="utf-8")
    path = saved / "alignment.augmenting.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["alignment"]["firsts"] = []
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match="must hold the anchor's first tokens") as caught:
        load(saved)
    assert_helpful(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        {"kind": "letters"},
        {"kind": "pointer"},
        {"kind": "pointer", "scale": "1"},
        {"kind": "map", "scale": 1.0},
        {"kind": "pointer", "scale": 1.0, "train_map": True},
        {"kind": "pointer", "scale": math.inf},
    ],
)
def test_damaged_words_are_refused(saved: Path, words: dict[str, Any]) -> None:
    data = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    data["augmenting"]["augmenting"]["words"] = words
    (saved / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match="lacks some of them"):
        load(saved)


def test_words_saved_without_a_kind_are_maps(tmp_path: Path) -> None:
    model, bases = speaking("map", "llama+mistral"), tiny_composition("llama", "mistral")
    del model.config.augmenting["augmenting"]["words"]["kind"]
    model.save_pretrained(tmp_path)
    again = calmlm.CalmForCausalLM.from_pretrained(
        tmp_path, anchor=bases.anchor, augmenting=bases.augmenting["augmenting"]
    )
    assert torch.equal(logits_of(again, tiny_tokens(1, 5)), logits_of(model, tiny_tokens(1, 5)))


def test_vocabularies_that_share_next_to_nothing_are_refused() -> None:
    small = tokenizer("bytes")
    with pytest.raises(ModelError, match="words need vocabularies that share tokens"):
        calmlm.compose(
            tiny_model("llama", vocab_size=10), tiny_model("gpt2", vocab_size=len(small)), "none", words="pointer",
            tokenizer=tiny_tokenizer(), augmenting_tokenizer=small,
        )  # fmt: skip
