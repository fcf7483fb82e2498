"""The connector against numbers worked out by hand, and a whole composition against the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from calmlm.connectors import build_connector
from calmlm.connectors.cross_attention import CrossAttention, eager_attention, rotary_angles, rotate
from calmlm.connectors.projections import ResidualProjection
from compositions import assert_close, logits_of, tiny_composition
from tiny import tiny_model, tiny_tokens

NEVER = torch.finfo(torch.float32).min


def matrix(rows: int, columns: int, entries: dict[tuple[int, int], float]) -> Tensor:
    weight = torch.zeros(rows, columns)
    for place, value in entries.items():
        weight[place] = value
    return weight


def test_two_positions_two_heads_by_hand() -> None:
    # D_A = 5, D_B = 6, N_H = 2, d = 3, T = 2, S = 4 (of which the last two are hidden from both).
    connector = CrossAttention(5, 6, 2, norm=False)
    ln2, ln3 = math.log(2), math.log(3)
    with torch.no_grad():
        # f_proj: the first augmenting state becomes (ln 2, 0, 0, 0, 0, 0), the second (0, 0, 0, 0, ln 3, 0).
        connector.f_proj.weight.copy_(matrix(6, 5, {(0, 3): ln2, (4, 1): ln3, (2, 4): 9.0}))
        # W_Q cancels the division by sqrt(d); W_K leaves the keys as they are.
        connector.q_proj.weight.copy_(math.sqrt(3) * torch.eye(6))
        connector.k_proj.weight.copy_(torch.eye(6))
        # W_V: values (3, 0, 6 | 4, 8, 0) and (0, 3, 6 | 8, 0, 4).
        first, second = [3.0, 0.0, 6.0, 4.0, 8.0, 0.0], [0.0, 3.0, 6.0, 8.0, 0.0, 4.0]
        values = {(i, 0): v / ln2 for i, v in enumerate(first)} | {(i, 4): v / ln3 for i, v in enumerate(second)}
        connector.v_proj.weight.copy_(matrix(6, 6, values))
        # W_O: output i is input i + 1, the last one is input 0.
        connector.o_proj.weight.copy_(matrix(6, 6, {(i, (i + 1) % 6): 1.0 for i in range(6)}))
    augmenting = torch.tensor([[[0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [5, 5, 5, 5, 5.0]]])
    anchor = torch.tensor([[[2, 0, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1.0]]])
    mask = torch.tensor([[0, NEVER, NEVER, NEVER], [0, 0, NEVER, NEVER]])[None, None]
    found = connector(anchor, *connector.keys_values(augmenting, None), mask)
    # Position 0 sees the first state alone: values (3, 0, 6, 4, 8, 0), shifted (0, 6, 4, 8, 0, 3), plus H_B.
    # Position 1, head 1: scores ln 2 and 0, weights 2/3 and 1/3, so (2, 1, 6).
    #             head 2: scores 0 and ln 3, weights 1/4 and 3/4, so (7, 2, 3).
    #             Concatenated (2, 1, 6, 7, 2, 3), shifted (1, 6, 7, 2, 3, 2), plus H_B.
    torch.testing.assert_close(found, torch.tensor([[[2, 6, 5, 8, 1, 3], [2, 7, 7, 2, 4, 3.0]]]), atol=1e-5, rtol=0)


def awake_connector(**options: object) -> CrossAttention:
    torch.manual_seed(5)
    connector = CrossAttention(11, 12, 3, **options)  # type: ignore[arg-type]
    for name, parameter in connector.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.4)
    return connector


def paper(connector: CrossAttention, anchor: Tensor, augmenting: Tensor, visible: Tensor) -> Tensor:
    """Section 3.1 of the paper, one position and one head at a time; ``visible`` is (B, T, S) bool."""
    result = anchor.clone()
    width = connector.head_dim
    for b, t in [(b, t) for b in range(anchor.shape[0]) for t in range(anchor.shape[1])]:
        query = connector.q_proj.weight @ anchor[b, t]
        heads = []
        for k in range(connector.num_heads):
            part = slice(k * width, (k + 1) * width)
            scores, values = [], []
            for s in visible[b, t].nonzero()[:, 0].tolist():
                projected = connector.f_proj.weight @ augmenting[b, s]
                scores.append((connector.k_proj.weight @ projected)[part] @ query[part] / width**0.5)
                values.append((connector.v_proj.weight @ projected)[part])
            weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            heads.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        result[b, t] += connector.o_proj.weight @ torch.cat(heads)
    return result


@torch.no_grad()
def test_one_connector_is_the_papers_equation() -> None:
    # B = 2, T = 5, S = 7, D_A = 11, D_B = 12, N_H = 3, d = 4.
    connector = awake_connector(norm=False)
    anchor, augmenting = torch.randn(2, 5, 12), torch.randn(2, 7, 11)
    visible = torch.rand(2, 5, 7) < 0.6
    visible[:, :, 0] = True
    mask = torch.zeros(2, 1, 5, 7).masked_fill(~visible[:, None], NEVER)
    found = connector(anchor, *connector.keys_values(augmenting, None), mask)
    assert_close(found, paper(connector, anchor, augmenting, visible), 1e-5)


@torch.no_grad()
def test_norms_see_directions_only() -> None:
    connector = awake_connector(norm=True)
    anchor, augmenting = torch.randn(2, 5, 12), torch.randn(2, 7, 11)
    added = connector(anchor, *connector.keys_values(augmenting, None), None) - anchor
    scaled = connector(30 * anchor, *connector.keys_values(7 * augmenting, None), None) - 30 * anchor
    assert_close(scaled, added, 1e-4)
    plain = awake_connector(norm=False)
    plain.load_state_dict(connector.state_dict(), strict=False)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    # The residual goes around the norm: only what the queries read is normalised.
    at = normed(anchor, connector.anchor_norm.weight)
    expected = plain(at, *plain.keys_values(normed(augmenting, connector.augmenting_norm.weight), None), None) - at
    assert_close(added, expected, 1e-5)


@torch.no_grad()
def test_the_gate_scales_by_its_tanh() -> None:
    gated, plain = awake_connector(gate=True), awake_connector(gate=False)
    plain.load_state_dict({name: t for name, t in gated.state_dict().items() if name != "gate"})
    anchor, augmenting = torch.randn(2, 5, 12), torch.randn(2, 7, 11)
    added = plain(anchor, *plain.keys_values(augmenting, None), None) - anchor
    for value in (0.0, 0.5, -2.0):
        gated.gate.fill_(value)
        found = gated(anchor, *gated.keys_values(augmenting, None), None)
        assert_close(found, anchor + math.tanh(value) * added, 1e-5)


@torch.no_grad()
def test_a_null_key_takes_its_share_of_the_weight_and_gives_nothing() -> None:
    connector, plain = awake_connector(null_key=True), awake_connector()
    plain.load_state_dict({name: t for name, t in connector.state_dict().items() if name != "null_key"})
    anchor, augmenting = torch.randn(2, 5, 12), torch.randn(2, 7, 11)
    keys, values = connector.keys_values(augmenting, None)
    query = connector.q_proj(connector.anchor_norm(anchor)).view(2, 5, 3, 4).transpose(1, 2)
    seen = (query @ keys.transpose(-1, -2) / 2).exp().sum(-1)
    null = (query @ connector.null_key[None, :, :, None] / 2).exp()[..., 0]
    read = torch.softmax(query @ keys.transpose(-1, -2) / 2, -1) @ values * (seen / (seen + null))[..., None]
    expected = anchor + connector.o_proj(read.transpose(1, 2).flatten(2))
    assert_close(connector(anchor, keys, values, None), expected, 1e-5)
    # The same with a mask of either kind that hides nothing.
    seen_all = torch.zeros(2, 1, 5, 7)
    assert_close(connector(anchor, keys, values, seen_all), expected, 1e-5)
    assert_close(connector(anchor, keys, values, seen_all == 0, attention=boolean_attention), expected, 1e-5)
    # Where nothing else is visible, the null key leaves the anchor alone, with either kind of mask.
    for mask in (torch.full((2, 1, 5, 7), NEVER), torch.zeros(2, 1, 5, 7, dtype=torch.bool)):
        attention = eager_attention if mask.dtype != torch.bool else boolean_attention
        assert torch.equal(connector(anchor, keys, values, mask, attention=attention), anchor)


def boolean_attention(module: object, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: object):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2), None


@torch.no_grad()
def test_rotary_scores_depend_on_distances_only() -> None:
    connector = awake_connector(rotary=True)
    anchor, augmenting = torch.randn(1, 7, 12), torch.randn(1, 7, 11)

    def run(query_start: int, key_start: int) -> Tensor:
        rotations = [rotary_angles(torch.arange(7)[None] + start, 4) for start in (query_start, key_start)]
        return connector(anchor, *connector.keys_values(augmenting, rotations[1]), None, rotations[0])

    assert_close(run(23, 23), run(0, 0), 1e-4)
    assert_close(run(23, 20), run(3, 0), 1e-4)
    assert (run(3, 0) - run(0, 0)).abs().max() > 0.01


def test_a_rotation_by_hand() -> None:
    # d = 4: the pairs are (x0, x2), turned by the position, and (x1, x3), turned by a hundredth of it.
    found = rotate(torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4), rotary_angles(torch.tensor([[2]]), 4)).flatten()
    c, s, c2, s2 = math.cos(2), math.sin(2), math.cos(0.02), math.sin(0.02)
    torch.testing.assert_close(found, torch.tensor([c - 3 * s, 2 * c2 - 4 * s2, 3 * c + s, 4 * c2 + 2 * s2]))


def test_the_query_key_bias_starts_where_it_was_set_and_learns() -> None:
    connector = CrossAttention(5, 6, 2, query_key_bias=1.25)
    for linear in (connector.q_proj, connector.k_proj):
        assert linear.bias.tolist() == [1.25] * 6
        assert linear.bias.requires_grad
    assert connector.v_proj.bias is None
    assert connector.o_proj.bias is None


@pytest.mark.parametrize("options", [{}, {"gate": True}, {"rotary": True, "null_key": True, "query_key_bias": 1.0}])
def test_a_fresh_connector_is_the_identity_and_can_learn(options: dict) -> None:
    connector = CrossAttention(11, 12, 3, **options)
    anchor, augmenting = torch.randn(2, 5, 12), torch.randn(2, 7, 11)
    rotation = rotary_angles(torch.arange(7)[None], 4) if options.get("rotary") else None
    query_rotation = rotary_angles(torch.arange(5)[None], 4) if options.get("rotary") else None
    found = connector(anchor, *connector.keys_values(augmenting, rotation), None, query_rotation)
    assert torch.equal(found, anchor)
    found.square().sum().backward()
    first = connector.gate if connector.gate is not None else connector.o_proj.weight
    assert first.grad.abs().max() > 0, "a start from which no gradient leads away"


def test_the_size_is_the_papers() -> None:
    # n (D_A D_B + 4 D_B^2), W_O counted: 3 (35 * 48 + 4 * 48^2).
    model = tiny_composition("llama", "gpt2", connections=3, norm=False)
    assert model.get_nb_trainable_parameters()[0] == 3 * (35 * 48 + 4 * 48 * 48)
    assert sum(t.numel() for t in model.composition_tensors().values()) == 3 * (35 * 48 + 4 * 48 * 48)


# A residual projection


def test_a_residual_projection_by_hand() -> None:
    found = ResidualProjection(2, 3, None)
    with torch.no_grad():
        found.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        found.gate.weight.copy_(torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [0.0, math.log(3)]]))
        found.up.weight.copy_(torch.tensor([[0.0, 2.0], [7.0, 7.0], [1.0, 0.0]]))
        found.out.weight.copy_(torch.tensor([[4.0, 9.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 8.0]]))
        # x = (1, 1): silu(ln 3) = 3/4 ln 3, so the layer is 3/4 ln 3 (2, 0, 1), and W_out makes (8, 0, 8) of (2, 0, 1).
        ours = found(torch.ones(1, 2))[0]
    assert_close(ours, torch.tensor([1.0, 1.0, 2.0]) + 0.75 * math.log(3) * torch.tensor([8.0, 0.0, 8.0]), 1e-5)


@pytest.mark.parametrize("kind", ["cross_attention", "flamingo", "legonn"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_residual_projection_starts_as_the_linear_one(kind: str, rank: int | None) -> None:
    torch.manual_seed(0)
    linear = build_connector(kind, 11, 12, {"num_heads": 3, "rank": rank})
    residual = build_connector(kind, 11, 12, {"num_heads": 3, "rank": rank, "projection": "residual"})
    state = linear.state_dict()
    named = {key.replace("f_proj.", "f_proj.linear."): tensor for key, tensor in state.items()}
    left = residual.load_state_dict(named, strict=False)
    assert [key.split(".")[-2] for key in left.missing_keys] == ["gate", "up", "out"] and not left.unexpected_keys
    augmenting = torch.randn(2, 7, 11).softmax(-1)
    for ours, theirs in zip(residual.keys_values(augmenting, None), linear.keys_values(augmenting, None), strict=True):
        assert torch.equal(ours, theirs)
    torch.stack(residual.keys_values(augmenting, None)).square().sum().backward()
    assert residual.attention.f_proj.out.weight.grad.abs().max() > 0
    with torch.no_grad():
        residual.attention.f_proj.out.weight.fill_(0.5)
    assert not torch.allclose(residual.keys_values(augmenting, None)[1], linear.keys_values(augmenting, None)[1])


# A whole composition


def cross(connector: CrossAttention, anchor: Tensor, augmenting: Tensor) -> Tensor:
    """The paper's equation in a few lines, all positions at once: a position sees its own token and those before."""
    length, heads = anchor.shape[1], connector.num_heads
    projected = augmenting @ connector.f_proj.weight.T

    def split(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight.T).view(*x.shape[:2], heads, -1)

    q, k = split(anchor, connector.q_proj.weight), split(projected, connector.k_proj.weight)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    read = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), split(projected, connector.v_proj.weight))
    return anchor + read.flatten(2) @ connector.o_proj.weight.T


