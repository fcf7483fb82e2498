"""The README: its first screen, its figures, and everything in it that can be run."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import calmlm
from calmlm.cli import main
from calmlm.comparison.selection import load_config
from calmlm.demo import MODELS
from documents import ROOT, blocks, console, links

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = "\n".join(README.splitlines()[:60])
IMAGES = ROOT / "docs" / "images"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_tables_are_the_committed_results() -> None:
    script = ROOT / "scripts" / "tables.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=120)
    if "there are none" in done.stderr:
        pytest.skip("no committed results")
    assert done.returncode == 0, f"A page is behind the results: run scripts/tables.py. {done.stderr}"


# The first screen


def test_the_first_screen_has_everything_in_its_order() -> None:
    marks = [
        "# calmlm\n",
        "](docs/images/licence.svg)](LICENSE)",
        "](docs/images/bridge.svg)",
        "uv pip install .",
        "\npip install .",
        "```python",
        "\n# composed ",
        "<!-- translators:start -->",
        "<!-- translators:end -->",
        "Take something else if",
        "[Documentation]",
    ]
    places = [FIRST_SCREEN.find(mark) for mark in marks]
    missing = [mark for mark, place in zip(marks, places, strict=True) if place < 0]
    assert not missing, f"not within the first 60 lines: {missing}"
    assert places == sorted(places)


def test_the_small_table_is_that_of_the_real_models() -> None:
    table = FIRST_SCREEN.partition("<!-- translators:start -->")[2].partition("<!-- translators:end -->")[0]
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
    result = json.loads((ROOT / "experiments/real/results/translation.json").read_text(encoding="utf-8"))["rows"]
    found = {row[0]: row[1:] for row in rows[2:]}
    assert list(found)[:2] == ["m_B", "m_A, which reads 5 examples"]
    best = result["graft_adapters_map_long"]
    shown = [f"{best[name]['mean']:.2f}" for name in ("inside", "outside", "swapped")]
    assert found["composed"] == [*shown, f"{best['english']:.2f}"]
    controls = [name for name in found if "random" in name or "LoRA" in name]
    assert len(controls) == 2


def run(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run code in a fresh namespace and return what it prints."""
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_the_first_block_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(FIRST_SCREEN + "\n", "python")[0]
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    said = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("#")]
    assert len(lines) == 10
    assert len(said) == 3
    assert run(code, capsys).splitlines() == said
    right = [record for record in questions() if record["prompt"] in said[2]]
    assert len(right) == 1
    answers = [line.split()[-1] for line in said]
    assert answers[2] == right[0]["answer"] not in answers[:2]


