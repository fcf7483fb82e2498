"""Paths of configurations and command lines: the home folder is written out once, where a path is read."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from calmlm.files.paths import expanded


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
