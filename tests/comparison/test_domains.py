"""What the experiments give the compared systems: choosing looks at nothing that was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calmlm.comparison.contract import TextDomain
from calmlm.comparison.domains import DOMAINS
from calmlm.errors import ConfigError
from calmlm.experiments.fitting import IGNORED
from calmlm.experiments.visual_arithmetic.joined import composition_examples


@pytest.mark.parametrize("name", [name for name, (kind, _) in DOMAINS.items() if issubclass(kind, TextDomain)])
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


@pytest.mark.parametrize("name", DOMAINS)
def test_nothing_that_is_to_be_kept_is_asked_as_the_composition_data_shows_it(name: str, tmp_path: Path) -> None:
    kind, presets = DOMAINS[name]
    domain: Any = kind(presets["tiny"], 0, tmp_path, print)
    if name == "visual":
        shown = {example.prompt for example in composition_examples(domain.world)}
    else:
        tokenizer, data = domain.tokenizer, domain.data.composition
        read = [
            [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED] for row in data
        ]
        shown = set(tokenizer.batch_decode(read, skip_special_tokens=True))
    for task, about in kind.tasks_of(presets["tiny"]).items():
        if about.skill == "retained":
            items = domain.items[task]
            prompts = [(item[0] if isinstance(item, tuple) else item).prompt for item in items]
            assert prompts, task
            assert not shown.intersection(tokenizer_text(domain.tokenizer, prompts)), task


def tokenizer_text(tokenizer: Any, texts: list[str]) -> set[str]:
    """Texts as a tokenizer gives them back."""
    return set(tokenizer.batch_decode(tokenizer(texts).input_ids, skip_special_tokens=True))
