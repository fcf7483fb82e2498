"""Hours of training are not lost to the form of a figure, to a plot, or to a folder that has gone."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calmlm.comparison import cells as cells_module
from calmlm.comparison import plots
from calmlm.comparison.contract import Domain
from calmlm.comparison.domains import kind_of
from calmlm.comparison.earlier import keep_fuller
from calmlm.comparison.page import markdown
from calmlm.comparison.selection import CompareConfig, Part
from calmlm.comparison.workers import run
from calmlm.errors import CalmError
from comparisons import comparison


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Base models that all tests share."""
    return str(tmp_path_factory.mktemp("bases"))


def code(folder: Path, bases: str, *methods: str) -> CompareConfig:
    return dataclasses.replace(comparison(folder, code=Part([0], list(methods))), bases=bases)


def scored(monkeypatch: pytest.MonkeyPatch, *values: Any) -> None:
    """Let the items of code get these scores in turn."""
    kind = kind_of("code")
    score = kind.score

    def changed(self: Domain, complete: Any, model: Any) -> dict[str, list[Any]]:
        found = score(self, complete, model)
        return {task: [values[i % len(values)] for i in range(len(items))] for task, items in found.items()}

    monkeypatch.setattr(kind, "score", changed)


def test_scores_of_any_kind_are_stored(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored(monkeypatch, np.float32(0.5), torch.tensor(0.5), np.float64(0.5))
    config = code(tmp_path, made, "m_B")
    result = run(config, report=lambda line: None)
    assert {row["mean"] for row in result["rows"] if row["metric"] != "bits_per_byte"} == {50.0}


def test_scores_that_are_no_numbers_have_no_figure(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = code(tmp_path, made, "m_A", "m_B")
    scored(monkeypatch, math.nan)
    result = run(config, report=lambda line: None)
    data = tmp_path / "out" / "tiny.json"
    stored = json.loads(data.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert {row["mean"] for row in stored["rows"]} == {None}
    page = (tmp_path / "out" / "tiny.md").read_text(encoding="utf-8")
    assert "nan" not in page and "| m_B alone (1) | - | " in page
    assert all((tmp_path / "out" / f"tiny-{name}.png").is_file() for name in ("accuracy", "forgetting", "flops"))
    # And as an earlier report that is kept, with nulls in their place.
    fewer = {**result, "cells": {**result["cells"], "by_experiment": {"code": 1}}}
    assert "nan" not in markdown(keep_fuller(fewer, stored))


def test_a_plot_that_fails_loses_no_report(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("Axis limits cannot be NaN or Inf")

    monkeypatch.setattr(plots, "_forgetting", fail)
    lines: list[str] = []
    run(code(tmp_path, made, "m_A", "m_B"), report=lines.append)
    assert "The plot 'forgetting' could not be drawn (ValueError: Axis limits cannot be NaN or Inf)." in lines
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tiny.json", "tiny.md", "tiny-accuracy.png", "tiny-flops.png"}
    page = (tmp_path / "out" / "tiny.md").read_text(encoding="utf-8")
    assert "tiny-accuracy.png" in page and "tiny-forgetting.png" not in page


def test_a_report_without_matplotlib(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calmlm.data.extras.find_spec", lambda name: None if name == "matplotlib" else object())
    lines: list[str] = []
    run(code(tmp_path, made, "m_B"), report=lines.append)
    assert sum("needs the package 'matplotlib'" in line for line in lines) == 1
    assert ".png" not in (tmp_path / "out" / "tiny.md").read_text(encoding="utf-8")


def test_a_system_that_cannot_be_timed_is_scored(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> float:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(cells_module, "decode_time_x_anchor", fail)
    result = run(code(tmp_path, made, "m_B"), report=lambda line: None)
    assert result["cells"]["finished"] == 1 and result["rows"][0]["decode_time_x_anchor"] is None


def test_an_output_that_has_gone_leaves_the_report_elsewhere(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = code(tmp_path, made, "m_B")
    kind = kind_of("code")
    score = kind.score

    def gone(self: Domain, *args: Any) -> Any:
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").write_text("")
        return score(self, *args)

    monkeypatch.setattr(kind, "score", gone)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises(CalmError, match=r"Expected to write a result to .*tiny.json, .* so it lies in .*: move it"):
        run(config, report=lambda line: None)
    (found,) = (tmp_path / "elsewhere").glob("*/tiny.json")
    assert json.loads(found.read_text(encoding="utf-8"))["cells"]["finished"] == 1


def test_a_cell_that_cannot_be_stored_lies_elsewhere(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = code(tmp_path, made, "m_A", "m_B")
    kind = kind_of("code")
    score = kind.score

    def gone(self: Domain, *args: Any) -> Any:
        shutil.rmtree(tmp_path / "cells", ignore_errors=True)
        (tmp_path / "cells").write_text("")
        return score(self, *args)

    monkeypatch.setattr(kind, "score", gone)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises((CalmError, OSError)):
        run(config, report=lambda line: None)
    assert list((tmp_path / "elsewhere").glob("*/tiny-m_A*.json"))
    assert "so it lies in" in capsys.readouterr().err