def questions() -> list[dict[str, str]]:
    """What no model of the demonstration has seen, with the answers."""
    return [json.loads(line) for line in (MODELS / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def said_in(picture: Path) -> list[str]:
    """The texts of a picture, in order."""
    root = ElementTree.parse(picture).getroot()
    return ["".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_shows_what_the_models_say() -> None:
    texts = said_in(IMAGES / "bridge.svg")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "anchor")

    def asked(model: Any, prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        return tokenizer.decode(model.generate(**ids, max_new_tokens=16)[0], skip_special_tokens=True)

    keys, question, numbers = "pxj - wuk + fkb ->", "pxj - wuk + fkb =", "9 - 7 + 10 ="
    augmenting = AutoModelForCausalLM.from_pretrained(MODELS / "augmenting")
    anchor = AutoModelForCausalLM.from_pretrained(MODELS / "anchor")
    composed = calmlm.CalmForCausalLM.from_pretrained(MODELS / "composition")
    for said in (
        asked(augmenting, keys),
        asked(anchor, numbers),
        asked(augmenting, question),
        asked(anchor, question),
        asked(composed, question),
    ):
        assert said in texts


def test_badges_say_what_is_so() -> None:
    found = {path.stem: " ".join(said_in(path)) for path in IMAGES.glob("*.svg") if path.stem != "bridge"}
    assert PROJECT["license"] in found["licence"]
    assert PROJECT["requires-python"].removeprefix(">=") in found["python"]
    shown = [Path(link).stem for link in links(FIRST_SCREEN) if link.startswith("docs/images/")]
    assert set(shown) == {*found, "bridge"}


@pytest.mark.parametrize("picture", sorted(IMAGES.glob("*.svg")), ids=lambda path: path.stem)
def test_pictures_are_legible_on_light_and_dark_pages(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), "nothing is loaded from elsewhere"
    assert "<title>" in text
    if picture.stem == "bridge":
        assert "prefers-color-scheme: dark" in text
    else:
        assert re.search(r"<rect[^>]*fill=", text), "a badge brings its own ground"


def test_install_commands() -> None:
    lines = console(FIRST_SCREEN)
    uv = [words for words in lines if words[:3] == ["uv", "pip", "install"]]
    pip = [words for words in lines if words[:2] == ["pip", "install"]]
    assert uv == [["uv", "pip", "install", ".", "--torch-backend", "cpu"]]
    assert pip == [
        ["pip", "install", "torch", "--index-url", "$CALMLM_TORCH_INDEX"],
        ["pip", "install", "."],
    ]
    assert "CALMLM_TORCH_INDEX" in (ROOT / "scripts" / "_env").read_text(encoding="utf-8")
    if shutil.which("uv"):
        helped = subprocess.run(["uv", "pip", "install", "--help"], capture_output=True, text=True, timeout=60).stdout
        assert "--torch-backend" in helped
    extras = set(re.findall(r"`([a-z]+)`", README.partition("## Extras")[2].partition("\n## ")[0]))
    assert extras <= set(PROJECT["optional-dependencies"])
    assert {"train", "compare", "eval"} <= extras


def test_models_are_fetched_by_the_active_environment_that_reads_them(tmp_path: Path) -> None:
    """Rather than by one that is made for it."""
    active = tmp_path / "python"
    active.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "$@"\n')
    active.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "CALMLM_VENV"}
    environment = kept | {"PATH": f"{tmp_path}:{kept['PATH']}", "PYTHON": "none"}
    script = ROOT / "scripts" / "models"
    done = subprocess.run([script, "--help"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == ([f"{script}.py", "--help"], "")


def test_the_demo_models_are_in_the_package() -> None:
    """`from calmlm.demo import MODELS` must hold in an installed package as it does in a clone."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert packages["targets"]["wheel"]["packages"] == ["src/calmlm"]
    assert MODELS.is_relative_to(Path(calmlm.__file__).parent)
    ignored = subprocess.run(["git", "check-ignore", "--quiet", str(MODELS / "anchor" / "model.safetensors")], cwd=ROOT)
    assert ignored.returncode != 0, "hatch leaves out what git ignores"


# Below it


def test_compose_your_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = next(block for block in blocks(README, "python") if "calmlm.compose(" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    monkeypatch.chdir(tmp_path)
    assert "trainable params" in run(code, capsys)
    assert (tmp_path / "runs" / "my-composition" / "model.safetensors").is_file()


def test_every_python_block_is_run_here() -> None:
    assert len(blocks(README, "python")) == 2


def commands(*start: str) -> list[list[str]]:
    """The README's commands that begin with these words."""
    return [words for words in console(README) if words[: len(start)] == list(start)]


def test_train_and_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written, in a folder that looks like a clone; only the training is cut short."""
    (python,), (train,), (generate,) = commands("python"), commands("calmlm", "train"), commands("calmlm", "generate")
    monkeypatch.chdir(tmp_path)
    for name in ("src", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert python == ["python", "examples/keys.py"]
    example = runpy.run_path(python[1])
    example["main"].__globals__["COUNT"] = 40  # tests/test_examples.py writes all of them
    example["main"]()
    short = ["trainer.max_steps=1", "trainer.per_device_train_batch_size=4", "trainer.use_cpu=true"]
    assert main([*train[1:], *short, "trainer.report_to=none", "trainer.disable_tqdm=true"]) == 0
    capsys.readouterr()
    assert main(generate[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_the_configuration_to_copy_trains(
    anchor_folder: Path, augmenting_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`configs/example.yaml`, with models and data that exist."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    models = [f"model.anchor={anchor_folder}", f"model.augmenting={augmenting_folder}"]
    short = ["trainer.max_steps=1", "trainer.use_cpu=true", "trainer.report_to=none", "trainer.disable_tqdm=true"]
    assert main(["train", str(ROOT / "configs" / "example.yaml"), *models, *short]) == 0
    assert (tmp_path / "runs" / "example" / "composition" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("calmlm", "repro"), ids=shlex.join)
def test_reproductions_in_a_tiny_form(words: list[str], tmp_path: Path) -> None:
    tiny = {"small": "tiny", "0,1,2": "0"}
    trial = ["--max-steps", "2", "--items", "4", "--output", str(tmp_path / "results"), "--cache", str(tmp_path)]
    assert main([tiny.get(word, word) for word in words[1:]] + trial) == 0


@pytest.mark.parametrize("words", commands("calmlm", "compare"), ids=shlex.join)
def test_comparisons_can_be_planned(words: list[str]) -> None:
    preset = words[words.index("--preset") + 1] if "--preset" in words else None
    assert load_config(ROOT / words[2], preset).cells()


def test_every_command_is_known_here() -> None:
    """What is none of these is run by no test: give it one."""
    known = {"calmlm", "python", "uv", "pip", "scripts/demo", "scripts/test"}
    assert {words[0] for words in console(README)} <= known
    assert 'bin/calmlm" demo' in (ROOT / "scripts" / "demo").read_text(encoding="utf-8")  # see tests/demo
    tested = {"train", "generate", "repro", "compare"}
    assert {words[1] for words in console(README) if words[0] == "calmlm"} <= tested


def test_the_tree_shows_every_room() -> None:
    tree = next(block for block in blocks(README, "text") if "connectors/" in block)
    named = re.findall(r"^    ([\w/.]+)", tree, re.MULTILINE)
    package = ROOT / "src" / "calmlm"
    rooms = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(named) == rooms | files
