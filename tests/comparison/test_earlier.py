"""A report that keeps what an earlier one had more cells of, and cells that are not taken for those of other models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calmlm.comparison.cells import Cell
from calmlm.comparison.earlier import keep_fuller, read_report
from calmlm.comparison.own_checks import _models_of
from calmlm.comparison.page import markdown
from calmlm.comparison.selection import CompareConfig, Part
from calmlm.comparison.summary import summarise
from calmlm.comparison.workers import run
from calmlm.errors import CalmError
from comparisons import cell, comparison

KEYS, CODE = "kv_arithmetic", "code"


def code_cell(method: str, seed: int, right: float) -> dict[str, Any]:
    scores = {"completion": right, "text_to_code": right, "code_to_text": right, "naming": 1.0, "arithmetic": 1.0}
    return cell(method, seed, right) | {"scores": {task: [share] * 10 for task, share in scores.items()}}


def report(keys: int, code: int, right: float, commit: str, preset: str = "tiny") -> dict[str, Any]:
    """A report on so many seeds of two methods, on two experiments."""
    found = [
        (Cell(KEYS, method, None, seed), cell(method, seed, right))
        for method in ("m_B", "composed")
        for seed in range(keys)
    ]
    found += [
        (Cell(CODE, method, None, seed), code_cell(method, seed, right))
        for method in ("m_B", "composed")
        for seed in range(code)
    ]
    parts = {KEYS: Part([0, 1, 2]), CODE: Part([0, 1])}
    result = summarise(CompareConfig(domains={}, preset=preset, parts=parts), found, 20, "the command")
    return result | {"commit": commit, "commits": [commit]}


def means(result: dict[str, Any], name: str) -> set[float]:
    return {r["mean"] for r in result["rows"] if r["task"].startswith(f"{name}/") and r["skill"] == "combined"}


def test_the_fuller_of_two_experiments_is_kept_whole() -> None:
    before, now = report(3, 1, 0.5, "before"), report(1, 2, 1.0, "now")
    both = keep_fuller(now, before)
    assert means(both, KEYS) == {50.0} and means(both, CODE) == {100.0}
    assert {row["seeds"] for row in both["rows"] if row["task"].startswith(KEYS)} == {3}
    assert both["answers"] == {KEYS: before["answers"][KEYS], CODE: now["answers"][CODE]}
    assert both["cells"] == {"planned": 20, "finished": 10, "by_experiment": {KEYS: 6, CODE: 4}}
    assert both["kept"] == {KEYS: {"cells": 6, "commit": "before", "stored": 2}}
    assert both["commits"] == ["before", "now"] and both["commit"] == "now"
    page = markdown(both)
    assert (
        page.count(
            "Kept from the report of commit before, which had 6 cells; of those that are stored now, 2 belong here."
        )
        == 1
    )
    assert page.index("## Key-value") < page.index("Kept from") < page.index("## Code")
    json.dumps(both)


@pytest.mark.slow
def test_equal_counts_other_settings_and_unknown_experiments_keep_nothing() -> None:
    now = report(1, 1, 1.0, "now")
    assert keep_fuller(now, report(1, 1, 0.5, "before")) == now
    assert keep_fuller(now, report(3, 2, 0.5, "before", "small")) == now
    before = report(3, 2, 0.5, "before")
    assert keep_fuller(now, {key: value for key, value in before.items() if key != "settings"}) == now
    assert "kept" not in now


@pytest.mark.slow
def test_what_is_kept_twice_names_the_first_report() -> None:
    second = keep_fuller(report(1, 1, 1.0, "second"), report(3, 1, 0.5, "first"))
    third = keep_fuller(report(2, 2, 0.8, "third"), second)
    assert third["kept"] == {KEYS: {"cells": 6, "commit": "first", "stored": 4}}
    assert means(third, KEYS) == {50.0} and means(third, CODE) == {80.0}
    # Once as many are stored, nothing is kept any more.
    assert "kept" not in keep_fuller(report(3, 2, 0.7, "fourth"), third)


def test_only_a_report_is_kept(tmp_path: Path) -> None:
    assert read_report(tmp_path / "tiny.json") is None
    config = comparison(tmp_path, code=Part([0], ["m_B"]))
    (tmp_path / "out").mkdir()
    for text in ("", "[]", '{"rows": []}'):
        (tmp_path / "out" / "tiny.json").write_text(text, encoding="utf-8")
        with pytest.raises(CalmError, match="Expected the report of a comparison in .*tiny.json"):
            run(config, keep=True, report=lambda line: None)
        assert (tmp_path / "out" / "tiny.json").read_text(encoding="utf-8") == text


def test_a_model_of_the_hub_is_told_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of an earlier state of the repository are not taken for those of this one."""
    ref = tmp_path / "models--someone--model" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    own: Any = SimpleNamespace(configs={"someone/model": None})
    for commit in ("1" * 40, "2" * 40):
        ref.write_text(commit)
        (ref.parents[1] / "snapshots" / commit).mkdir(parents=True)
        assert dict(_models_of(own)) == {"someone/model": commit}
