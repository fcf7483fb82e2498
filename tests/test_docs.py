"""The documentation: its links lead somewhere, its code runs, its commands exist."""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import calmlm
from calmlm.cli import main
from calmlm.exporting import export
from calmlm.serving.catalogue import Catalogue
from calmlm.serving.catalogue import load as load_served
from compositions import own, tiny_composition
from documents import ROOT, anchors, blocks, check_command, check_options, console, inline, links, pages
from gguf_files import write_gguf
from readers.test_items import vision
from served import serving
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokens
from tokenizers_tiny import tokenizer
from tokens.test_views import chatty

PAGES = pages()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page.read_text(encoding="utf-8")):
        path, _, part = link.partition("#")
        target = page if not path else page.parent / path
        headings = anchors(target.read_text(encoding="utf-8")) if target.suffix == ".md" and target.exists() else set()
        if not target.exists() or (part and part not in headings):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in console(text):
        if words[0] == "calmlm":
            check_command(words)
        elif words[0].startswith("scripts/"):
            assert (ROOT / words[0]).is_file()
            assert (ROOT / words[0]).stat().st_mode & 0o111, f"{words[0]} cannot be run"
    for words in inline(text):
        check_options(words)


def test_what_is_wrong_is_found() -> None:
    for words in (["calmlm", "trian", "x.yaml"], ["calmlm", "train", "x.yaml", "--resum"], ["calmlm", "repro", "x"]):
        with pytest.raises(Exception, match="No such"):
            check_command(words)
    with pytest.raises(AssertionError, match="there is no --resum"):
        check_options(["calmlm", "train", "--resum"])
    text = "## What it costs\n\n[a](b.md#c) and ![d](e.svg)\n\n```python\n[f](g)\n```\n"
    assert links(text) == ["b.md#c", "e.svg"]
    assert anchors(text) == {"what-it-costs"}


EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def test_every_file_that_extending_names_exists() -> None:
    named = re.findall(r"`((?:src|tests|docs|configs|experiments|scripts)/[\w/.]+)(?:::[\w:]+)?`", EXTENDING)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_every_test_that_extending_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]+)::([\w:]+)`", EXTENDING)
    assert len(named) >= 7
    missing = []
    for path, name in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        *classes, function = name.split("::")
        if f"def {function}(" not in text or any(f"class {each}" not in text for each in classes):
            missing.append(f"{path}::{name}")
    assert missing == []


RECIPES = dict(part.split("\n", 1) for part in re.split(r"^## ", EXTENDING, flags=re.MULTILINE)[1:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_names_files_in_order_and_a_test(recipe: str) -> None:
    steps = re.findall(r"^(\d)\. ", RECIPES[recipe], re.MULTILINE)
    assert steps == [str(number) for number in range(1, len(steps) + 1)]
    assert 2 <= len(steps) <= 5
    assert re.search(r"^Start from\s", RECIPES[recipe], re.MULTILINE), "the test to start from"


def test_every_name_that_extending_gives_is_in_its_file() -> None:
    """A step such as "`src/x.py`: add it to `NAMES`" must hold: the file has that name."""
    missing = []
    for step in re.split(r"^(?:\d\.| +-) |\n\n", EXTENDING, flags=re.MULTILINE):
        files = re.findall(r"`((?:src|tests)/[\w/.]+\.py)`", step)
        texts = "".join((ROOT / path).read_text(encoding="utf-8") for path in files)
        names = re.findall(r"`(_?[A-Z][A-Z_]{3,}|_?[A-Z]\w+\.\w+)`", step)
        missing += [name for name in names if files and name.split(".")[-1] not in texts]
    assert missing == []


# Code that runs on tiny models in the place of the pages' own


def save(model: Any, folder: str, tokens: Any = None) -> Any:
    """Save a model, with a tokenizer beside it, and load it again as a user would."""
    model.save_pretrained(folder)
    if tokens is not None:
        tokens.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def run(page: str, names: dict[str, Any], **changes: str) -> dict[str, Any]:
    """Run all Python of a page in order; return the names that it leaves."""
    for block in blocks((ROOT / page).read_text(encoding="utf-8"), "python"):
        for old, new in changes.items():
            block = block.replace(old, new)
        exec(compile(block, page, "exec", dont_inherit=True), names)
    return names


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
def test_code_of_any_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    monkeypatch.chdir(tmp_path)
    ours, theirs = chatty("bytes", "chatml"), tokenizer("bytes-large")
    small = {"tokens": theirs, "model": tiny_model("mistral", seed=2, vocab_size=len(theirs))}
    anchor = save(tiny_model("llama", seed=1, vocab_size=len(ours)), "big-model", ours)
    augmenting = save(small["model"], "small-model", small["tokens"])
    save(tiny_model("llama", seed=1), "language-model")
    save(vision(), "vision-encoder")
    others = [save(tiny_model("gpt2", seed=seed, vocab_size=len(ours)), f"other-{seed}", ours) for seed in (3, 4, 5)]
    calmlm.compose("big-model", "other-5").save_pretrained("folder-of-another-composition")
    for folder, name, seed in (("folder", "m_B", 1), ("other", "m_A", 2)):
        (tmp_path / folder).mkdir()
        write_gguf(tmp_path / folder / f"{name}.gguf", seed=seed)
    image_token, ids = 7, tiny_tokens(2, 9)
    ids[ids == image_token] += 1
    ids[0, [1, 4]] = ids[1, [2, 6]] = image_token
    names = run(
        "docs/any-two-models.md",
        {
            "calmlm": calmlm,
            "torch": torch,
            "anchor": anchor,
            "augmenting": augmenting,
            "anchor_tokenizer": ours,
            "small_tokenizer": theirs,
            "big": "big-model",
            "small": "other-3",
            "four_bits": TorchAoConfig(Int8WeightOnlyConfig()),
            "chat_model": "big-model",
            "specialist": "small-model",
            "lines": (lines := [f"the quick fox {number} jumps over {number * 7} lazy dogs" for number in range(12)]),
            "examples": [{"prompt": line[:20], "completion": line[20:]} for line in lines[:4]],
            "coder": others[0],
            "speaker": others[1],
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "other_ids": ids.flip(1),
            "other_mask": torch.ones_like(ids),
            "images": torch.randn(2, 1, 8, 8),
            "pictures": torch.randn(4, 1, 8, 8),
            "image_token": image_token,
        },
    )
    assert names["at"].tolist() == [[1, 4], [2, 6]]
    assert set(names["model"].model.active) == {"eyes"}


def tiny_files(place: Path) -> None:
    """Tiny models where `scripts/models` puts the real ones."""
    names = ("smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1", "gemma-3-270m/gemma-3-270m-q4_k_m")
    for seed, name in enumerate(names):
        path = place / "models" / f"{name}.gguf"
        path.parent.mkdir(parents=True)
        write_gguf(path, seed=seed)


def test_code_of_real_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_files(tmp_path)
    assert run("docs/real-models.md", {})["untrained"].config.augmenting["augmenting"]["words"]
    rows = [{"prompt": f"the cat {n}", "completion": f" sat on the mat {n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["inspect", "runs/translation/untrained", "--text", "rows.jsonl"]) == 0


def test_code_of_generation() -> None:
    shared = {"vocab_size": 97}
    model = tiny_composition("llama", "gpt2", anchor_options=shared, augmenting_options=shared)
    names = {"calmlm": calmlm, "torch": torch, "model": model}
    names |= {"question": {"input_ids": tiny_tokens(1, 5)}, "batch": {"input_ids": tiny_tokens(2, 5)}}
    for inputs in (names["question"], names["batch"]):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model.generation_config.pad_token_id = 0
    assert run("docs/generation.md", names)["out"].shape[0] == 2


def test_code_of_serving(capsys: pytest.CaptureFixture[str]) -> None:
    words = copy.deepcopy(tokenizer("bytes-large"))
    words.chat_template = CHAT_TEMPLATE
    model = tiny_composition("llama", "gpt2", **own("bytes", "bytes-large"))
    with serving(Catalogue({"composition": model}, words)) as (url, _):
        address = {"http://127.0.0.1:8000": url}
        names = run("docs/serving.md", {}, **address)
        names["client"].close()
    assert json.loads(names["answer"].choices[0].text)["tame"] in (True, False)
    assert capsys.readouterr().out.startswith("composition\n")


def test_code_of_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its two programs on tiny models in the place of the real ones, and the step between them."""
    monkeypatch.chdir(tmp_path)
    tiny_files(tmp_path)
    compose, call = blocks((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), "python")
    exec(compile(compose, "docs/tutorial.md", "exec", dont_inherit=True), {})
    assert main(["inspect", "runs/translation/untrained"]) == 0
    assert main(["export", "runs/translation/untrained", "translator"]) == 0
    shutil.rmtree("models")
    shutil.rmtree("runs")
    with serving(load_served({"composition": "translator"})) as (url, _):
        names: dict[str, Any] = {}
        exec(compile(call.replace("http://127.0.0.1:8000", url), "docs/tutorial.md", "exec", dont_inherit=True), names)
        names["client"].close()
    assert names["answer"].usage.completion_tokens > 0


def test_code_of_sharing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a hub, which tests/files/test_sharing.py has."""
    monkeypatch.chdir(tmp_path)
    base = save(tiny_model("llama", seed=1), "base")
    model = calmlm.compose("base", tiny_model("gpt2", seed=2), 2)
    model.augmenting["augmenting"].save_pretrained("small")
    calmlm.compose("base", "small", 2).save_pretrained("runs/example/composition")
    export("runs/example/composition", "shared/translator")
    pushed: dict[str, Any] = {}

    def push(found: Any, name: str, **options: Any) -> None:
        pushed[name] = options
        found.save_pretrained(name)

    monkeypatch.setattr(calmlm.CalmForCausalLM, "push_to_hub", push)
    names = run("docs/sharing.md", {})
    assert pushed == {"me/translator": {"private": True}}
    assert type(names["again"].anchor) is type(base)
    assert "| openai/gsm8k | gsm8k | 0.41 |" in (tmp_path / "runs/example/composition/README.md").read_text()


def test_the_reference_is_what_the_docstrings_say() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "api.py"), "--check"], timeout=60)
    assert done.returncode == 0, "docs/api.md is behind the code: run scripts/api.py."
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in calmlm.__all__ if f"### `calmlm.{name}`" not in text and name != "CalmModel"]
    assert missing == []


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_the_site_has_every_page_and_no_plugins(tmp_path: Path) -> None:
    def named(entries: list[Any]) -> list[str]:
        found = []
        for entry in entries:
            for value in entry.values():
                found += named(value) if isinstance(value, list) else [value]
        return found

    nav = named(SITE["nav"])
    assert SITE["plugins"] == []
    assert sorted(nav) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert len(nav) == len(set(nav))


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    program = shutil.which("zensical") or shutil.which("zensical", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("zensical is not installed")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run([program, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "tutorial" / "index.html").is_file()


def test_code_of_looking_inside(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("docs/ui.md", {})
    assert names["found"].answer == "6 + 6 = 12 + 5 = 17"
    shown = capsys.readouterr().out
    assert names["found"].answer in shown and str(names["first"].weights.shape) in shown


def test_every_page_with_code_has_a_test_that_runs_it() -> None:
    """What needs data sets from a hub is compiled only."""
    with_code = {name_of(page) for page in PAGES if blocks(page.read_text(encoding="utf-8"), "python")}
    named = ("any-two-models", "generation", "real-models", "serving", "sharing", "tutorial", "ui")
    run_here = {f"docs/{page}.md" for page in named}
    assert with_code == {"README.md", "configs/benchmarks/README.md", *run_here}
