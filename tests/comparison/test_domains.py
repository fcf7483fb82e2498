"""What the experiments give the compared systems: choosing looks at nothing that was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from calmlm.comparison.domains import DOMAINS
from calmlm.errors import ConfigError


@pytest.mark.parametrize("name", ["kv_arithmetic", "languages", "code"])
def test_validation_rows_are_not_in_the_composition_data(name: str, tmp_path: Path) -> None:
    kind, presets = DOMAINS[name]
    data = kind(presets["tiny"], 0, tmp_path, print).data  # type: ignore[attr-defined]
    trained = {tuple(row["input_ids"]) for row in data.composition}
    assert len(data.validation) > 50
    assert not any(tuple(row["input_ids"]) in trained for row in data.validation)


def test_a_size_of_the_composition_data_that_holds_keys_of_the_evaluation_is_refused(tmp_path: Path) -> None:
    kind, presets = DOMAINS["kv_arithmetic"]
    domain = kind(presets["tiny"], 0, tmp_path, print)
    assert domain.composition(4, "composition", share=0.1)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"at most 0\.2.*0\.4"):
        domain.composition(4, "composition", share=0.4)  # type: ignore[attr-defined]
