"""Running a comparison: every method end to end, cells that are never repeated, and an honest report."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from calmlm.cli import main
from calmlm.comparison import cells as cells_module
from calmlm.comparison.cells import Cell
from calmlm.comparison.contract import GRAFTS, Fitted
from calmlm.comparison.domains import DOMAINS
from calmlm.comparison.methods import ABLATIONS, METHODS, Method
from calmlm.comparison.page import markdown
from calmlm.comparison.selection import CompareConfig, Part, load_config
from calmlm.comparison.summary import summarise
from calmlm.comparison.workers import _make, run
from calmlm.errors import CalmError, ConfigError, MissingExtraError
from comparisons import cell, comparison

SMALL = Path(__file__).parents[2] / "configs" / "compare" / "small.yaml"


@pytest.mark.slow
def test_cells_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = comparison(tmp_path, code=Part([0], ["m_A", "m_B", "router"]))
    lines: list[str] = []
    first = run(config, report=lines.append)
    assert first["cells"] == {"planned": 3, "finished": 3, "by_experiment": {"code": 3}}
    assert sum("..." in line and "code, seed 0" in line for line in lines) == 3
    paths = [cell.path(Path(config.cache)) for cell in config.cells()]
    before = [path.stat().st_mtime_ns for path in paths]
    monkeypatch.setattr(Cell, "do", None)  # would fail if called
    bases = [json.loads(path.read_text(encoding="utf-8"))["bases"] for path in paths]
    assert set(bases[0]) == {"anchor", "augmenting"} and bases[0] == bases[1] == bases[2]
    again = run(config, report=lines.append)
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert again["rows"] == first["rows"]
    # A stopped run has no half cells, and goes on with what is missing.
    paths[1].unlink()
    with pytest.raises(CalmError, match="m_B of code, seed 0 .TypeError"):
        run(config, report=lines.append)
    partial = run(config, stored_only=True, report=lines.append)
    assert partial["cells"] == {"planned": 3, "finished": 2, "by_experiment": {"code": 2}}
    assert "Not finished: 2 of 3 cells" in (tmp_path / "out" / "tiny.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_cell_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = comparison(tmp_path, code=Part([0], ["lora", "m_B", "m_A"]))

    def fail(domain: Any, meter: Any) -> Fitted:
        raise RuntimeError("no memory")

    made = cells_module.METHODS["lora"]
    monkeypatch.setitem(cells_module.METHODS, "lora", Method("LoRA", fail))
    reason = r"but 1 failed, the first of them lora of code, seed 0 \(RuntimeError: no memory\)"
    with pytest.raises(CalmError, match=reason):
        run(config, report=lambda line: None)
    assert "in fail" in (tmp_path / "cells" / "log" / "code-0.txt").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "tiny.json").read_text(encoding="utf-8"))["cells"]["finished"] == 2
    assert {path.suffix for path in (tmp_path / "cells" / "cells" / "code").iterdir()} == {".json"}
    monkeypatch.setitem(cells_module.METHODS, "lora", made)
    assert run(config, report=lambda line: None)["cells"]["finished"] == 3
    assert not list((tmp_path / "cells" / "log").glob("*.failed"))


def test_where_every_cell_fails_the_first_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "do", None)
    with pytest.raises(CalmError, match="2 failed, the first of them m_B"):
        run(comparison(tmp_path, code=Part([0], ["m_B", "m_A"])), report=lambda line: None)


def test_folders_are_tried_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "do", None)  # would fail if called
    (tmp_path / "file").write_text("x", encoding="utf-8")
    config = comparison(tmp_path, code=Part([0], ["m_B"]))
    for key in ("output", "cache", "bases"):
        for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ConfigError, match=f"{key}: expected a folder"):
                run(dataclasses.replace(config, **{key: str(wrong)}), report=lambda line: None)


def test_a_package_that_is_missing_is_missed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "do", None)
    monkeypatch.setattr("calmlm.data.extras.find_spec", lambda name: None if name == "mergekit" else object())
    config = comparison(tmp_path, code=Part([0], ["m_B", "ties"]))
    with pytest.raises(
        MissingExtraError, match=r"'ties' on code needs the package 'mergekit'.*calmlm\[merging\]"
    ) as caught:
        run(config, report=lambda line: None)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # on its way out of a worker


def test_files_that_are_no_cells_are_made_anew(tmp_path: Path) -> None:
    config = comparison(tmp_path, code=Part([0], ["m_B"]))
    path = config.cells()[0].path(tmp_path / "cells")
    path.parent.mkdir(parents=True)
    others = ('{"scores": {}}', '{"domain": "code", "method": "m_B", "seed": 0, "scores": 5}')
    for text in ("", "{}", "[1]", "{", *others):
        path.write_text(text, encoding="utf-8")
        assert config.cells()[0].stored(tmp_path / "cells") is None
    assert run(config, report=lambda line: None)["cells"]["finished"] == 1


class Broken:
    """A pool whose workers are killed at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._processes: dict[int, Any] = {}

    def __enter__(self) -> Broken:
        return self

    def __exit__(self, *args: object) -> None: ...

    def submit(self, *args: Any) -> Future[None]:
        future: Future[None] = Future()
        future.set_exception(BrokenProcessPool("terminated abruptly"))
        return future


