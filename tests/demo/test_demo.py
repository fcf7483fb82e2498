"""The demonstration: what it needs, what it prints, and that the models that come with calmlm do what it claims."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from calmlm.cli import main
from calmlm.demo import bundle
from calmlm.demo.show import show

shipped = pytest.mark.skipif(not bundle.HOME.exists(), reason="this checkout has no trained models")


def test_without_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "__defaults__", (tmp_path, None))
    assert main(["demo"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: Expected the demonstration's models in {tmp_path}, but augmenting, anchor,")
    assert "calmlm repro kv-arithmetic --preset tiny --export" in message


@pytest.mark.slow
def test_from_experiment_to_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models"
    arguments = ["--preset", "tiny", "--seeds", "3", "--max-steps", "2", "--items", "4"]
    places = ["--output", tmp_path / "results", "--cache", tmp_path / "cache", "--export", folder]
    assert main(["repro", "kv-arithmetic", *arguments, *map(str, places)]) == 0
    bundle.check(folder)
    text = StringIO()
    accuracy = show(folder, Console(file=text, width=120))
    assert accuracy.keys() == {"augmenting model", "anchor", "composition"}
    assert "Right on 200 held-out expressions: " in text.getvalue()
    assert main(["generate", str(folder / "composition"), "--prompt", "ab + cd ="]) == 0


@shipped
def test_models_that_come_with_calmlm() -> None:
    size = sum(path.stat().st_size for path in bundle.HOME.rglob("*") if path.is_file())
    assert size <= 20e6
    assert not [path for path in bundle.HOME.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert (bundle.HOME / "origin.json").is_file()
    text = StringIO()
    accuracy = show(console=Console(file=text, width=120))
    assert accuracy["augmenting model"] <= 25
    assert accuracy["anchor"] <= 25
    assert accuracy["composition"] >= 70
