"""``calmlm serve``: faults are told before anything is loaded, bases are loaded once, a signal lets answers end."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

import calmlm
from calmlm.cli import main
from calmlm.errors import CalmError
from calmlm.serving.catalogue import check_places, load, named
from calmlm.serving.last_words import end_quietly
from compositions import awaken
from served import expected, program, wait
from tiny import tiny_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, anchor_folder: Path, augmenting_folder: Path) -> dict[str, str]:
    """Two compositions of one pair, and one over another anchor."""
    root = tmp_path_factory.mktemp("compositions")
    other = root / "other-anchor"
    tiny_model("llama", seed=9).save_pretrained(other)
    places = {}
    for seed, (name, anchor) in enumerate((("one", anchor_folder), ("two", anchor_folder), ("three", other))):
        model = calmlm.compose(str(anchor), str(augmenting_folder), connections=2)
        awaken(model, seed=seed).save_pretrained(root / name / "composition")
        places[name] = str(root / name / "composition")
    return places


def fault(capsys: Capture, *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.strip().splitlines() if not line.startswith("Loading ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def test_faults_are_told_before_anything_is_loaded(
    capsys: Capture, folders: dict[str, str], anchor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calmlm.CalmForCausalLM, "from_pretrained", None)
    one, two = folders["one"], folders["two"]
    assert "write NAME=FOLDER" in fault(capsys, one, two)
    assert "write NAME=FOLDER" in fault(capsys, f"a={one}", f"a={two}")
    assert "the same anchor, but 'a' stands on anchor" in fault(capsys, f"a={one}", f"b={folders['three']}")
    assert "calmlm composition" in fault(capsys, str(anchor_folder))
    assert "config.json" in fault(capsys, str(tmp_path / "nothing"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another" in fault(capsys, one, "--port", str(taken.getsockname()[1]))
    assert "--host and --port" in fault(capsys, one, "--host", "no.such.host.invalid")
    assert "--api-key must" in fault(capsys, one, "--api-key", " ")
    assert "name another" in fault(capsys, one, "--tokenizer", str(tmp_path / "nothing"), "--port", "0")
    assert "use auto or cpu" in fault(capsys, one, "--device", "nonsense", "--port", "0")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in Path(one).iterdir():
        (linked / file.name).write_bytes(file.read_bytes())
    (linked / "tokenizer.json").symlink_to("/etc/hostname")
    assert "a link that leads out of it" in fault(capsys, str(linked))
    (linked / "tokenizer.json").unlink()
    (linked / "anchor").mkdir()
    (linked / "anchor" / "chat_template.jinja").symlink_to("/etc/hostname")
    assert "anchor/chat_template.jinja is a link that leads out of it" in fault(capsys, str(linked))


def test_only_safetensors_are_read(folders: dict[str, str], anchor_folder: Path, tmp_path: Path) -> None:
    """Weights that are pickled are refused, and what lies beside them is not looked at."""
    shutil.copytree(anchor_folder, tmp_path / "anchor")
    shutil.copytree(folders["one"], tmp_path / "composition")
    config = tmp_path / "composition" / "config.json"
    data = json.loads(config.read_text())
    data["anchor"]["id"] = "../anchor"
    config.write_text(json.dumps(data))
    places = {"one": str(tmp_path / "composition")}
    assert "anchor" in load(places, device="cpu").models
    weights = tmp_path / "anchor" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(CalmError, match=r"safetensors"):
        load(places, device="cpu")


def test_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lr=1" / "it").mkdir(parents=True)
    assert named(["~/lr=1/it", "b=~/lr=1/it"]) == {"it": f"{tmp_path}/lr=1/it", "b": f"{tmp_path}/lr=1/it"}
    assert named(["a=b", "runs/x", "org/model"]) == {"a": "b", "runs/x": "runs/x", "org/model": "org/model"}
    with pytest.raises(CalmError):
        named(["a=b", "a"])


def test_bases_are_loaded_once(folders: dict[str, str], anchor_folder: Path) -> None:
    places = {name: folders[name] for name in ("one", "two")}
    assert set(check_places(places)) == {"one", "two"}
    found = load(places, device="cpu")
    assert set(found.models) == {"one", "two", "anchor", "augmenting"}
    first, second = (found.models[name].lane.model for name in ("one", "two"))
    assert first.anchor is second.anchor is found.models["anchor"].lane.model
    assert first.augmenting["augmenting"] is second.augmenting["augmenting"]
    ids = list(range(5, 12))
    texts = [tuple(expected(model, ids, 8)) for model in (first, second, first.anchor)]
    assert len(set(texts)) == 3
    for name, text in zip(("one", "two"), texts, strict=False):
        assert expected(calmlm.CalmForCausalLM.from_pretrained(folders[name]), ids, 8) == list(text)
    assert load(places, device="cpu", max_tokens=20).models["one"].limit == 20
    merged = load(places, device="cpu", merge_adapters=True).models
    assert [merged[name].lane.model.model.merged for name in ("one", "two")] == [True, True]
    assert torch.equal(
        first.anchor.get_input_embeddings().weight,
        calmlm.CalmForCausalLM.from_pretrained(folders["one"]).anchor.get_input_embeddings().weight,
    )


def test_answers_that_are_given_up_at_the_end_leave_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    end_quietly()
    logger = logging.getLogger("uvicorn.error")
    for error in (asyncio.CancelledError("given up"), ValueError("a fault")):
        logger.error("Exception in ASGI application", exc_info=error)
    logger.error("Cancel %s running task(s), timeout graceful shutdown exceeded", 2)
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info] == [("a fault",)]
    assert len(caplog.records) == 1


@pytest.mark.slow
def test_a_signal_lets_answers_be_finished(folders: dict[str, str]) -> None:
    body: dict[str, Any] = {
        "model": "one",
        "prompt": "abc",
        "max_tokens": 120,
        "temperature": 0,
        "logit_bias": {"9": 100},
    }
    headers = {"Authorization": "Bearer key-of-the-test"}
    with (
        program(f"one={folders['one']}", CALMLM_API_KEY="key-of-the-test") as (process, url),
        httpx.Client() as waiting,
    ):
        assert waiting.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401

        def ask(stream: bool) -> str:
            answer = httpx.post(f"{url}/v1/completions", json={**body, "stream": stream}, headers=headers, timeout=60)
            assert answer.status_code == 200
            if not stream:
                return answer.json()["choices"][0]["text"]
            assert answer.text.endswith("data: [DONE]\n\n")
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            return "".join(event["choices"][0]["text"] for event in events)

        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, place % 2 == 0) for place in range(8)]
            wait(lambda: "calmlm:num_requests_running 8.0" in waiting.get(f"{url}/metrics").text)
            process.send_signal(signal.SIGTERM)
            wait(lambda: waiting.get(f"{url}/health").status_code == 503)
            refused = waiting.post(f"{url}/v1/completions", json=body, headers=headers)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
            texts = {one.result() for one in asked}
        assert len(texts) == 1 and len(texts.pop()) == 120
        begun = time.monotonic()
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - begun < 10
        assert process.stderr is not None
        said = process.stderr.read()
        assert "key-of-the-test" not in said and "Traceback" not in said
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