def causal(length: int) -> Tensor:
    return torch.full((length, length), NEVER).triu(1)[None, None]


def llama_layers(model, ids: Tensor):
    hidden = model.model.embed_tokens(ids)
    angles = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for layer in model.model.layers:
        hidden = yield layer(hidden, attention_mask=causal(ids.shape[1]), position_embeddings=angles)
    yield model.lm_head(model.model.norm(hidden))


def gpt2_layers(model, ids: Tensor):
    hidden = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
    for layer in model.transformer.h:
        output = layer(hidden, attention_mask=causal(ids.shape[1]))
        hidden = yield output[0] if isinstance(output, tuple) else output
    yield model.lm_head(model.transformer.ln_f(hidden))


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("anchor", ["llama", "gpt2"])
@pytest.mark.parametrize("pairs", [[(1, 0), (3, 1)], [(0, 1), (0, 4), (2, 4), (3, 2)], "every-4", 3], ids=str)
def test_a_whole_composition_is_the_papers_equations(anchor: str, pairs, attn_implementation: str) -> None:
    # An anchor of two layers for the first case; deeper ones, with two connections into one layer, for the others.
    depth = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[anchor]
    options = {depth: 2} if pairs == [(1, 0), (3, 1)] else {}
    model = tiny_composition(
        anchor, "qwen2", pairs, norm=False, anchor_options=options, attn_implementation=attn_implementation
    )
    ids = tiny_tokens(2, 9)

    # Models of their own, which nothing of the library has touched.
    m_b, m_a = tiny_model(anchor, seed=1, **options), tiny_model("qwen2", seed=2)
    states: list[Tensor] = []
    for layer in m_a.model.layers:
        layer.register_forward_hook(lambda _m, _a, output: states.append(output))
    m_a(ids)
    run = {"llama": llama_layers, "gpt2": gpt2_layers}[anchor](m_b, ids)
    entry = model.config.augmenting["augmenting"]
    connectors = model.model.connectors["augmenting"]
    hidden = next(run)
    layers = m_b.config.num_hidden_layers
    for j in range(layers):
        added = torch.zeros_like(hidden)
        for (i, at), connector in zip(entry["connections"], connectors, strict=True):
            if at == j:
                # Connections into one layer follow one another, each on the result of the one before.
                added = cross(connector, hidden + added, states[i]) - hidden
        hidden = run.send(hidden + added)
    assert_close(logits_of(model, ids), hidden, 1e-5)
    # And the composition is no small part of it.
    assert (logits_of(model, ids) - logits_of(model.anchor, ids)).abs().max() > 0.1


@torch.no_grad()
def test_hidden_states_are_those_of_the_composition() -> None:
    # The state after layer j is what layer j + 1 reads: with the cross-attention in it.
    model, ids = tiny_composition("llama", "gpt2", [(2, 1)], norm=False), tiny_tokens(2, 6)
    found = model(ids, output_hidden_states=True).hidden_states
    alone = tiny_model("llama", seed=1)(ids, output_hidden_states=True).hidden_states
    below = tiny_model("gpt2", seed=2)(ids, output_hidden_states=True).hidden_states
    assert torch.equal(found[1], alone[1])
    assert_close(found[2], cross(model.model.connectors["augmenting"][0], alone[2], below[3]), 1e-5)
    assert torch.equal(model.model(ids).last_hidden_state, found[-1])
