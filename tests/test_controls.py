"""Another item's prompt for each item, side by side with its own; and the gain with its interval."""

from __future__ import annotations

import pytest
import torch

import calmlm
from calmlm.controls import beside, listening, paired, partners
from compositions import assert_helpful, tiny_composition


def test_each_prompt_has_another_one_of_its_length() -> None:
    lengths = {f"{size}-{index}": size for size in (3, 5, 8) for index in range(7)}
    pairs = partners(lengths)
    assert list(pairs) == list(lengths) and set(pairs.values()) == set(lengths)
    assert all(one != other and lengths[one] == lengths[other] for one, other in pairs.items())
    assert partners(lengths) == pairs != partners(lengths, seed=1)


@pytest.mark.parametrize("sizes", [[1, 2], [1, 2, 3], [1, 1, 2], [1, 2, 2], [1, 2, 2, 3, 4, 4, 9], [7] * 5 + [9]])
def test_a_length_that_comes_once_goes_to_the_nearest(sizes: list[int]) -> None:
    lengths = dict(enumerate(sizes))
    pairs = partners(lengths)
    assert sorted(pairs.values()) == list(lengths) and all(one != other for one, other in pairs.items())
    twice = [size for size in set(sizes) if sizes.count(size) > 1]
    for size in twice:  # at most one prompt of such a length has one of another
        apart = [one for one, other in pairs.items() if sizes[one] == size != sizes[other]]
        assert len(apart) <= 1


def test_one_prompt_has_no_partner() -> None:
    with pytest.raises(calmlm.DataError) as caught:
        partners({"alone": 3})
    assert_helpful(caught.value, "two different prompts")


def test_rows_stand_side_by_side() -> None:
    made = beside(["ear"], [[1, 2, 3], [4]], [[5], [6, 7, 8, 9]], 0)
    assert made["input_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert made["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    ear = made["augmenting_inputs"]["ear"]
    assert ear["input_ids"].tolist() == [[0, 0, 0, 5], [6, 7, 8, 9]]
    assert ear["attention_mask"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert ear["input_ids"].dtype == torch.int64


def test_who_listens() -> None:
    model = tiny_composition()
    assert listening(model) == ["augmenting"]
    with model.disable_composition():
        assert listening(model) == []
    model.disable_augmenting("augmenting")
    assert listening(model) == []
    assert listening(tiny_composition(refresh=False)) == []
    assert listening(model.anchor) == []


def test_a_paired_interval() -> None:
    mean, low, high = paired([0.0, 1.0] * 50)
    assert mean == 0.5 and low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
    assert paired([2.0, 6.0], [1.0, 3.0]) == (2.0, 2.0, 2.0)  # 2 each
