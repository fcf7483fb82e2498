"""Paths of configurations and command lines: the home folder is written out once, where a path is read."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import calmlm
from calmlm import CalmForCausalLM
from calmlm.errors import CalmError, ConfigError
from calmlm.files.paths import expanded
from calmlm.training.schema import load_config
from compositions import assert_helpful, tiny_composition
from tiny import tiny_model


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", "/home/ada"),
        ("~/runs/x", "/home/ada/runs/x"),
        ("runs/~/x", "runs/~/x"),
        ("/data/~", "/data/~"),
        ("google/gemma-2-9b", "google/gemma-2-9b"),
        ("$HOME/x", "$HOME/x"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("", ""),
    ],
)
def test_as_a_shell_reads_them(written: str, meant: str) -> None:
    assert expanded(written) == meant
    assert expanded(Path(written)) == Path(meant)


def test_the_home_of_another_user() -> None:
    user = pwd.getpwuid(os.getuid())
    assert expanded(f"~{user.pw_name}/x") == f"{user.pw_dir}/x"


def test_what_is_not_given_stays_so() -> None:
    assert expanded(None) is None


NAMES = {"x" * 300: "File name too long", "a\0b": "null", "a\ud800": "half of a character"}


@pytest.mark.parametrize("name", NAMES, ids=["long", "null", "half"])
def test_what_no_file_can_be_called_is_refused(name: str) -> None:
    for written in (name, Path(name)):
        with pytest.raises(ConfigError) as caught:
            expanded(written)
        assert_helpful(caught.value, NAMES[name])
    assert expanded("a\udc80") == "a\udc80"  # a name that is no UTF-8, as Python reads it


@pytest.mark.parametrize("name", [*NAMES, 5, None, b"a"], ids=["long", "null", "half", "number", "none", "bytes"])
def test_what_no_file_can_be_called_is_refused_from_python(name: Any, tmp_path: Path) -> None:
    model = tiny_composition()
    model.save_pretrained(tmp_path / "c")
    calls: dict[str, Callable[[Any], object]] = {
        "save": model.save_pretrained,
        "load": CalmForCausalLM.from_pretrained,
        "join": lambda source: model.add_augmenting("other", source),
    }
    if isinstance(name, str):  # else it is taken for a model
        calls |= {
            "anchor": lambda source: calmlm.compose(source, tiny_model("gpt2"), 2),
            "augmenting": lambda source: calmlm.compose(tiny_model("llama"), source, 2),
            "instead": lambda source: CalmForCausalLM.from_pretrained(tmp_path / "c", anchor=source),
        }
    for call in calls.values():
        for written in (name, Path(name)) if isinstance(name, str) else (name,):
            with pytest.raises(CalmError) as caught:
                call(written)
            assert_helpful(caught.value, NAMES[name] if isinstance(name, str) else type(name).__name__)


def test_a_model_in_memory_may_be_called_anything(tmp_path: Path) -> None:
    anchor = tiny_model("llama")
    anchor.name_or_path = "x" * 300
    with pytest.warns(UserWarning, match="neither a folder here nor in the hub's cache"):
        model = calmlm.compose(anchor, tiny_model("gpt2"), 2)
    model.save_pretrained(tmp_path / "c")


def test_names_in_a_configuration_are_faults_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"output: {'x' * 300}\nmodel: {{anchor: a, augmenting: b}}\ndata: {{train: 'a', evil: 1}}\n")
    with pytest.raises(ConfigError, match=r"has 2 faults: .*output: a path or an id must be .* but got .xxx"):
        load_config(path)
