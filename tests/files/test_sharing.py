"""A composition goes to a hub and comes back, through huggingface_hub itself and a stand-in on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries

import calmlm
from calmlm import ConfigError, DataError
from calmlm.files.card import Learned, model_card
from calmlm.files.leaderboards import read_results, write_results
from compositions import assert_helpful, tiny_composition
from documents import ROOT
from hub import Hub, hub


def go(server: Hub, place: Path, taken: tuple[str, ...]) -> dict[str, Any]:
    """Run the user's program; what it asks to be taken from the hub goes when it waits."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(place / "home"),
        "HF_TOKEN": server.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
    }
    command = [sys.executable, str(ROOT / "tests" / "files" / "sharing.py"), str(place)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        if process.stdout.readline():
            for name in taken:
                del server.repositories[name]
        said, errors = process.communicate("go\n", timeout=200)
    assert process.returncode == 0, errors[-6000:]
    return json.loads(said.splitlines()[-1])


@pytest.mark.slow
def test_there_and_back(tmp_path: Path) -> None:
    with hub() as server:
        seen = go(server, tmp_path, ("them/big", "them/small"))
        first, second = server.files("me/first"), server.files("me/second")
        history = [message for _, message in server.repositories["me/first"].commits.values()]
        assert server.repositories["me/first"].private and not server.repositories["me/second"].private
        asked = list(server.seen)
    assert seen["address"].startswith(f"{server.url}/me/first/commit/")
    assert history == ["initial commit", "Upload a composition", "again"]
    assert all(len(revision) == 40 for revision in seen["revisions"])
    assert seen["equal"] == [True, True]
    assert seen["words"]
    assert seen["whole"] == [True, True, True]
    assert "POST /api/repos/create" in asked

    assert set(first) == {
        ".gitattributes", ".eval_results/openai_gsm8k_gsm8k_5-shot.yaml", "README.md", "alignment.law.json",
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    card = ModelCard(first["README.md"].decode())
    assert card.data.base_model == ["them/big", "them/small"]
    assert card.data.datasets == ["them/pairs"]
    assert card.data.library_name == "calmlm"
    for told in (
        *seen["revisions"],
        " → ",
        "words (pointer)",
        "them/pairs",
        "| openai/gsm8k | gsm8k | 0.4125 | 5-shot |",
    ):
        assert told in card.text, told
    (entry,) = parse_eval_result_entries(yaml.safe_load(first[".eval_results/openai_gsm8k_gsm8k_5-shot.yaml"]))
    assert entry == EvalResultEntry("openai/gsm8k", "gsm8k", 0.4125, notes="5-shot")

    text = second["README.md"].decode()
    assert "Made with care." in text and text.count("cais/hle") == 1 and "| cais/hle | hle | 3 |  |" in text
    assert {"tokenizer.json", "tokenizer_config.json", ".eval_results/cais_hle_hle.yaml"} <= set(second)
    assert str(tmp_path) not in text + second["config.json"].decode()

    mentions = ["them/big", "me/first", "me/third", "not a name", "'gsm8k'", "nan", "hub ids"]
    for (kind, message), mention in zip(seen["errors"], mentions, strict=True):
        error = getattr(calmlm, kind)(message)
        assert_helpful(error, mention)
        assert "secret" not in message


def test_results_in_a_folder(tmp_path: Path) -> None:
    score = EvalResultEntry("openai/gsm8k", "gsm8k", 0.5)
    with pytest.raises(ConfigError) as error:
        write_results(tmp_path, [score])
    assert_helpful(error.value, str(tmp_path))
    tiny_composition().save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    write_results(tmp_path, [])
    assert (tmp_path / "README.md").read_text() == before
    write_results(tmp_path, [score, EvalResultEntry("cais/hle", "hle", 1, notes="with tools")])
    write_results(tmp_path, [EvalResultEntry("openai/gsm8k", "gsm8k", 0.25)])
    assert [entry.value for entry in read_results(tmp_path)] == [1, 0.25]
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(before.rstrip())
    assert "| cais/hle | hle | 1 | with tools |" in text  # from before
    assert "| openai/gsm8k | gsm8k | 0.25 |  |" in text and "0.5" not in text.removeprefix(before.rstrip())
    for value in ("good", True, float("inf")):
        with pytest.raises(ConfigError, match="must be a number"):
            write_results(tmp_path, [EvalResultEntry("openai/gsm8k", "gsm8k", value)])
    (tmp_path / ".eval_results" / "cais_hle_hle_with_tools.yaml").write_text("- value: 1\n")
    with pytest.raises(DataError, match=r"cais_hle_hle_with_tools.yaml is none .*; remove it"):
        read_results(tmp_path)


def test_a_card_tells_of_the_training() -> None:
    learned = Learned(("them/pairs",), ("trained on `them/pairs` (split train)",), {"steps": "60"})
    card = ModelCard(model_card(tiny_composition().config, learned))
    assert card.data.datasets == ["them/pairs"]
    assert "- trained on `them/pairs` (split train)" in card.text
    assert "| steps | 60 |" in card.text
    assert "given in memory" in card.text
