"""Grafts: by hand, aligned by plain text, and wherever a composition works; with adapters beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
import equalities
from calmlm.connectors.gate import GATE, OPENING
from calmlm.connectors.graft import BIAS, Graft
from calmlm.errors import ConfigError
from compositions import assert_close, logits_of, own, tiny_composition
from tiny import tiny_model, tiny_tokenizer, tiny_tokens

TEXTS = [f"the quick fox {number} jumps over a lazy dog and {number * 7} more of them" for number in range(12)]
GRAFT: dict[str, Any] = {
    "connector": "graft", "connections": [[0, 0], [1, 0], [1, 1]], "init": "aligned", "plain_text": TEXTS,
}  # fmt: skip
SHARED: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "augmenting_tokenizer": tiny_tokenizer()}


COMPOSITIONS: dict[str, dict[str, Any]] = {
    "llama+mistral": {"anchor": "llama", "augmenting": "mistral", **GRAFT, **SHARED},
    "gpt2+qwen3, adapters": {"anchor": "gpt2", "augmenting": "qwen3", **GRAFT, **SHARED, "adapters": 2},
    "gemma3+opt, words": {
        "anchor": "gemma3_text", "augmenting": "opt", **GRAFT, **SHARED, "words": "map", "adapters": 3,
    },
    "mistral+gemma3, own tokens": {"anchor": "mistral", "augmenting": "gemma3_text", **GRAFT, **own("bytes-large")},
    "llama+gpt2, own tokens, adapters": {
        "anchor": "llama", "augmenting": "gpt2", **GRAFT, **own("bytes"), "adapters": 2,
    },
    "qwen2+llama, own tokens, words": {
        "anchor": "qwen2", "augmenting": "llama", **GRAFT, **own("sentencepiece"), "words": "map", "adapters": 2,
    },
    "phi+phi3, transcoded": {
        "anchor": "phi", "augmenting": "phi3", **GRAFT, **own("unigram"), "alignment": "transcode", "adapters": 2,
    },
    "llama+mistral, words and adapters alone": {
        "anchor": "llama", "augmenting": "mistral", "connections": "none", "words": "map", "adapters": 2,
    },
}  # fmt: skip


def grafted(name: str) -> calmlm.CalmForCausalLM:
    """A composition with its gates open."""
    model = tiny_composition(**COMPOSITIONS[name])
    with torch.no_grad():
        for key, parameter in model.model.connectors.named_parameters():
            if key.endswith("opening"):
                parameter.fill_(0.7 / OPENING)
            if key.endswith("deviation"):
                parameter.abs_().add_(0.5)
    return model


@pytest.fixture(params=COMPOSITIONS, scope="module")
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    return grafted(request.param)


def test_by_hand() -> None:
    graft = Graft(2, 2, opened=True)
    graft.align(
        torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        torch.tensor([0.5, 0.0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([2.0, 4]),
    )
    assert graft.correction is not None
    with torch.no_grad():
        graft.gate_anchor.copy_(torch.tensor([1.0, 0.0]))
        graft.correction.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    anchor, theirs = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]]), torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])
    g = 1 / (1 + 2.718281828459045 ** -(GATE * 3 / 12.5**0.5 + BIAS))
    expected = (1 - g) * torch.tensor([3.0, 4.0]) + g * torch.tensor([1 + 2 + 0.5 + 1, 1.0 + 1])
    found = graft(anchor, theirs, torch.tensor([[True, False]]))
    assert_close(found[0, 0], expected, 1e-5)
    assert torch.equal(found[0, 1], anchor[0, 1])


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_an_untrained_one_is_the_anchor_and_learns(name: str) -> None:
    model = tiny_composition(awake=False, **COMPOSITIONS[name])
    ids = tiny_tokens(2, 9)
    alone = logits_of(model.anchor, ids)
    assert torch.equal(logits_of(model, ids), alone)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3
    with model.disable_composition():
        assert torch.equal(logits_of(model, ids), alone)


def test_only_states_at_the_ends_of_tokens_are_taken() -> None:
    """Where none of the augmenting model's tokens ends, the anchor's state is its own."""
    model = grafted("llama+gpt2, own tokens, adapters")
    tokens = tiny_tokenizer()("an extraordinary quick fox").input_ids
    ids = torch.tensor([tokens])
    writer = model.model.transcoders["augmenting"]
    owners = {owner for _, owner in writer.write(tokens)}
    between = sorted(set(range(len(tokens))) - owners)
    assert between and owners, "a text whose tokens end at some of the anchor's and not at others"
    graft = model.model.connectors["augmenting"][0]
    seen: list[Tensor] = []
    handle = graft.register_forward_hook(lambda _, args, output: seen.append((output != args[0]).any(-1)[0]))
    with torch.no_grad():
        model(input_ids=ids, prompt_mask=torch.ones_like(ids, dtype=torch.bool), use_cache=False)
    handle.remove()
    assert seen[0].nonzero()[:, 0].tolist() == sorted(owners)


def test_it_is_no_identity_with_a_correction() -> None:
    graft = Graft(3, 2)
    assert graft.is_identity
    assert graft.correction is not None
    torch.nn.init.ones_(graft.correction.weight)
    assert not graft.is_identity
    assert not torch.equal(graft(torch.ones(1, 1, 2), torch.ones(1, 1, 3), None), torch.ones(1, 1, 2))


def test_texts_are_read_as_far_as_the_models_can() -> None:
    long = [" ".join(TEXTS)]
    model = tiny_composition(
        "llama", "gpt2", [[0, 0]], connector="graft", init="aligned", plain_text=long * 3, awake=False,
        augmenting_options={"n_positions": 24}, **SHARED,
    )  # fmt: skip
    assert bool(model.model.connectors["augmenting"][0].map.weight.any())


@pytest.mark.filterwarnings("ignore:The augmenting model cannot take back what it has read")
def test_a_model_that_counts_padding_reads_texts_one_by_one() -> None:
    """MPT, in tokens of its own behind a beginning."""
    options: dict[str, Any] = {**GRAFT, "connections": "aligned-1", **own("characters")}
    examples = [{"prompt": text[: 9 + place], "completion": text[9 + place :]} for place, text in enumerate(TEXTS)]
    model = tiny_composition("qwen2", "mpt", **options, development=examples, awake=False)
    assert bool(model.model.connectors["augmenting"][0].map.weight.any())


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


@pytest.mark.parametrize("name", ["llama+mistral", "gpt2+qwen3, adapters"])
def test_static_caches_and_drafts(name: str) -> None:
    equalities.assert_static_and_drafts(grafted(name))


def test_saved_and_loaded_and_copied(model: calmlm.CalmForCausalLM, tmp_path: Path) -> None:
    equalities.assert_round_trip(model, tmp_path)


@pytest.mark.parametrize("name", ["llama+mistral", "gpt2+qwen3, adapters"])
def test_joined_and_removed(name: str) -> None:
    equalities.assert_joins(grafted(name), grafted(name))


# Maps from plain text


@pytest.mark.parametrize("kind", ["shared ids", "own"])
def test_the_map_is_the_ridge_regression_between_states_of_the_same_text(kind: str) -> None:
    """Against states that are recorded text by text, and a regression that is solved in one line."""
    options = own("bytes") if kind == "own" else SHARED
    model = tiny_composition(
        "llama", "gpt2", [[1, 0]], connector="graft", init="aligned", plain_text=TEXTS, awake=False, **options
    )
    xs, ys = [], []
    for text in TEXTS:
        tokens = tiny_tokenizer()(text).input_ids
        writer = model.model.transcoders["augmenting"] if kind == "own" else None
        written = writer.write(tokens) if writer is not None else [(token, place) for place, token in enumerate(tokens)]
        opening = list(model.model.opening("augmenting").ids)
        states: dict[str, Tensor] = {}
        small, anchor = model.augmenting["augmenting"], model.anchor
        handles = [
            layer.register_forward_hook(
                lambda _, __, output, key=key, states=states: states.__setitem__(key, first(output))
            )
            for key, layer in (("x", small.transformer.h[1]), ("y", anchor.model.layers[0]))
        ]
        with torch.no_grad():
            small(torch.tensor([[*opening, *(token for token, _ in written)]]))
            anchor(torch.tensor([tokens]))
        for handle in handles:
            handle.remove()
        last = {owner: place + len(opening) for place, (_, owner) in enumerate(written)}
        xs.append(states["x"][0, list(last.values())])
        ys.append(states["y"][0, list(last)])
    x, y = torch.cat(xs).double(), torch.cat(ys).double()
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    n = len(x)
    expected = torch.linalg.solve(scaled.T @ scaled + 0.03 * n * torch.eye(x.shape[1]), scaled.T @ (y - y.mean(0))).T
    graft = model.model.connectors["augmenting"][0]
    assert_close(graft.map.weight, expected.float(), 1e-3)
    assert_close(graft.map.bias, y.mean(0).float(), 1e-4)
    assert torch.equal(logits_of(model, tiny_tokens(1, 6)), logits_of(model.anchor, tiny_tokens(1, 6)))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_the_same_model_is_mapped_onto_itself() -> None:
    """A graft of a layer of the same model, fully open, says nearly what the layer says itself."""
    texts = [f"{text} {other}" for text in TEXTS for other in TEXTS[:3]]
    model = calmlm.compose(
        tiny_model("llama", seed=1), tiny_model("llama", seed=1), [[1, 1]], connector="graft", init="aligned",
        opened=True, plain_text=texts, **SHARED,
    )  # fmt: skip
    ids = torch.tensor([tiny_tokenizer()(texts[5]).input_ids])
    found, alone = logits_of(model, ids), logits_of(model.anchor, ids)
    assert not torch.equal(found, alone)
    assert float((found - alone).norm() / alone.norm()) < 0.2


@pytest.mark.parametrize("projection", ["linear", "residual"])
@pytest.mark.parametrize("kind", ["cross_attention", "flamingo"])
def test_attention_starts_from_the_same_map(kind: str, projection: str) -> None:
    given = {"connector": kind, "projection": projection, "init": "aligned", "plain_text": TEXTS}
    model = tiny_composition("llama", "gpt2", [[1, 0]], awake=False, **given, **SHARED)
    connector = model.model.connectors["augmenting"][0].attention
    ids = tiny_tokens(1, 6)
    assert torch.equal(logits_of(model, ids), logits_of(model.anchor, ids))
    state = torch.randn(1, 4, len(connector.augmenting_norm.weight), generator=torch.Generator().manual_seed(0))
    _, values = connector.keys_values(state, None)
    with torch.no_grad():
        connector.gate.fill_(100.0)
        one = torch.zeros(1, 1, values.shape[-1] * values.shape[1])
        found = connector(one, *(part[:, :, :1] for part in connector.keys_values(state, None)), None)
    assert_close(found[0, 0], connector.f_proj(connector.augmenting_norm(state))[0, 0], 1e-4)


def test_layers_are_chosen_on_a_development_set() -> None:
    examples = [{"prompt": text[:20], "completion": text[20:]} for text in TEXTS]
    options = {**SHARED, "plain_text": TEXTS}
    deep = {"num_hidden_layers": 6}
    model = tiny_composition(
        "llama", "mistral", "aligned-2", anchor_options=deep, augmenting_options=deep, connector="graft",
        development=examples, awake=False, **options,
    )  # fmt: skip
    entry = model.config.augmenting["augmenting"]
    best = min((key for key in entry["tried"] if " " in key), key=lambda key: entry["tried"][key])
    assert sorted(f"{i}-{j}" for i, j in entry["connections"]) == best.split()
    assert entry["tried"][""] > 0
    assert sum(len(layer._forward_hooks) for layer in model.anchor.model.layers) == 2, "hooks of the search stayed"
    middle = tiny_composition(
        "llama", "mistral", "aligned-1", anchor_options=deep, augmenting_options=deep, awake=False, **options
    )
    assert middle.config.augmenting["augmenting"]["connections"] == [[1, 1]]


def test_what_does_not_fit_is_refused() -> None:
    llama, mistral = tiny_model("llama"), tiny_model("mistral")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"init": "aligned", **SHARED}, "pass plain_text"),
        ({"init": "aligned", "plain_text": TEXTS}, "pass tokenizer"),
        ({"init": "noise"}, "init must be 'aligned'"),
        ({"init": "aligned", "plain_text": ["the fox"], **SHARED}, "at least 64 tokens"),
        ({"init": "aligned", "plain_text": TEXTS, "connector": "legonn", **SHARED}, "init='aligned' needs connectors"),
        ({"init": "aligned", "plain_text": TEXTS, "rank": 2, **SHARED}, "init='aligned' needs connectors"),
        ({"connections": "aligned-0", "plain_text": TEXTS, **SHARED}, "for example 'aligned-2'"),
        ({"connections": "aligned-x", "plain_text": TEXTS, **SHARED}, "for example 'aligned-2'"),
        ({"connections": "aligned-99", "plain_text": TEXTS, **SHARED}, "ask for fewer"),
        ({"connector": "graft"}, "A graft must start from a map"),
        ({"init": "aligned", "plain_text": "the fox", **SHARED}, "must be a list of texts"),
        ({"init": "aligned", "plain_text": [1, 2], **SHARED}, "must be a list of texts"),
        ({"connections": "aligned-1", "plain_text": TEXTS, "development": [], **SHARED}, "nothing to predict"),
        (
            {"connector": "graft", "rotary": True, "init": "aligned"},
            "the connector 'graft', but got rotary",
        ),
        ({"opened": True}, "must belong to the connector 'cross_attention', but got opened"),
        ({"connector": "graft", "refresh": False, "init": "aligned"}, "a graft needs an augmenting model"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            calmlm.compose(llama, mistral, **options)
