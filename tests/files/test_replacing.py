"""A folder that is replaced: what an interrupted replacement left is taken up, and nothing of another folder's."""

from __future__ import annotations

from pathlib import Path

import pytest

from calmlm.files.storage import replacing_folder


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with replacing_folder(tmp_path / "link") as fresh:
        (fresh / "new").write_text("2")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"}


@pytest.mark.parametrize(("name", "other"), [("a", "a.b"), ("a[1]", "a1"), ("a*", "ab")])
def test_what_another_folder_left_stays(name: str, other: str, tmp_path: Path) -> None:
    for kind in ("old", "new"):
        (tmp_path / f".{other}.77.{kind}").mkdir()
    (tmp_path / f".{name}.77.new").mkdir()
    with replacing_folder(tmp_path / name) as fresh:
        (fresh / "x").write_text("1")
    assert {path.name for path in tmp_path.iterdir()} == {name, f".{other}.77.old", f".{other}.77.new"}
