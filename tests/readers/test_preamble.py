"""What a model reads before the text, its beginning and a prefix: as if it stood in the text, for it alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.errors import CheckpointError, ConfigError, DataError, ModelError
from calmlm.readers import Inputs
from calmlm.state.past import Past
from compositions import assert_close, assert_helpful, greedy_without_cache, logits_of, pad, tiny_composition
from equalities import GREEDY
from tiny import FAMILIES, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import with_beginning

OPENED: dict[str, Any] = {
    "tokenizer": tiny_tokenizer(),
    "augmenting_tokenizer": with_beginning(tiny_tokenizer()),
    "augmenting_prefix": "a fox:",
}
WINDOWS = {"mistral": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4}, "gemma2": {"sliding_window": 4}}
RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": FAMILIES["llama"] | {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8},
}
OPENING = [1, *tiny_tokenizer()("a fox:", add_special_tokens=False).input_ids]
ROWS = [tiny_tokens(1, length, seed=length)[0] for length in (9, 3, 6)]


@torch.no_grad()
def states_alone(model: calmlm.CalmForCausalLM, ids: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """Outputs of layers of the augmenting model, run by itself on the opening and ``ids`` (T,): {layer: (T, D)}."""
    found: dict[int, Tensor] = {}
    backbone = model.model.backbone("augmenting")
    handles = [
        backbone.layers[layer].register_forward_hook(
            lambda _, __, output, layer=layer: found.update(
                {layer: (output[0] if isinstance(output, tuple) else output)[0, len(OPENING) :]}
            )
        )
        for layer in layers
    ]
    backbone.decoder(input_ids=torch.cat((torch.tensor(OPENING), ids))[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_behind_the_opening(family: str, side: str) -> None:
    model = tiny_composition("llama", family, augmenting_options=WINDOWS.get(family), **OPENED)
    reader = model.model.reader("augmenting")
    rows = ROWS[:1] if family == "mpt" else ROWS  # which counts padding
    ids, mask = pad(rows, side)
    hidden = reader.read(Inputs(ids, mask, None, None, None), Past()).hidden
    assert hidden
    for row, alone in enumerate(rows):
        expected = states_alone(model, alone, sorted(hidden))
        for layer, states in hidden.items():
            assert_close(states[row, mask[row].bool()], expected[layer], 1e-4)


@pytest.mark.parametrize("own", [True, False], ids=["own tokens", "shared ids"])
@pytest.mark.parametrize("family", RECURRENT)
def test_models_that_keep_a_state_read_it_with_each_text(family: str, own: bool, monkeypatch: Any) -> None:
    """Right before each text, whose rows may differ in length; they are decoded without a cache."""
    monkeypatch.setitem(FAMILIES, family, RECURRENT[family])
    model = tiny_composition("llama", family, **(OPENED if own else {}))
    model.model.change_prefix("augmenting", OPENING[own:])
    reader = model.model.reader("augmenting")
    for side in ("left", "right"):
        ids, mask = pad(ROWS, side)
        hidden = reader.read(Inputs(ids, mask, None, None, None), Past()).hidden
        for row, alone in enumerate(ROWS):
            expected = states_alone(model, alone, sorted(hidden))
            for layer, states in hidden.items():
                assert_close(states[row, mask[row].bool()], expected[layer], 1e-4)
    ids, mask = pad(ROWS, "left")
    found = model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
    assert torch.equal(found, greedy_without_cache(model, ids, 4, mask))
    model.model.change_prefix("augmenting", [])
    assert model.model.can_cache is not own  # a beginning is left to the one with tokens of its own


def test_a_mask_that_does_not_say_where_a_text_begins_is_refused_by_them(monkeypatch: Any) -> None:
    monkeypatch.setitem(FAMILIES, "lfm2", RECURRENT["lfm2"])
    model = tiny_composition("llama", "lfm2")
    model.model.change_prefix("augmenting", OPENING)
    with pytest.raises(DataError) as error:
        model(input_ids=tiny_tokens(1, 9), attention_mask=torch.ones((1, 1, 9, 9)).tril().bool())
    assert_helpful(error.value, "(batch, length)", "Lfm2Model")


def test_a_damaged_opening_is_refused(tmp_path: Path) -> None:
    model = tiny_composition("llama", "mistral", **OPENED)
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    bases = {"anchor": model.anchor, "augmenting": model.augmenting["augmenting"]}
    for damage in ({"prefix": [97]}, {"beginning": ["a"]}, {"prefix": 3}):
        entry = data["augmenting"]["augmenting"] | damage
        (tmp_path / "config.json").write_text(json.dumps(data | {"augmenting": {"augmenting": entry}}))
        with pytest.raises(CheckpointError):
            calmlm.CalmForCausalLM.from_pretrained(tmp_path, **copy.deepcopy(bases))


def test_another_prefix_is_read_from_the_next_text_on(tmp_path: Path) -> None:
    """As if the composition had been made with it, also after saving and loading; None leaves the beginning alone."""
    tokens, own = tiny_tokens(2, 9), OPENED["augmenting_tokenizer"]
    model = tiny_composition("llama", "mistral", **OPENED)
    first = logits_of(model, tokens)
    for prefix in ("the old dog said:", None):
        made = tiny_composition("llama", "mistral", **OPENED | {"augmenting_prefix": prefix})
        model.set_augmenting_prefix(prefix, None if prefix is None else own)
        assert logits_of(model, tokens).equal(logits_of(made, tokens))
        assert not logits_of(model, tokens).equal(first)
        assert model.config.augmenting == made.config.augmenting
        assert model.generate(tokens, max_new_tokens=5).equal(made.generate(tokens, max_new_tokens=5))
        model.save_pretrained(tmp_path)
        bases = {"anchor": model.anchor, "augmenting": model.augmenting["augmenting"]}
        again = calmlm.CalmForCausalLM.from_pretrained(tmp_path, **copy.deepcopy(bases))
        assert logits_of(again, tokens).equal(logits_of(made, tokens))
    model.set_augmenting_prefix("a fox:", own, name="augmenting")
    assert logits_of(model, tokens).equal(first)
    for given, message in (
        (("x",), "needs the augmenting model's tokenizer"),
        (("x", own, "other"), "name must be one of the augmenting models augmenting, but got 'other'"),
        ((5, own), "must be a text or a list of messages"),
        (("a \udc80", own), "must be text in Unicode, but holds half of a character .* at position 3: repair it"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.set_augmenting_prefix(*given)
    assert logits_of(model, tokens).equal(first)


def test_a_cache_in_use_ends_with_its_prefix() -> None:
    own, ids = OPENED["augmenting_tokenizer"], tiny_tokens(2, 9)
    model = tiny_composition("llama", "mistral", **OPENED)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        model.set_augmenting_prefix("the old dog said:", own)
        with pytest.raises(ModelError, match="the prefix of 'augmenting' was changed since: begin a new one"):
            model(ids[:, 5:], past_key_values=cache)
        model.set_augmenting_prefix("a fox:", own)
        assert_close(model(ids[:, 5:], past_key_values=cache).logits, logits_of(model, ids)[:, 5:], 1e-5)
        static = {"cache_implementation": "static", "max_new_tokens": 4}
        first = model.generate(ids, **static)
        model.set_augmenting_prefix("the old dog said:", own)
        assert torch.equal(model.generate(ids, **static), model.generate(ids, max_new_tokens=4))
        model.set_augmenting_prefix("a fox:", own)
        assert torch.equal(model.generate(ids, **static), first)


def test_a_prefix_leaves_room_for_text() -> None:
    own, ids = OPENED["augmenting_tokenizer"], tiny_tokens(1, 4)
    with pytest.raises(ConfigError, match="must leave room for text in the 128 positions of the augmenting model"):
        tiny_composition("llama", "gpt2", **OPENED | {"augmenting_prefix": "a fox: " * 60})
    model = tiny_composition("llama", "gpt2", **OPENED)
    first = logits_of(model, ids)
    with pytest.raises(ConfigError, match="must leave room for text in the 128 positions of 'augmenting'"):
        model.set_augmenting_prefix("a fox: " * 60, own)
    assert torch.equal(logits_of(model, ids), first)


def test_an_opening_is_read_again_where_the_model_has_changed() -> None:
    ids = tiny_tokens(2, 6)
    model = tiny_composition("llama", "mistral", **OPENED)

    def check(what: str) -> None:
        found = logits_of(model, ids)
        model.model.opening("augmenting").change(model.model.opening("augmenting").ids)
        assert torch.equal(found, logits_of(model, ids)), what

    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model, ids)
    check("kept from autocast")
    small = model.augmenting["augmenting"]
    with torch.no_grad():
        small.model.layers[2].mlp.up_proj.weight.mul_(2)
    check("kept from before a later layer changed")
    small.load_state_dict({name: 2 * tensor for name, tensor in small.state_dict().items()}, assign=True)
    check("kept from before other weights were assigned")


def test_the_anchor_reads_nothing_of_it() -> None:
    ids = tiny_tokens(1, 6)
    with_it, without = tiny_composition("llama", "mistral", **OPENED), tiny_composition("llama", "mistral")
    assert not torch.equal(logits_of(with_it, ids), logits_of(without, ids))
    with with_it.disable_composition(), without.disable_composition():
        assert torch.equal(logits_of(with_it, ids), logits_of(without, ids))


@pytest.mark.parametrize("family", ["mpt", "llama4_text"])
def test_a_model_that_counts_padding_behind_it_reads_one_row_at_a_time(family: str, monkeypatch: Any) -> None:
    """Llama 4 counts it in the chunks that its layers look at, which are longer than any trial."""
    chunks = FAMILIES["llama"] | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 32}
    monkeypatch.setitem(FAMILIES, "llama4_text", chunks)
    model = tiny_composition("llama", family, **OPENED)
    ids, mask = pad(ROWS, "left")
    with pytest.raises(DataError, match="one row at a time"):
        model(input_ids=ids, attention_mask=mask)
    model(input_ids=ROWS[0][None])
