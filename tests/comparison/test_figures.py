"""Means, intervals and differences, against figures by hand."""

from __future__ import annotations

import pytest

from calmlm.comparison.figures import by_method, columns_of, difference, interval, kept, share
from calmlm.comparison.methods import METHODS
from calmlm.comparison.plots import _STYLES


def test_an_interval_without_variation_is_a_point() -> None:
    assert interval({0: [0.5] * 10, 1: [0.5] * 10}) == (0.5, 0.5, 0.5)


def test_an_interval_holds_the_mean_and_grows_with_the_spread_between_seeds() -> None:
    near = interval({0: [0.0, 1.0] * 50, 1: [0.0, 1.0] * 50})
    apart = interval({0: [0.0] * 100, 1: [1.0] * 100})
    assert near[0] == apart[0] == 0.5
    assert near[1] < 0.5 < near[2]
    assert apart[2] - apart[1] == 1.0 > near[2] - near[1]
    # The standard error of a share of one half over 200 items is 0.035, twice that on either side.
    assert 0.1 < near[2] - near[1] < 0.25


def test_a_share_of_all_or_nothing_is_not_certain() -> None:
    assert share({0: [1.0] * 50, 1: [1.0] * 50}) == pytest.approx((1.0, 0.9638, 1.0), abs=1e-4)  # Clopper-Pearson
    assert share({0: [0.0] * 100}) == pytest.approx((0.0, 0.0, 1 - 0.9638), abs=1e-4)
    some = {0: [0.0, 1.0] * 20}
    assert share(some) == interval(some)


def test_a_difference_is_taken_item_by_item() -> None:
    """Items that are hard for both say nothing about which is better."""
    first = {0: [1.0, 0.0] * 50, 1: [1.0, 0.0] * 50}
    second = {1: [0.9, -0.1] * 50, 2: [0.0] * 100}
    mean, low, high = difference([first], [second])
    assert abs(mean - 0.1) < 1e-9 and abs(low - 0.1) < 1e-9 and abs(high - 0.1) < 1e-9


def test_each_column_counts_as_much_as_the_others() -> None:
    """However many items it has: the mean over columns, not over their items."""
    short, long = {0: [1.0] * 10}, {0: [0.0, 0.5] * 95}
    assert interval(short, long)[0] == share(short, long)[0] == (1.0 + 0.25) / 2
    mean, low, high = difference([short, long], [{0: [0.0] * 10}, {0: [0.5] * 190}])
    assert mean == (1.0 - 0.25) / 2
    # The standard error of the second is 0.25 / sqrt(190) = 0.018, half of it that of the mean; the first has none.
    assert high - low == pytest.approx(4 * 0.018 / 2, rel=0.2)


def test_a_difference_between_equal_items_is_not_certain() -> None:
    right, wrong = {0: [1.0] * 60, 1: [1.0] * 40}, {0: [0.0] * 60, 1: [0.0] * 40}
    limit = 0.025 ** (1 / 100)
    assert difference([right], [right]) == pytest.approx((0.0, limit - 1.0, 1.0 - limit))
    assert difference([right], [wrong]) == pytest.approx((1.0, 2 * limit - 1.0, 1.0))
    assert difference([wrong], [right]) == pytest.approx((-1.0, -1.0, 1.0 - 2 * limit))


def test_what_is_kept_is_after_minus_before() -> None:
    after = {"one": {0: [1.0, 0.0]}, "two": {0: [0.0, 0.0]}, "other": {0: [1.0, 1.0]}}
    before = {"one": {0: [1.0, 1.0]}, "two": {0: [1.0, 0.0]}, "other": {0: [0.0, 0.0]}}
    assert kept(after, before, ["one", "two"])[0] == -0.5


def test_cells_are_sorted_by_method_task_and_seed() -> None:
    cells = [
        {"method": "a", "seed": 1, "scores": {"t": [1.0], "u": [0.0]}},
        {"method": "a", "seed": 0, "scores": {"t": [0.5], "u": [0.25]}},
    ]
    found = by_method(cells)
    assert found == {"a": {"t": {1: [1.0], 0: [0.5]}, "u": {1: [0.0], 0: [0.25]}}}
    assert columns_of(found["a"], ["t", "u"]) == [{0: [0.5], 1: [1.0]}, {0: [0.25], 1: [0.0]}]


def test_items_that_all_seeds_share_are_drawn_together() -> None:
    one = [0.0, 1.0] * 50
    alone, three = interval({0: one}), interval(dict.fromkeys(range(3), one), same_items=True)
    assert three == pytest.approx(alone, abs=0.015)
    apart = interval(dict.fromkeys(range(3), one))
    assert three[2] - three[1] > 1.5 * (apart[2] - apart[1])
    right = {seed: [1.0] * 100 for seed in range(3)}
    assert share(right, same_items=True)[1] == pytest.approx(0.025 ** (1 / 100))
    assert share(right)[1] == pytest.approx(0.025 ** (1 / 300))


def test_every_method_has_a_point_of_its_own() -> None:
    assert set(_STYLES) == set(METHODS)
    assert len(set(_STYLES.values())) == len(METHODS)
