"""The report says by itself what it was held to and where it falls short."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calmlm.errors import CalmError, ConfigError
from calmlm.experiments.fitting import collator
from calmlm.experiments.kv_arithmetic import report as report_module
from calmlm.experiments.kv_arithmetic.report import goals, summarise, write_report
from calmlm.experiments.kv_arithmetic.run import run
from calmlm.experiments.record import Stages, origin
from calmlm.experiments.visual_arithmetic.digits import Digits
from calmlm.experiments.visual_arithmetic.joined import with_pictures
from calmlm.experiments.visual_arithmetic.run import run as run_visual
from tiny import tiny_model


def cells(**means: float) -> dict[tuple[str, str], dict[str, float]]:
    """Rows by method and column, from names such as ``composed__ood``."""
    return {tuple(name.split("__")): {"mean": mean} for name, mean in means.items()}  # type: ignore[misc]


def test_a_goal_that_is_missed_says_by_how_much() -> None:
    lines = goals(cells(composed__key_value=90.0, composed__ood=77.75, cascade__ood=100.0, composed_random__ood=30.5))
    assert lines == [
        "- at least 90 on Key-Value: 90.0 against 90.0, reached;",
        "- within 2 points of the cascade on Keys arithmetic (OOD): 77.8 against 100.0, "
        "**not reached, 20.2 points short**;",
        "- a random m_A at most 25 in every column with keys: 30.5, **not reached, 5.5 points over**.",
    ]


def test_goals_above_their_bound_are_reached() -> None:
    lines = goals(cells(composed__numeric=98.0, m_B__numeric=100.0, composed_random__key_value=25.0))
    assert [line.endswith(("reached;", "reached.")) for line in lines] == [True, True]


def outcome(methods: list[str], **changes: Any) -> dict[str, Any]:
    """What a run of the experiment has found out."""
    scores = {0: {method: {"key_value": 50.0, "numeric": 50.0} for method in methods}}
    return {
        "preset": "tiny", "seeds": [0], "rows": summarise(scores, 100), "footer": "footer", "seconds": {"anchor": 1.0},
        "halves": [], "commits": ["d"], "parameters": {"m_A": 1, "m_B": 2}, "command": "c", "commit": "d",
        "versions": {"torch": "2"}, "machine": {"processor": "p", "cores": 2, "threads": 2, "device": "none"},
        **changes,
    }  # fmt: skip


def test_a_plot_that_fails_loses_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report_module, "plot", fail)
    lines: list[str] = []
    odd = {"items_per_column": np.int64(3), "settings": {"set": {1}, "nan": float("nan")}}
    paths = write_report(outcome(["m_A", "m_B", "composed"], **odd), tmp_path, lines.append)
    assert [path.name for path in paths] == ["tiny.json", "tiny.md"]
    assert lines == ["The plot could not be drawn (RuntimeError: no fonts)."]
    found = json.loads(paths[0].read_text(encoding="utf-8"))
    assert found["items_per_column"] == 3 and found["settings"] == {"set": [1], "nan": None}


def test_a_report_on_bases_alone(tmp_path: Path) -> None:
    """As `--stored-only` gives it where no composition is stored."""
    paths = write_report(outcome(["m_A", "m_B"]), tmp_path, lambda line: None)
    assert "Parameters: m_A 1, m_B 2." in paths[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("experiment", [run, run_visual])
def test_the_output_is_tried_before_anything_is_trained(experiment: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Expected a file that can be written"):
        experiment("tiny", (0,), tmp_path / "file", tmp_path / "cache", report=lambda line: None)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_that_cannot_be_written_loses_no_stage(tmp_path: Path) -> None:
    class Odd:
        def save_pretrained(self, folder: Path) -> None:
            raise TypeError("not JSON serializable")

    lines: list[str] = []
    stages = Stages(tmp_path, "seed 0", lines.append)
    record = stages.do("anchor", lambda: (tiny_model(), {"losses": [(1, np.float32(0.5))]}), Odd())  # type: ignore[arg-type]
    assert record["losses"] and stages.has("anchor") and stages.digests().keys() == {"anchor"}
    assert any("without its tokenizer (not JSON serializable)" in line for line in lines)
    assert stages.do("anchor", lambda: (None, {}))["losses"] == [[1, 0.5]]


def test_what_makes_batches_goes_to_workers() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [5]}]
    for masked in (False, True):
        again = pickle.loads(pickle.dumps(collator(0, masked)))
        batch = again(rows)
        assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]] and batch["labels"][1].tolist() == [5, -100, -100]
        assert ("attention_mask" in batch) is masked
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pickle.loads(pickle.dumps(with_pictures(collator(0), Digits.__new__(Digits), 3))).args[2] == 3


def test_an_output_that_has_gone_leaves_the_figures_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalmError, match="so it lies in") as caught:
        write_report(outcome(["m_A", "m_B"]), tmp_path / "file", lambda line: None)
    place = Path(str(caught.value).split("lies in ")[1].removesuffix(": move it."))
    assert json.loads(place.read_text(encoding="utf-8"))["preset"] == "tiny"
    place.unlink()
    place.parent.rmdir()


@pytest.mark.parametrize("started", ["/bin/calmlm", "/lib/calmlm/__main__.py"])
def test_a_command_is_told_as_it_can_be_typed(started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [started, "evaluate", "my runs/it", "--limit", "2"])
    assert origin(None)["command"] == "calmlm evaluate 'my runs/it' --limit 2"
