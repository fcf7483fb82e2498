"""Results are written whatever values they hold, and wherever there is room."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calmlm.errors import CalmError, ConfigError
from calmlm.files import results, storage
from calmlm.files.results import plain, to_json, write_result
from calmlm.files.storage import check_writable
from calmlm.training.run_folder import RunFolder


class Kind(enum.Enum):
    ONE = "one"


class Text(str):
    def __str__(self) -> str:
        return "something else"


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(2), 2.0),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array([[1, 2]]), [[1, 2]]),
        (np.array([math.nan, 1.0]), [None, 1.0]),
        (torch.tensor([1.0, math.inf]), [1.0, "inf"]),
        (torch.tensor(2, dtype=torch.bfloat16), 2.0),
        (torch.tensor(1.0, requires_grad=True), 1.0),
        (torch.float32, "torch.float32"),
        (math.nan, None),
        (-math.inf, "-inf"),
        ({1: "a", "1": "b", None: "c"}, {"1": "a", "1'": "b", "None": "c"}),
        ({(1, 2): "a", Kind.ONE: "b"}, {"(1, 2)": "a", "one": "b"}),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({2, "a"}), [2, "a"]),
        ((1, (2,)), [1, [2]]),
        (Kind.ONE, "one"),
        (Text("a"), "a"),
        (Path("a/b"), "a/b"),
        (Fraction(1, 2), "Fraction(1, 2)"),
        (Pair(1, Pair("a", {2})), {"left": 1, "right": {"left": "a", "right": [2]}}),
        (b"a", "b'a'"),
        (10**5000, hex(10**5000)),
        (True, True),
        ("\ud800", "\ud800"),
    ],
    ids=lambda value: repr(type(value).__name__),
)  # fmt: skip
def test_any_value_has_a_form(value: Any, expected: Any) -> None:
    assert json.loads(to_json({"value": value})) == {"value": expected}
    assert plain(plain(value)) == plain(value)


def test_what_json_has_no_form_for_is_shown() -> None:
    found = json.loads(to_json([len, lambda: 0, Broken(), Broken, torch.zeros(2, device="meta"), object()]))
    assert found[0] == "<built-in function len>" and "lambda" in found[1] and "Broken object at" in found[2]
    assert all(isinstance(text, str) for text in found)


def test_values_within_themselves_and_very_deep_ones() -> None:
    loop: list[Any] = [1]
    loop.append({"again": loop})
    assert json.loads(to_json(loop)) == [1, {"again": "[1, {'again': [...]}]"}]
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    assert json.loads(to_json(deep))
    same = [1]
    assert json.loads(to_json([same, same])) == [[1], [1]]


def test_a_folder_that_is_gone_is_made_again(tmp_path: Path) -> None:
    write_result(tmp_path / "gone" / "a.json", "{}")
    assert (tmp_path / "gone" / "a.json").read_text() == "{}"


def test_a_second_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(results.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CalmError, match=r"but that failed \(.+\), so it lies in .*a.json: move it.$") as caught:
        write_result(tmp_path / "file" / "a.json", "{}")
    place = Path(str(caught.value).split("lies in ")[1].removesuffix(": move it."))
    assert place.read_text() == "{}"
    monkeypatch.setattr(results.tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(CalmError, match="it was printed instead"):
        write_result(tmp_path / "file" / "a.json", '{"a": 1}')
    assert '{"a": 1}' in capsys.readouterr().out


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "there" / "real.json"
    target.write_text("old", encoding="utf-8")
    link.symlink_to(target)
    check_writable(link)
    write_result(link, "new")
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "new"


def test_a_pipe_or_a_device_is_written_into_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    write_result(pipe, "figures")
    reader.join(10)
    assert read == ["figures"]
    assert pipe.is_fifo()


def test_a_full_disk_is_found_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("this system has no device that is always full")
    monkeypatch.setattr(storage.tempfile, "TemporaryFile", lambda dir, **options: full.open("wb", **options))
    with pytest.raises(ConfigError, match=r"but it cannot \(No space left on device\): name another\.$"):
        check_writable(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="No space left on device"):
        RunFolder(tmp_path / "run").check(resume=False, overwrite=False)
