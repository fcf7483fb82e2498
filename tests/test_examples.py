"""Every example runs without changes."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file

from calmlm.data.sources import HubDataset
from calmlm.experiments.real.presets import load_settings
from calmlm.training.schema import load_config, parse_config
from documents import ROOT

EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "hub_job"]


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A file in the form of the data set that the example loads from the hub."""
    varieties = load_settings(ROOT / "configs" / "real" / "varieties.yaml").varieties.all
    rows = [{"eng_Latn": f"sentence {n}"} | {variety: f"{variety} {n}" for variety in varieties} for n in range(1300)]
    path = tmp_path / "sentences.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path, sentences: Path) -> None:
    given = ["--data", str(sentences)] if path.stem == "translation" else []
    done = subprocess.run(
        [sys.executable, str(path), *given], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    if path.stem == "translation":
        texts = [(tmp_path / "runs" / "translation" / f"{part}.jsonl").read_text() for part in ("train", "eval")]
        learned, asked = ([json.loads(line)["completion"] for line in text.splitlines()] for text in texts)
        assert len(learned) == 960
        assert not set(asked) & set(learned)


def test_sentences_that_cannot_be_had_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    main = runpy.run_path(str(ROOT / "examples" / "translation.py"))["main"]
    for given, advice in (
        ([], "name a file of its rows with --data."),
        (["--data", "none.jsonl"], "name another file."),
    ):
        assert main([*given, "--output", str(tmp_path / "written")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: Expected ")
        assert said.endswith(f"{advice}\n")
        assert said.count("\n") == 1
    assert not (tmp_path / "written").exists()


def test_the_configuration_of_the_real_pair_is_complete() -> None:
    config = load_config(ROOT / "configs" / "real" / "train.yaml")
    settings = load_settings(ROOT / "configs" / "real" / "varieties.yaml")
    method = settings.methods["composed"]
    assert config.model.connections == method.compose["connections"]
    assert config.model.adapters == method.compose["adapters"]["r"]
    assert config.model.words == method.compose["words"]
    assert config.trainer["max_steps"] == method.steps
    prefix = config.model.augmenting_prefix
    assert isinstance(prefix, str)
    assert prefix.count("\nEnglish: ") == 5
    assert prefix.endswith(".\n\n")  # a prompt follows as each example followed the one before


def test_the_notebook_runs_cell_by_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "tutorial.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert cells[0].count("STEPS = 400") == 1
    names: dict[str, object] = {}
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    for cell in cells:
        exec(compile(cell.replace("STEPS = 400", "STEPS = 3"), "tutorial.ipynb", "exec", dont_inherit=True), names)
    assert "comes with calmlm pxj - wuk + fkb = 9 - 7 = 2 + 10 = 12" in said
    assert said[-1] == "True"


JOB = ROOT / "examples" / "hub_job.py"


def test_the_job_names_what_it_needs() -> None:
    text = JOB.read_text(encoding="utf-8")
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)
    needs = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert needs["requires-python"] == project["requires-python"]
    (needed,) = map(Requirement, needs["dependencies"])
    assert needed.name == project["name"]
    assert needed.extras <= set(project["optional-dependencies"])
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert {str(name).split(".")[0] for name in imported} <= {"calmlm", "collections", "typing", "__future__"}


def test_the_job_trains(
    tmp_path: Path, anchor_folder: Path, augmenting_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = runpy.run_path(str(JOB))
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--anchor", str(anchor_folder), "--augmenting", str(augmenting_folder), "--output", str(tmp_path / "run")]
    given = [*words, "--data", str(tmp_path / "pairs.jsonl"), "--steps", "2", "--batch", "2", "--words", "pointer"]
    assert job["main"](given) == 0
    composition = tmp_path / "run" / "composition"
    assert capsys.readouterr().out.strip().endswith(str(composition))
    assert any(bool(torch.any(tensor != 0)) for tensor in load_file(composition / "model.safetensors").values())
    assert job["main"](given) == 2  # a run lies there already
    assert capsys.readouterr().err.startswith("error: Expected an empty folder for the output")
    found = job["settings"](job["parsed"]([*words, "--data", "me/pairs", "--push-to", "me/composed"]))
    config = parse_config(found)
    assert config.trainer["hub_model_id"] == "me/composed"
    assert config.data.train == HubDataset("me/pairs")
