"""Replicas on Ray Serve: one that is killed loses no answer, and nothing is left of a server that has ended."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

import calmlm
from calmlm.cli import main
from calmlm.data import extras
from calmlm.serving import deploying
from compositions import awaken
from served import PROMPTS, command, expected, program, wait

NEW = 90
BACK = 240  # seconds in which a replica is back, on a machine that does much else besides
BIAS = {"2": -100}  # no text ends by itself


@pytest.fixture(scope="module")
def composition(tmp_path_factory: pytest.TempPathFactory, anchor_folder: Path, augmenting_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("composition") / "one"
    awaken(calmlm.compose(str(anchor_folder), str(augmenting_folder), connections=2)).save_pretrained(folder)
    return folder


def test_faults_at_the_start(
    capsys: pytest.CaptureFixture[str], composition: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*arguments: str) -> str:
        assert main(["serve", *arguments, "--port", "0"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    one = f"one={composition}"
    monkeypatch.setattr(deploying, "REACH", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert f"'127.0.0.1:{port}' cannot (no answer within" in fault(one, "--ray-address", f"127.0.0.1:{port}")
    assert "--ray-address auto" in fault(one, "--ray-address", "ray://127.0.0.1:10001")
    assert "'--replicas'" in fault(one, "--replicas", "0")
    assert "config.json" in fault(str(tmp_path / "nothing"), "--replicas", "2")
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "ray" else name)
    assert "calmlm[ray]" in fault(one, "--replicas", "2")


def replicas(process: int) -> dict[int, psutil.Process]:
    """The processes of the replicas below another one."""
    found = {}
    for child in psutil.Process(process).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::ServeReplica"):
                found[child.pid] = child
        except psutil.Error:
            continue
    return found


def figure(url: str, name: str) -> dict[str, float]:
    """A figure by replica."""
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(f"calmlm:{name}")]
    return {line.partition('replica="')[2].partition('"')[0]: float(line.split()[-1]) for line in lines}


def arrived(url: str) -> float:
    """Requests that the engines write, or have written."""
    return sum(
        sum(figure(url, name).values()) for name in ("num_requests_running", "e2e_request_latency_seconds_count")
    )


@pytest.fixture(scope="module")
def server(composition: Path) -> Iterator[tuple[str, int]]:
    given = (f"one={composition}", "--replicas", "2", "--max-batch", "8", "--max-queue", "8")
    with program(*given, CALMLM_API_KEY="key-of-the-test") as (process, url):
        yield url, process.pid


@pytest.fixture(scope="module")
def wanted(composition: Path) -> dict[str, str]:
    """What ``generate`` writes behind each prompt."""
    model = calmlm.CalmForCausalLM.from_pretrained(composition)
    words = calmlm.serving.catalogue.load({"one": str(composition)}, device="cpu").models["one"].tokenizer
    return {
        prompt: words.decode(
            expected(model, words(prompt).input_ids, NEW, suppress_tokens=[2]), skip_special_tokens=True
        )
        for prompt in PROMPTS
    }


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="key-of-the-test", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, prompt: str, *, stream: bool, **options: Any) -> str:
    """One answer, which is whole."""
    given: Any = {"model": "one", "prompt": prompt, "max_tokens": NEW, "logit_bias": BIAS, **options}
    if not stream:
        answer = client.completions.create(**given)
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", NEW)
        return answer.choices[0].text
    events = list(client.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert events[-1].usage.completion_tokens == NEW
    assert events[-2].choices[0].finish_reason == "length"
    return "".join(event.choices[0].text for event in events[:-1])


@pytest.mark.slow
def test_answers_are_those_of_generate(server: tuple[str, int], wanted: dict[str, str]) -> None:
    url, process = server
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/v1/models").status_code == 401
    for replica in replicas(process).values():
        assert "key-of-the-test" not in str(replica.environ())
    with client_of(url) as client, ThreadPoolExecutor(8) as pool:
        assert {model.id for model in client.models.list()} == {"one", "anchor", "augmenting"}
        asked = [(prompt, stream) for prompt in PROMPTS for stream in (True, False)] * 2
        found = list(pool.map(lambda pair: ask(client, pair[0], stream=pair[1], temperature=0), asked))
        assert found == [wanted[prompt] for prompt, _ in asked]
        assert all(count > 0 for count in figure(url, "generation_tokens_total").values())
        assert len(figure(url, "num_requests_running")) == 2
        said = client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=4, logprobs=True
        )
        assert said.choices[0].logprobs.content
        tokens = httpx.post(
            f"{url}/tokenize",
            json={"model": "one", "prompt": "abc"},
            headers={"Authorization": f"Bearer {client.api_key}"},
        )
        assert tokens.json()["count"] == 3
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="three", prompt="a")
        with pytest.raises(openai.BadRequestError, match="at least one token"):
            list(client.completions.create(model="one", prompt="", stream=True))


@pytest.mark.slow
def test_a_client_that_goes_frees_its_place(server: tuple[str, int]) -> None:
    url, _ = server
    ended = figure(url, "e2e_request_latency_seconds_count")
    body = json.dumps({"model": "one", "prompt": "abc", "max_tokens": 120, "logit_bias": BIAS, "stream": True}).encode()
    head = "Host: x\r\nAuthorization: Bearer key-of-the-test\r\nContent-Type: application/json\r\n"
    address = url.removeprefix("http://").split(":")
    for _ in range(4):
        with socket.create_connection((address[0], int(address[1]))) as connection:
            length = f"Content-Length: {len(body)}\r\n\r\n"
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}{length}".encode() + body)
            assert b"200 OK" in connection.recv(4096)
        wait(lambda: sum(figure(url, "num_requests_running").values()) == 0)
    assert figure(url, "e2e_request_latency_seconds_count") == ended


@pytest.mark.slow
def test_no_more_than_all_replicas_take(server: tuple[str, int]) -> None:
    url, _ = server
    with client_of(url) as client, ThreadPoolExecutor(2) as pool:
        most = {"model": "one", "prompt": "abc", "max_tokens": 120, "logit_bias": BIAS, "n": 16}
        first = [pool.submit(client.completions.create, **most) for _ in range(2)]
        wait(lambda: sum(figure(url, "num_requests_running").values()) == 16)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="one", prompt="abc")
        assert all(len(one.result().choices) == 16 for one in first)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_replica_loses_no_answer(server: tuple[str, int], wanted: dict[str, str]) -> None:
    url, process = server
    stop, wrong, answers = threading.Event(), list[Any](), list[str]()
    drawn = {"temperature": 1.0, "seed": 5}

    def load(number: int) -> None:
        chance = random.Random(number)
        while not stop.is_set():
            prompt = chance.choice(PROMPTS)
            try:
                if number == 0:  # without a seed, nobody knows the text; its end was looked at
                    ask(client, prompt, stream=True, temperature=1.0)
                elif number == 1:
                    answers.append(ask(client, PROMPTS[0], stream=True, **drawn))
                    assert answers[-1] == with_seed
                else:
                    answers.append(ask(client, prompt, stream=number % 2 == 0, temperature=0))
                    assert answers[-1] == wanted[prompt]
            except Exception as error:
                wrong.append(error)

    with client_of(url) as client:
        with_seed = ask(client, PROMPTS[0], stream=False, **drawn)
        threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        try:
            wait(lambda: min(figure(url, "num_requests_running").values()) >= 2, 60)
            victim = min(replicas(process).values(), key=lambda replica: replica.create_time())
            victim.send_signal(signal.SIGKILL)
            victim.wait(timeout=10)
            wait(lambda: len(replicas(process)) == 2, BACK)
            wait(lambda: len(figure(url, "num_requests_running")) == 2, BACK)
            time.sleep(2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not wrong, wrong[:3]
    assert len(answers) > 16
    assert sum(figure(url, "request_retries_total").values()) >= 1
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.slow
def test_a_signal_lets_replicas_finish(composition: Path, wanted: dict[str, str]) -> None:
    with program(f"one={composition}", "--replicas", "2", "--api-key", "key-of-the-test") as (process, url):
        below = psutil.Process(process.pid).children(recursive=True)
        with client_of(url) as client, ThreadPoolExecutor(8) as pool:
            asked = [(PROMPTS[place % len(PROMPTS)], place % 2 == 0) for place in range(8)]
            found = [pool.submit(ask, client, prompt, stream=stream, temperature=0) for prompt, stream in asked]
            wait(lambda: arrived(url) == 8)
            process.send_signal(signal.SIGTERM)
            wait(lambda: httpx.get(f"{url}/health").status_code == 503)
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                client.completions.create(model="one", prompt="abc")
            assert [one.result() for one in found] == [wanted[prompt] for prompt, _ in asked]
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        said = process.stderr.read()
        assert said.strip() == "All that was accepted is answered."
        assert not psutil.wait_procs(below, timeout=10)[1]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster that asks for a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    place = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # or else others would find it; paths of sockets must be short
    monkeypatch.setenv("RAY_TMPDIR", place)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, other = one.getsockname()[1], two.getsockname()[1]
    given = ["--num-cpus", "2", "--object-store-memory", str(10**8), "--include-dashboard", "false", "--block"]
    given += ["--port", str(port), "--ray-client-server-port", str(other), "--disable-usage-stats"]
    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert ray is not None
    head = subprocess.Popen(
        [ray, "start", "--head", "--node-ip-address", "127.0.0.1", *given],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        for left in [*psutil.Process(head.pid).children(recursive=True), head]:
            left.kill()
        head.wait(timeout=30)
        shutil.rmtree(place, ignore_errors=True)


STATE = """
import sys, ray
from ray import serve
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
print(ray._private.state.state.job_table(), ray._private.state.actors(), serve.status())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster(cluster: str, composition: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are not in its state, and nothing is left in it, however a server ends."""
    given = (f"one={composition}", "--replicas", "2", "--ray-address", cluster, "--api-key", "key-of-the-test")

    def state() -> str:
        found = subprocess.run([sys.executable, "-c", STATE, cluster], capture_output=True, text=True, timeout=120)
        return found.stdout

    wait(lambda: "NodeManagerAddress" in state() or "JobID" in state(), 60)
    for end in (signal.SIGTERM, signal.SIGKILL):
        with program(*given) as (process, url), client_of(url) as client:
            assert ask(client, PROMPTS[0], stream=True, temperature=0) == wanted[PROMPTS[0]]
            found = state()
            assert "'calmlm serve'" in found and "key-of-the-test" not in found and "RUNNING" in found
            process.send_signal(end)
            process.wait(timeout=60)
            wait(lambda: "DeploymentStatusOverview" not in state(), 60)
    monkeypatch.delenv("RAY_AUTH_MODE")
    found = subprocess.run(command(*given), capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and "set RAY_AUTH_MODE=token" in found.stderr


@pytest.mark.slow
def test_a_signal_ends_a_start(composition: Path) -> None:
    given = command(f"one={composition}", "--replicas", "1")
    process = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait(lambda: replicas(process.pid), 120)
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said) == (128 + signal.SIGTERM, "")
    assert not psutil.wait_procs(below, timeout=10)[1]


@pytest.mark.slow
def test_a_replica_that_cannot_load_ends_the_start(composition: Path) -> None:
    given = command(f"one={composition}", "--replicas", "2", "--tokenizer", "no/such-tokenizer")
    found = subprocess.run(given, capture_output=True, text=True, timeout=200)
    assert found.returncode == 2
    assert found.stdout == "" and len(found.stderr.splitlines()) == 1
    assert "each replica must load" in found.stderr.lower() and "no/such-tokenizer" in found.stderr