def test_a_worker_that_is_killed_leaves_a_report_and_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = comparison(tmp_path, code=Part([0], ["m_B"]))
    run(config, report=lambda line: None)
    monkeypatch.setattr("calmlm.comparison.workers.ProcessPoolExecutor", Broken)
    config = dataclasses.replace(comparison(tmp_path, code=Part([0], ["m_B", "m_A"])), workers=2)
    (tmp_path / "o" / "tiny.json").unlink(missing_ok=True)
    with pytest.raises(CalmError, match=r"1 failed, the first of them m_A .*stopped from outside"):
        run(config, report=lambda line: None)
    assert json.loads((Path(config.output) / "tiny.json").read_text(encoding="utf-8"))["cells"]["finished"] == 1


def test_what_another_machine_has_made_is_put_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster whose machines share no folder: cells and reasons come back as text."""
    there = tmp_path / "there"

    def make(cells: list[Cell], config: Any, report: Any = None) -> None:
        for made in cells:
            if made.method == "m_A":
                made.fail(Path(config.cache), CalmError("no room"))
            else:
                path = made.path(Path(config.cache))
                path.parent.mkdir(parents=True, exist_ok=True)
                whole = {"domain": made.domain, "method": made.method, "seed": made.seed, "scores": {}}
                path.write_text(json.dumps(whole))

    def on_ray(function: Any, calls: Any, address: Any) -> Any:
        assert address == "auto"
        for number, (cells, config) in enumerate(calls):
            assert Path(config.cache).is_absolute()
            if cells[0].seed == 2:
                yield number, CalmError("its worker was lost")
            else:
                yield number, function(cells, dataclasses.replace(config, cache=str(there)))

    monkeypatch.setattr("calmlm.comparison.workers._make_group", make)
    monkeypatch.setattr("calmlm.comparison.workers.done_on_ray", on_ray)
    config = comparison(tmp_path, code=Part([0, 1, 2], ["m_B", "m_A"]))
    config = dataclasses.replace(config, workers="ray", ray_address="auto")
    cells, cache = config.cells(), Path(config.cache)
    _make(cells, config, lambda line: None)
    stored = {(made.method, made.seed): made.stored(cache) for made in cells}
    assert {key for key, found in stored.items() if found is not None} == {("m_B", 0), ("m_B", 1)}
    assert all(made.failure(cache) == "no room" for made in cells if made.method == "m_A" and made.seed < 2)
    assert all(made.failure(cache) == "its worker was lost" for made in cells if made.seed == 2)


def test_the_number_of_workers_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("domains: {code: {seeds: [0], methods: [m_A]}}\n", encoding="utf-8")
    assert main(["compare", str(path), "--workers", "some"]) == 2
    assert "--workers must be a number from 1, or ray, but got 'some'" in capsys.readouterr().err


def command(folder: Path, path: Path) -> list[str]:
    found = [sys.executable, "-m", "calmlm.cli", "compare", str(path), "--preset", "tiny"]
    return [
        *found, "--cache", str(folder / "cells"), "--bases", str(folder / "bases"), "--output", str(folder / "o")
    ]  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_runs_share_a_cache(tmp_path: Path) -> None:
    """A stage and a cell are made once, and what the other run makes is waited for."""
    path = tmp_path / "c.yaml"
    path.write_text("domains: {code: {seeds: [0], methods: [m_A, m_B, router]}}\nworkers: 1\n", encoding="utf-8")
    both = [subprocess.Popen(command(tmp_path, path), stderr=subprocess.PIPE, env=ENVIRONMENT) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    lines = (tmp_path / "cells" / "log" / "code-0.txt").read_text(encoding="utf-8").splitlines()
    for name in ("anchor", "augmenting"):
        assert sum(f" {name} took" in line for line in lines) == 1
    assert sum("took" in line and "code, seed 0" in line for line in lines) == 3
    assert not [path for path in (tmp_path / "bases").rglob("*") if path.name.startswith(".") and path.is_dir()]


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="stored-only"):
        run(comparison(tmp_path, code=Part([0], ["m_B"])), stored_only=True, report=lambda line: None)


def test_cells_depend_on_all_that_matters() -> None:
    preset = DOMAINS["code"][1]["tiny"]
    cell = Cell("code", "lora", preset, 0)
    others = [
        dataclasses.replace(cell, seed=1),
        dataclasses.replace(cell, method="moe"),
        dataclasses.replace(cell, preset=dataclasses.replace(preset, items=13)),
    ]
    assert len({each.path(Path()).name for each in [cell, *others]}) == 4


# The report, from cells by hand


@pytest.fixture
def report() -> dict[str, Any]:
    shares = {"m_A": 0.0, "m_B": 0.1, "composed": 0.6, "lora": 0.6, "moe": 0.9, "cascade": 0.3}
    forgets = {"moe": 0.5}
    found = [
        (Cell("kv_arithmetic", method, None, seed), cell(method, seed, share, forgets.get(method, 1.0)))
        for method, share in shares.items()
        for seed in (0, 1)
    ]
    found.append((Cell("kv_arithmetic", "heads=1", None, 0), cell("heads=1", 0, 0.2)))
    config = CompareConfig(domains={}, preset="tiny", parts={"kv_arithmetic": Part([0, 1], None, ["heads=1"])})
    return summarise(config, found, 50, "the command")


def test_rows_have_what_is_promised(report: dict[str, Any]) -> None:
    row = next(r for r in report["rows"] if r["method"] == "moe" and r["task"] == "kv_arithmetic/ood")
    expected = {
        "metric": "exact_match",
        "mean": 90.0,
        "seeds": 2,
        "retained_delta": -50.0,
        "trainable_parameters": 10,
        "train_flops": 1e9,
        "decode_time_x_anchor": 1.5,
    }
    assert {key: row[key] for key in expected} == expected
    assert row["low"] < 90.0 < row["high"]
    reference = next(r for r in report["rows"] if r["method"] == "reference" and r["task"] == "kv_arithmetic/ood")
    assert reference["seeds"] == 1 and reference["mean"] == 60.0


def test_cells_of_other_bases_are_named() -> None:
    found = [(Cell("kv_arithmetic", m, None, s), cell(m, s, 0.5)) for m in ("m_B", "composed") for s in (0, 1)]
    for each, result in found:
        result |= {"domain": each.domain, "bases": {"anchor": f"a{each.seed}", "augmenting": "b"}}
    config = CompareConfig(domains={}, preset="tiny", parts={"kv_arithmetic": Part([0, 1])})
    same = summarise(config, found, 4, "the command")
    assert "mixed" not in same and "base models:" not in markdown(same)
    found[3][1]["bases"]["anchor"] = "c"
    other = summarise(config, found, 4, "the command")
    assert other["mixed"] == ["anchor of Key-value arithmetic, seed 1"]
    assert "the same base models: anchor of Key-value arithmetic, seed 1.**" in markdown(other)


def test_the_report_says_where_the_composition_loses(report: dict[str, Any]) -> None:
    verdicts = {a["method"]: a["verdict"] for a in report["answers"]["kv_arithmetic"]}
    assert verdicts == {
        "m_A": "above",
        "m_B": "above",
        "lora": "no difference shown",
        "moe": "below",
        "cascade": "above",
    }
    page = markdown(report)
    line = next(line for line in page.splitlines() if line.startswith("| a mixture of experts |"))
    assert "**CALM is below**" in line and "-50.0" in line
    assert "Not finished: 13 of 50 cells" in page
    json.dumps(report)


# All of it


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_method_runs_on_every_experiment(tmp_path: Path) -> None:
    """Stopped in the middle and started again, as a user would."""
    text = SMALL.read_text(encoding="utf-8").replace("[0, 1, 2]", "[0]").replace("[0, 1]", "[0]")
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    stopped = subprocess.Popen(command(tmp_path, path), stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT)
    stored = tmp_path / "cells" / "cells"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and len(list(stored.glob("*/*.json"))) < 4:
        time.sleep(0.5)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=60)
    time.sleep(4)  # its workers end when it does
    before = {p: p.stat().st_mtime_ns for p in stored.glob("*/*.json")}
    assert len(before) >= 4
    done = subprocess.run(command(tmp_path, path), capture_output=True, text=True, env=ENVIRONMENT, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(p.stat().st_mtime_ns == made for p, made in before.items())
    result = json.loads((tmp_path / "o" / "tiny.json").read_text(encoding="utf-8"))
    assert result["cells"]["finished"] == result["cells"]["planned"]
    for domain in DOMAINS:
        methods = {row["method"] for row in result["rows"] if row["task"].startswith(f"{domain}/")}
        assert methods >= set(DOMAINS[domain][0].methods or METHODS)
    assert {row["method"] for row in result["rows"]} >= {*METHODS, *ABLATIONS} - set(GRAFTS)
    assert load_config(path, "tiny").preset == "tiny"
    assert len(list((tmp_path / "o").glob("*.png"))) == 4
