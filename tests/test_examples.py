"""Every example runs without changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from calmlm.experiments.real.presets import load_settings
from calmlm.training.schema import load_config
from documents import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


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


def test_the_configuration_of_the_real_pair_is_complete() -> None:
    config = load_config(ROOT / "configs" / "real" / "train.yaml")
    settings = load_settings(ROOT / "configs" / "real" / "varieties.yaml")
    method = settings.methods[settings.headline]
    assert config.model.connections == method.compose["connections"]
    assert config.model.adapters == method.compose["adapters"]["r"]
    assert config.model.words == method.compose["words"]
    assert config.trainer["max_steps"] == method.steps
    prefix = config.model.augmenting_prefix
    assert isinstance(prefix, str)
    assert prefix.count("\nEnglish: ") == 5
    assert prefix.endswith(".\n\n")  # a prompt follows as each example followed the one before
