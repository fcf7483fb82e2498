"""Replicas on Ray Serve: one that is killed loses no answer, and nothing is left of a server that has ended."""

from __future__ import annotations

import asyncio
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
from ray.exceptions import ActorDiedError

import calmlm
from calmlm.cli import main
from calmlm.data import extras
from calmlm.serving import deploying, fleet
from calmlm.serving.desk import Part, Start
from calmlm.serving.fleet import Fleet
from calmlm.serving.protocol import CompletionRequest
from calmlm.serving.refusals import RefusalError
from compositions import awaken
from served import PROMPTS, command, expected, program, wait

NEW = 90
BIAS = {"2": -100}  # no text ends by itself
FULL = RefusalError(429, "Full.", code="queue_full")


@pytest.fixture(scope="module")
def composition(tmp_path_factory: pytest.TempPathFactory, anchor_folder: Path, augmenting_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("composition") / "one"
    awaken(calmlm.compose(str(anchor_folder), str(augmenting_folder), connections=2)).save_pretrained(folder)
    return folder


# What the desk makes of what replicas tell


class Call:
    """An answer of one replica's: what it tells, an error perhaps."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.cancelled = iter(script), False

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        entry = next(self.script, None)
        if entry is None:
            raise StopAsyncIteration
        if isinstance(entry, ActorDiedError):
            raise entry
        return entry

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Stands for a deployment: each call gets the next script."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.calls, self.asked = [Call(script) for script in scripts], list[CompletionRequest]()

    def options(self, **_given: Any) -> Handle:
        return self

    def remote(self, asked: CompletionRequest) -> Call:
        self.asked.append(asked)
        return self.calls[len(self.asked) - 1]


def parts(*texts: str, end: bool = False) -> list[Part]:
    last = len(texts) - 1
    return [Part(0, text, ord(text), 0, "stop" if end and place == last else None) for place, text in enumerate(texts)]


START, DEAD = Start("one", (3,), 1), ActorDiedError()


def told(handle: Handle, *, stream: bool = True) -> str:
    """The text that a client is told."""
    desk = Fleet(handle, {"one": 128}, 2, 8, lambda: 2)
    asked = CompletionRequest(model="one", prompt="abc", stream=stream)

    async def run() -> list[Any]:
        gone = asyncio.get_running_loop().create_future()
        return [entry async for entry in desk.write(asked, gone)]

    found = asyncio.run(run())
    assert desk.idle.is_set()
    assert found[0] == START and found.count(START) == 1
    return "".join(part.text for entry in found[1:] for part in entry)


def test_what_is_written_again_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PAUSE", 0)
    lost = [START, parts("a"), parts("b", "c"), DEAD]
    again = [START, parts("a", "b"), parts("c", "d"), parts("e", end=True)]
    for stream in (True, False):
        handle = Handle(lost, [DEAD], [START, parts("a")], again)  # the third ends before its text does
        assert told(handle, stream=stream) == "abcde"
        assert len(handle.asked) == 4
        assert handle.asked[0].seed is not None and len({asked.seed for asked in handle.asked}) == 1
    other = [START, parts("a", "b"), parts("x", "d"), parts("e", end=True)]
    with pytest.raises(RefusalError, match="writes it otherwise") as found:
        told(Handle(lost, other))
    assert (found.value.status, found.value.code) == (503, "replica_lost")
    assert told(Handle(lost, other), stream=False) == "abxde"  # nobody had been told another text
    handle = Handle(*[[START, DEAD]] * 5)
    with pytest.raises(RefusalError, match="lost with 4 replicas"):
        told(handle)
    assert len(handle.asked) == fleet.RETRIES + 1


def test_a_replica_that_is_full_leads_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PAUSE", 0)
    whole = [START, parts("a", end=True)]
    assert told(Handle([FULL], whole)) == "a"
    with pytest.raises(RefusalError) as found:
        told(Handle([FULL], [FULL], whole))
    assert found.value is FULL
    assert told(Handle([DEAD], *[[FULL]] * 5, whole)) == "a"  # what was accepted waits
    wrong = RefusalError(400, "Wrong.")
    with pytest.raises(RefusalError) as found:
        told(Handle([wrong], whole))
    assert found.value is wrong


def test_a_client_that_goes_is_waited_for_no_more() -> None:
    handle = Handle([START, *[parts("a")] * 1000])
    desk = Fleet(handle, {"one": 128}, 2, 8, lambda: 2)

    async def run() -> None:
        gone = asyncio.get_running_loop().create_future()
        answer = desk.write(CompletionRequest(model="one", prompt="abc", stream=True), gone)
        await anext(answer)
        await anext(answer)
        assert not desk.idle.is_set()
        desk.drain()
        with pytest.raises(RefusalError, match="shutting down"):
            await anext(desk.write(CompletionRequest(model="one", prompt="abc"), gone))
        assert not desk.idle.is_set()
        await answer.aclose()

    asyncio.run(run())
    assert handle.calls[0].cancelled and desk.idle.is_set()


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


# Real replicas


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
            for _ in range(2):
                wait(lambda: len(figure(url, "num_requests_running")) == 2, 60)
                wait(lambda: min(figure(url, "num_requests_running").values()) >= 2, 60)
                victim = min(replicas(process).values(), key=lambda replica: replica.create_time())
                victim.send_signal(signal.SIGKILL)
                victim.wait(timeout=10)
                wait(lambda: len(replicas(process)) == 2, 60)
                wait(lambda: len(figure(url, "num_requests_running")) == 2, 60)
            time.sleep(2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not wrong, wrong[:3]
    assert len(answers) > 16
    assert sum(figure(url, "request_retries_total").values()) >= 2
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.slow
def test_a_signal_lets_replicas_finish(composition: Path, wanted: dict[str, str]) -> None:
    with program(f"one={composition}", "--replicas", "2", "--api-key", "key-of-the-test") as (process, url):
        below = psutil.Process(process.pid).children(recursive=True)
        with client_of(url) as client, ThreadPoolExecutor(8) as pool:
            asked = [(PROMPTS[place % len(PROMPTS)], place % 2 == 0) for place in range(8)]
            found = [pool.submit(ask, client, prompt, stream=stream, temperature=0) for prompt, stream in asked]
            wait(lambda: sum(figure(url, "num_requests_running").values()) == 8)
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
