"""Connections and options as data."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calmlm import ConfigError
from calmlm.config import ConnectorConfig, resolve_connections
from compositions import assert_helpful

DEPTHS = st.integers(1, 96)


@pytest.mark.parametrize(
    ("connections", "augmenting_layers", "anchor_layers", "expected"),
    [
        # The paper: N_A / n = 4, the gap in the anchor is N_B / n.
        ("every-4", 8, 16, ((3, 7), (7, 15))),
        ("every-4", 16, 32, ((3, 7), (7, 15), (11, 23), (15, 31))),
        ("every-4", 12, 12, ((3, 3), (7, 7), (11, 11))),
        ("every-4", 10, 7, ((3, 2), (7, 6))),
        ("every-4", 3, 7, ((2, 6),)),
        ("every-4", 16, 2, ((3, 0), (7, 1))),
        ("top", 8, 16, ((6, 14), (7, 15))),
        ("top", 3, 7, ((2, 6),)),
        (3, 6, 9, ((1, 2), (3, 5), (5, 8))),
        (1, 6, 9, ((5, 8),)),
        ([[5, 8], (0, 3), [4, 3]], 6, 9, ((0, 3), (4, 3), (5, 8))),
    ],
)
def test_examples(connections: Any, augmenting_layers: int, anchor_layers: int, expected: Any) -> None:
    assert resolve_connections(connections, augmenting_layers, anchor_layers) == expected


@given(st.one_of(st.just("every-4"), st.just("top"), st.integers(1, 96)), DEPTHS, DEPTHS)
def test_named_forms_are_valid_explicit_pairs(connections: Any, augmenting_layers: int, anchor_layers: int) -> None:
    fewest = min(augmenting_layers, anchor_layers)
    if isinstance(connections, int) and connections > fewest:
        with pytest.raises(ConfigError) as error:
            resolve_connections(connections, augmenting_layers, anchor_layers)
        assert_helpful(error.value, str(connections), str(fewest))
        return
    pairs = resolve_connections(connections, augmenting_layers, anchor_layers)
    assert pairs
    # What they stand for can be written out: explicit pairs mean themselves.
    assert resolve_connections(pairs, augmenting_layers, anchor_layers) == pairs
    # Each layer is used once, in the order of both models, and the anchor's last layer is among them.
    for column, depth in ((0, augmenting_layers), (1, anchor_layers)):
        layers = [pair[column] for pair in pairs]
        assert layers == sorted(set(layers))
        assert layers[0] >= 0
        assert layers[-1] < depth
    assert pairs[-1][1] == anchor_layers - 1
    if isinstance(connections, int):
        assert len(pairs) == connections
        assert pairs[-1][0] == augmenting_layers - 1
    if connections == "every-4" and augmenting_layers >= 4:
        assert [i for i, _ in pairs] == list(range(3, 4 * len(pairs), 4))
        assert len(pairs) == min(augmenting_layers // 4, anchor_layers)
    # Spread evenly: gaps in the anchor differ by one layer at most.
    if connections != "top":
        gaps = [b - a for (_, a), (_, b) in zip(((0, -1), *pairs), pairs, strict=False)]
        assert max(gaps) - min(gaps) <= 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, unique=True))
def test_explicit_pairs_keep_themselves_in_the_order_of_the_anchor(pairs: list[tuple[int, int]]) -> None:
    found = resolve_connections(pairs, 10, 13)
    assert sorted(found) == sorted(pairs)
    assert [j for _, j in found] == sorted(j for _, j in pairs)


@given(
    st.lists(st.tuples(st.integers(-3, 12), st.integers(-3, 15)), min_size=1).filter(
        lambda pairs: len(set(pairs)) < len(pairs) or any(not (0 <= i < 10 and 0 <= j < 13) for i, j in pairs)
    )
)
def test_pairs_out_of_range_or_given_twice_are_refused(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_connections(pairs, 10, 13)
    assert_helpful(error.value)


@pytest.mark.parametrize(
    ("connections", "mention"),
    [
        ("every-5", "'every-5'"),
        ("", "''"),
        (0, "got 0"),
        (-1, "got -1"),
        (7, "between 1 and 6"),
        (True, "True"),
        (2.0, "2.0"),
        (None, "None"),
        ([], "none"),
        ([3, 7], "[3, 7]"),
        ([[3]], "(3,)"),
        ([[3, 4, 5]], "(3, 4, 5)"),
        ([[1.0, 2]], "(1.0, 2)"),
        ([["1", "2"]], "('1', '2')"),
        ([[6, 0]], "got 6"),
        ([[0, 9]], "got 9"),
        ([[-1, 0]], "got -1"),
        ([[1, 2], (1, 2)], "(1, 2)"),
        (["34"], "'3'"),
    ],
    ids=str,
)
def test_what_is_refused_and_how(connections: Any, mention: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_connections(connections, 6, 9)
    assert_helpful(error.value, mention)


def test_the_number_of_heads_is_the_anchors_where_it_divides() -> None:
    assert ConnectorConfig.build({}, 48, 6).num_heads == 6
    assert ConnectorConfig.build({"num_heads": None}, 48, 5).num_heads == 4
    assert ConnectorConfig.build({"num_heads": 12}, 48, 6).num_heads == 12


def test_the_anchors_ingestor_takes_sixteen_tokens_unless_told() -> None:
    assert ConnectorConfig.build({"kind": "legonn", "ingestor": "anchor"}, 48, 6).top_k == 16
    assert ConnectorConfig.build({"kind": "legonn", "ingestor": "anchor", "top_k": 3}, 48, 6).top_k == 3
    assert ConnectorConfig.build({"kind": "legonn"}, 48, 6).top_k is None


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 7},
        {"num_heads": 0},
        {"num_heads": 2.0},
        {"num_heads": True},
        {"heads": 3},
        {"rotary": True},
        {"projection": "bent"},
        {"kind": "legonn", "ingestor": "mine"},
        {"kind": "flamingo", "ingestor": "anchor"},
        {"kind": "legonn", "top_k": 3},
        {"kind": "legonn", "ingestor": "anchor", "top_k": 0},
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        ConnectorConfig.build(options, 45, 5)
    assert_helpful(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": "a"},
        {"rank": 1.5},
        {"query_key_bias": "x"},
        {"norm": 3},
        {"gate": "on"},
        {"rank": True},
        {"projection": 1},
        {"ingestor": True},
        {"top_k": 2.0},
    ],
    ids=str,
)
def test_options_of_another_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        ConnectorConfig.build(options, 48, 4)
    assert_helpful(error.value, next(iter(options)))
