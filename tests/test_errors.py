"""What calmlm says of faults, and where."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

import calmlm
from pairs import tiny_pair


def test_a_warning_stands_at_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep in calmlm it arises."""
    pair = tiny_pair()
    nowhere = copy.deepcopy(pair.anchor)
    nowhere.name_or_path = "nobody/nothing"
    tokenizers = {"tokenizer": pair.tokenizer, "augmenting_tokenizer": pair.augmenting_tokenizer}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        calmlm.compose(nowhere, pair.augmenting, **tokenizers)
    found: list[Any] = [warning for warning in seen if "is called 'nobody/nothing'" in str(warning.message)]
    assert [warning.filename for warning in found] == [__file__]
