"""The README: its table is the committed result, its first block of code runs, its files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tiny import tiny_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_is_the_committed_result() -> None:
    script = ROOT / "scripts" / "tables.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=120)
    if "there are none" in done.stderr:
        pytest.skip("no committed results")
    assert done.returncode == 0, f"A page is behind the results: run scripts/tables.py. {done.stderr}"


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_first_example_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:
    match = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert match
    code = match[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", seed=1).save_pretrained("big-general-model")
    tokenizer.save_pretrained("big-general-model")
    tiny_model("mistral", seed=2).save_pretrained("small-specialist-model")
    names: dict[str, object] = {}
    exec(code, names)
    assert "trainable params" in capsys.readouterr().out
    assert (tmp_path / "my-composition" / "model.safetensors").is_file()
