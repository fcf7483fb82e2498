"""Looking into a composition: every quantity against a slow reference that is computed in another way."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.answering import TextModel
from calmlm.communication.looking import look, look_into
from calmlm.connectors.cross_attention import rotary_angles, rotate
from calmlm.connectors.gate import GATE, OPENING
from calmlm.errors import ConfigError, DataError
from compositions import assert_close, assert_helpful, awaken, logits_of, own, tiny_composition
from connectors.test_adapters import adapted, adapters_of
from connectors.test_graft import grafted
from tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import tokenizer
from words import speaking

IDS = tiny_tokens(1, 12)[0].tolist()
PROMPT, NEW = IDS[:7], IDS[7:]
ROWS = slice(6, 11)  # the positions that predict the new tokens


def traced(model: calmlm.CalmForCausalLM, **options: Any) -> Any:
    return look_into(model, tiny_tokenizer(), PROMPT, NEW, **options)


@torch.no_grad()
def likely(model: Any, ids: list[int] = IDS, **given: Any) -> Tensor:
    logits = logits_of(model, torch.tensor([ids]), **given)[0].log_softmax(-1)
    return torch.stack([logits[place, ids[place + 1]] for place in range(len(ids) - len(NEW) - 1, len(ids) - 1)])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"gate": True, "rotary": True, "query_key_bias": 1.5, "null_key": True}])
def test_weights_are_softmax_by_hand_and_see_nothing_later(options: dict[str, Any], implementation: str) -> None:
    model = tiny_composition(connections=[(0, 1), (4, 3)], attn_implementation=implementation, **options)
    kept: list[tuple[Any, Tensor, Tensor]] = []
    for connector in model.model.connectors["augmenting"]:
        connector.register_forward_pre_hook(lambda module, given: kept.append((module, given[0], given[1])))
    before = logits_of(model, torch.tensor([IDS]))
    kept.clear()
    found = traced(model)
    assert torch.equal(logits_of(model, torch.tensor([IDS])), before)  # all is as it was
    assert [one.layers for one in found.attention] == [(0, 1), (4, 3)]
    assert found.heard["augmenting"].tokens == tiny_tokenizer().batch_decode([[i] for i in IDS[:11]])
    for one, (connector, state, keys) in zip(found.attention, kept, strict=False):
        query = connector.q_proj(connector.anchor_norm(state))[0].view(11, connector.num_heads, -1).transpose(0, 1)
        if connector.rotary:
            query = rotate(query[None], rotary_angles(torch.arange(11)[None], query.shape[-1]))[0]
        for head in range(connector.num_heads):
            for row, place in enumerate(range(6, 11)):
                scores = [float(query[head, place] @ keys[0, head, column]) for column in range(place + 1)]
                if connector.null_key is not None:
                    scores.append(float(query[head, place] @ connector.null_key[head]))
                weights = torch.tensor(scores).div(math.sqrt(query.shape[-1])).softmax(-1)
                assert_close(one.weights[head, row, : place + 1], weights[: place + 1], 1e-5)
                assert not one.weights[head, row, place + 1 :].any()
                if one.nothing is not None:
                    assert float(one.nothing[head, row]) == pytest.approx(float(weights[-1]), abs=1e-5)
    assert all((one.nothing is not None) == ("null_key" in options) for one in found.attention)


@pytest.mark.parametrize("theirs", ["bytes-large", "sentencepiece"])
@pytest.mark.parametrize("alignment", ["own", "transcode"])
def test_other_tokens_are_those_of_the_text_so_far(theirs: str, alignment: str) -> None:
    """At every token of the answer the augmenting model had read the text so far, and nothing else."""
    model = tiny_composition("llama", "mistral", alignment=alignment, **own(theirs))
    written = tiny_tokenizer()
    ids, new = (written(part).input_ids for part in ("the quick fox", " jumps over 12 dogs"))
    model.augmenting["augmenting"].name_or_path = ""
    found = look_into(model, written, ids, new)
    heard = found.heard["augmenting"]
    for one in found.attention:
        assert_close(one.weights.sum(-1), torch.ones(one.weights.shape[:2]), 1e-5)
    if alignment == "transcode":  # nobody knows what this tokenizer calls its tokens
        assert all(token.startswith("#") for token in heard.tokens) and all(heard.stays)
        return
    text = "the quick fox jumps over 12 dogs"
    for row in range(len(new)):
        seen = found.attention[0].weights[0, row] > 0
        read = "".join(token for token, visible in zip(heard.tokens, seen, strict=True) if visible)
        assert read.removeprefix(" ") == text[: len("the quick fox") + row]
    assert not all(heard.stays) and any(heard.stays)


def test_a_position_that_sees_nothing_attends_to_nothing() -> None:
    model = tiny_composition("llama", "mistral", alignment="retokenize", **own("bytes-large"))
    ids, new = (tiny_tokenizer()(part).input_ids for part in ("q", "uick fox and 12 dogs"))
    (one, *_) = look_into(model, tiny_tokenizer(), ids, new).attention
    assert not one.weights[:, 0].any() and one.weights[:, -1].all()
    (one, *_), heard = (found := look_into(model, tiny_tokenizer(), ids, new[:2])).attention or [None], found.heard
    assert one is None and not heard["augmenting"].tokens  # nothing was read at all


@pytest.mark.parametrize("connector", ["cross_attention", "legonn", "flamingo"])
def test_contributions_are_norms_by_hooks(connector: str) -> None:
    model = tiny_composition(connections=[(1, 1), (2, 3)], connector=connector)
    layers, kept = model.model.backbone().layers, {}

    def keep(key: Any) -> Any:
        return lambda module, given, output: kept.__setitem__(key, output[0] if isinstance(output, tuple) else output)

    def keep_input(key: Any) -> Any:
        return lambda module, given: kept.__setitem__(key, given[0])

    for place in (1, 3):
        if connector == "flamingo":
            layers[place].register_forward_pre_hook(keep_input((place, "plain")), prepend=True)
            layers[place].register_forward_pre_hook(keep_input((place, "new")))
        else:
            layers[place].register_forward_hook(keep((place, "plain")), prepend=True)
            layers[place].register_forward_hook(keep((place, "new")))
    logits_of(model, torch.tensor([IDS]))
    states = dict(kept)
    contributions = traced(model).contributions
    assert list(contributions) == ["augmenting 1 → 1", "augmenting 2 → 3"]
    for (_, ratios), place in zip(contributions.items(), (1, 3), strict=True):
        plain, new = states[place, "plain"][0], states[place, "new"][0]
        expected = (new - plain).norm(dim=-1) / plain.norm(dim=-1)
        assert_close(torch.tensor(ratios), expected[ROWS], 1e-4)
    with model.composition_scale(0.5):
        half = traced(model)
    assert half.scale == 0.5
    first = "augmenting 1 → 1"
    assert_close(torch.tensor(half.contributions[first]), torch.tensor(contributions[first]) / 2, 1e-4)


@torch.no_grad()
def test_adapters_contribute_what_they_add_to_all_maps() -> None:
    model = adapted("qwen2")
    found, added, plain = traced(model).contributions, torch.zeros(12), torch.zeros(12)
    inputs: dict[str, Tensor] = {}
    decoder = model.model.backbone().decoder
    targets = model.config.augmenting["augmenting"]["adapters"]["targets"]
    for name in targets:
        decoder.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: inputs.__setitem__(name, given[0][0])
        )
    logits_of(model, torch.tensor([IDS]))
    for name in targets:
        adapter, map_ = adapters_of(model).of(name), decoder.get_submodule(name)
        added += (inputs[name] @ adapter.down.weight.T @ adapter.up.weight.T * adapter.scaling).square().sum(-1)
        plain += (inputs[name] @ map_.weight.T + (0 if map_.bias is None else map_.bias)).square().sum(-1)
    assert_close(torch.tensor(found["augmenting adapters"]), (added / plain).sqrt()[ROWS], 1e-4)
    assert set(found["augmenting words"]) == {0.0}  # they are silent at the start


@torch.no_grad()
@pytest.mark.parametrize("kind", ["map", "pointer"])
def test_gates_are_their_formula(kind: str) -> None:
    model = speaking(kind, "gpt2+qwen3, words alone")
    words = model.model.connectors["augmenting"][-1]

    def unit(state: Tensor) -> Tensor:
        return state / state.square().mean(-1, keepdim=True).sqrt()

    ids = torch.tensor([IDS])
    ours = model.model.backbone().decoder(input_ids=ids).last_hidden_state[0]
    theirs = model.model.backbone("augmenting").decoder(input_ids=ids).last_hidden_state[0]
    logit = unit(ours) @ words.gate_anchor + unit(theirs) @ words.gate_augmenting + words.gate_bias
    expected = (words.opening * OPENING).clamp(0, 1) * (GATE * logit).sigmoid()
    found = traced(model)
    (label,) = found.gates
    assert label == f"augmenting {'words' if kind == 'map' else 'pointer'}"
    assert_close(torch.tensor(found.gates[label]), expected[ROWS], 1e-4)
    with model.composition_scale(0.25):
        assert_close(torch.tensor(traced(model).gates[label]), expected[ROWS] / 4, 1e-4)
    assert bool(found.contributions) == (kind == "map")


def test_grafts_open_where_a_token_ends() -> None:
    model = grafted("mistral+gemma3, own tokens")
    ids, new = (tiny_tokenizer()(part).input_ids for part in ("the quick", " fox jumps"))
    found = look_into(model, tiny_tokenizer(), ids, new)
    assert list(found.gates) == [
        f"augmenting {i} → {j}" for i, j in model.config.augmenting["augmenting"]["connections"]
    ]
    assert not found.attention
    for label, gates in found.gates.items():
        assert any(gates) and all(0 <= gate <= 1 for gate in gates)
        assert [gate == 0 for gate in gates] == [ratio == 0 for ratio in found.contributions[label]]


def test_silenced_is_the_composition_without_the_model() -> None:
    model = tiny_composition(words="map", connections=[(0, 1)])
    single = traced(model)
    assert_close(torch.tensor(single.silenced["augmenting"]), likely(model) - likely(model.anchor), 1e-4)
    other = awaken(calmlm.compose(model.anchor, tiny_model("mistral", seed=5), connections=[(1, 2)]), seed=4)
    model.add_augmenting("second", other)
    found, spoken = traced(model), likely(model)
    assert_close(torch.tensor(found.composition), spoken, 1e-4)
    assert_close(torch.tensor(found.anchor), likely(model.anchor), 1e-4)
    assert set(found.silenced) == set(found.heard) == {"augmenting", "second"} == model.model.active
    model.remove_augmenting("second")
    without = likely(model)
    assert_close(torch.tensor(found.silenced["second"]), spoken - without, 1e-4)
    assert float((spoken - without).abs().max()) > 0.1


def test_swapped_is_another_prompt_in_the_models_place() -> None:
    model = tiny_composition()
    other = tiny_tokens(1, 5, seed=9)[0].tolist()
    found = traced(model, other=other)
    width = len(IDS)
    ids = torch.tensor([[0] * (len(PROMPT) - len(other)) + other + NEW])
    mask = torch.tensor([[0] * (width - len(other) - len(NEW)) + [1] * (len(other) + len(NEW))])
    given = {"augmenting": {"input_ids": ids, "attention_mask": mask}}
    expected = likely(model) - likely(model, augmenting_inputs=given)
    assert_close(torch.tensor(found.swapped["augmenting"]), expected, 1e-4)
    assert float(expected.abs().max()) > 0.1
    assert traced(model).swapped == {}
    prompted = tiny_composition(refresh=False)
    assert traced(prompted, other=other).swapped == {}  # it reads no text that grows
    assert len(traced(prompted).heard["augmenting"].tokens) == len(PROMPT)


@pytest.mark.parametrize("theirs", [None, "bytes-large"])
def test_an_answer_that_is_written_is_looked_into_as_it_is(theirs: str | None) -> None:
    ours = tokenizer("bytes")
    size = {"vocab_size": len(ours)}
    options = own(theirs, "bytes") if theirs else {"anchor_options": size, "augmenting_options": size}
    text = TextModel(tiny_composition("llama", "mistral", **options), ours)
    found = look(text, "the quick fox", max_new_tokens=6)
    pieces: list[str] = []
    ids = text.write("the quick fox", pieces.append, max_new_tokens=6)
    assert found.answer == "".join(pieces) and len(found.tokens) == len(ids)
    given = look(text, "the quick fox", answer=" jumps", other="12 dogs")
    assert "".join(given.tokens) == given.answer == " jumps" and given.swapped
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["answer"] == found.answer and len(plain["attention"]) == len(found.attention)
    assert_close(torch.tensor(plain["attention"][0]["weights"]), found.attention[0].weights, 1e-4)
    assert set(plain) == {"prompt", "answer", "tokens", "scale", "log_probability", "heard", "attention", "gates",
                          "contributions", "silenced", "swapped"}  # fmt: skip


def test_an_answer_that_fills_a_context_is_looked_into() -> None:
    """It ends with the first token that the augmenting model has no positions for."""
    ours = tokenizer("bytes-large")
    options = own("characters", "bytes-large")
    options["augmenting_options"] |= {"n_positions": 40, "max_position_embeddings": 40}
    text = TextModel(tiny_composition("llama", "gpt2", alignment="own", **options), ours)
    ids = text.write("the quick fox", lambda piece: None, max_new_tokens=60)
    assert len(ids) < 60
    found = look(text, "the quick fox", max_new_tokens=60)
    assert len(found.composition) == len(found.tokens) == len(ids)


def test_what_cannot_be_looked_into() -> None:
    model = tiny_composition()
    with model.disable_composition(), pytest.raises(ConfigError) as caught:
        traced(model)
    assert_helpful(caught.value, "composition_scale(0)")
    with pytest.raises(DataError):
        look_into(model, tiny_tokenizer(), PROMPT, [])
    text = TextModel(model, tiny_tokenizer())
    for prompt, answer in (("", "a"), ("a", "")):
        with pytest.raises(DataError):
            look(text, prompt, answer=answer)
    assert not model.training and model.model.connectors["augmenting"][0].observe is None
