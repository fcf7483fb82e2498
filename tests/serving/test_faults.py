"""What is wrong with a request is told in OpenAI's shape and costs nobody else anything; a client that goes frees its
place."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from calmlm.serving import batching
from calmlm.serving.catalogue import Catalogue
from calmlm.serving.engine import Engine
from calmlm.serving.protocol import CompletionRequest
from calmlm.serving.requests import find, make_job
from calmlm.serving.writing import Writing
from compositions import tiny_composition
from served import PROMPTS, catalogue, expected, running, serving, wait
from tiny import tiny_tokenizer

TEXT = {"model": "one", "prompt": "abc", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "one", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
ENDLESS = {"logit_bias": {"9": 100}}  # a token that does not end a text


@pytest.fixture(scope="module")
def served() -> Catalogue:
    return catalogue()


@pytest.fixture(scope="module")
def server(served: Catalogue) -> Iterator[tuple[str, Engine]]:
    with serving(served, max_batch=4, max_queue=4, max_body=20_000) as found:
        yield found


def fault(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The message of an error, which has the right shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert error["message"].endswith(".")
    return error["message"]


WRONG: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    ("completions", {"model": "three"}, 404, "model", "model_not_found"),
    ("completions", {"model": "../../etc"}, 404, "model", "model_not_found"),
    ("completions", {"model": None}, 400, "model", None),
    ("completions", {"prompt": {"a": 1}}, 400, "prompt", None),
    ("completions", {"prompt": ""}, 400, "prompt", None),
    ("completions", {"prompt": []}, 400, "prompt", None),
    ("completions", {"prompt": [97]}, 400, "prompt", None),
    ("completions", {"prompt": [-1]}, 400, "prompt", None),
    ("completions", {"prompt": "\ud800"}, 400, "prompt", None),
    ("completions", {"prompt": "a" * 128}, 400, "prompt", "context_length_exceeded"),
    ("completions", {"max_tokens": 126}, 400, "max_tokens", "context_length_exceeded"),
    ("completions", {"max_tokens": 0}, 400, "max_tokens", None),
    ("completions", {"max_tokens": "many"}, 400, "max_tokens", None),
    ("completions", {"temperature": -1}, 400, "temperature", None),
    ("completions", {"temperature": float("nan")}, 400, "temperature", None),
    ("completions", {"top_p": 1.5}, 400, "top_p", None),
    ("completions", {"n": 0}, 400, "n", None),
    ("completions", {"n": 9}, 400, "n", None),
    ("completions", {"stop": ["a"] * 5}, 400, "stop", None),
    ("completions", {"stop": ""}, 400, "stop", None),
    ("completions", {"logprobs": 21}, 400, "logprobs", None),
    ("completions", {"echo": True}, 400, "echo", None),
    ("completions", {"seed": 2**70}, 400, "seed", None),
    ("completions", {"logit_bias": {"a": 1}}, 400, "logit_bias", None),
    ("completions", {"logit_bias": {"97": 1}}, 400, "logit_bias", None),
    ("completions", {"stream_options": {"include_usage": True}}, 400, "stream_options", None),
    ("completions", {"response_format": {"type": "json_schema"}}, 400, "response_format", None),
    ("chat/completions", {"messages": []}, 400, "messages", None),
    ("chat/completions", {"messages": "hi"}, 400, "messages", None),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", None),
    ("chat/completions", {"messages": [{"role": "user", "content": "\udfff"}]}, 400, "messages", None),
    ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", None),
    ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools", None),
    ("chat/completions", {"max_completion_tokens": 1000}, 400, "max_completion_tokens", "context_length_exceeded"),
]


@pytest.mark.parametrize(("route", "change", "status", "param", "code"), WRONG)
def test_wrong_requests(
    server: tuple[str, Engine], route: str, change: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    body = json.dumps({**(CHAT if "chat" in route else TEXT), **change})
    found = httpx.post(f"{server[0]}/v1/{route}", content=body, headers={"Content-Type": "application/json"})
    fault(found, status, param, code)


def test_bodies_that_are_no_requests(server: tuple[str, Engine]) -> None:
    url = f"{server[0]}/v1/completions"
    headers = {"Content-Type": "application/json"}
    assert "JSON" in fault(httpx.post(url, content=b"{", headers=headers), 400)
    for content in (b"", b"[]", b"null", b"\xff\xfe", b"[" * 9000):
        assert httpx.post(url, content=content, headers=headers).status_code == 400
    assert httpx.post(url, content=b"a=b").status_code == 400
    assert "20000 bytes" in fault(httpx.post(url, json={**TEXT, "x": "a" * 20_000}), 413, code="too_large")
    parts = (b"a" * 1000 for _ in range(30))
    fault(httpx.post(url, content=parts, headers=headers), 413, code="too_large")
    fault(httpx.get(url), 405)
    fault(httpx.get(f"{server[0]}/v1/nothing"), 404)
    fault(httpx.get(f"{server[0]}/v1/models/three"), 404, "model", "model_not_found")
    assert httpx.post(url, json=TEXT).status_code == 200


def test_a_base_model_without_a_chat_template() -> None:
    words = tiny_tokenizer(chat_template=None)
    with serving(Catalogue({"one": tiny_composition()}, words)) as (url, _):
        message = fault(httpx.post(f"{url}/v1/chat/completions", json=CHAT), 400, "messages")
        assert "/v1/completions" in message
        assert httpx.post(f"{url}/v1/completions", json=TEXT).status_code == 200


def test_a_chat_template_that_refuses() -> None:
    words = tiny_tokenizer(chat_template="{{ raise_exception('only one voice') }}")
    with serving(Catalogue({"one": tiny_composition()}, words)) as (url, _):
        message = fault(httpx.post(f"{url}/v1/chat/completions", json=CHAT), 400, "messages")
        assert "only one voice" in message


def test_keys(served: Catalogue, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), serving(served, api_key="se-cret") as (url, _):
        wrong = [{"Authorization": "Bearer other"}, {"Authorization": "Basic se-cret"}, {"api-key": "se-cret"}, {}]
        paths = [("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/x")]
        for headers in wrong:
            for method, path in paths:
                body = "a" * 50 if method == "POST" else None
                fault(httpx.request(method, url + path, headers=headers, content=body), 401, code="invalid_api_key")
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/metrics").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="se-cret") as client:
            assert client.completions.create(**TEXT).choices[0].text  # type: ignore[call-overload]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
    assert "se-cret" not in caplog.text


def test_more_than_fit_are_refused(server: tuple[str, Engine], served: Catalogue) -> None:
    """With four places and four that wait, a ninth text gets 429, and the others their answers."""
    url, engine = server
    lane = served.models["one"].lane
    given = {**TEXT, "n": 8, "max_tokens": 100, **ENDLESS}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: httpx.post(f"{url}/v1/completions", json=given, timeout=60))
        wait(lambda: engine.full or first.done())
        assert not first.done()
        fault(httpx.post(f"{url}/v1/completions", json=TEXT), 429, code="queue_full")
        texts = {choice["text"] for choice in first.result().json()["choices"]}
    assert len(texts) == 1 and lane is not None


def test_a_client_that_goes_frees_its_place(server: tuple[str, Engine]) -> None:
    url, engine = server
    sample = engine.metrics.registry.get_sample_value
    long = {**TEXT, **ENDLESS, "max_tokens": 120}
    for stream in (True, False):
        for _ in range(3):
            before = sample("calmlm:e2e_request_latency_seconds_count", {"model_name": "one"})
            address = url.removeprefix("http://").split(":")
            with socket.create_connection((address[0], int(address[1]))) as connection:
                body = json.dumps({**long, "stream": stream}).encode()
                head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
                connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
                if stream:
                    assert b"200 OK" in connection.recv(4096)
                else:
                    wait(lambda: running(engine) == 1)
            wait(lambda: running(engine) == 0)
            assert sample("calmlm:e2e_request_latency_seconds_count", {"model_name": "one"}) == before
    assert httpx.post(f"{url}/v1/completions", json=TEXT).status_code == 200


def test_a_step_that_fails_is_read_again(served: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other texts are written on, and are what they are alone."""
    model, lane, words = served.models["one"].lane.model, served.models["one"].lane, served.models["one"].tokenizer
    read, calls = lane.read, []

    def faulty(ids: torch.Tensor, *given: Any) -> Any:
        calls.append(len(ids))
        if len(ids) > 1 and len(calls) % 2:
            raise RuntimeError("out of memory, say")
        if bool((ids == words("#").input_ids[0]).any()):
            raise RuntimeError("never")
        return read(ids, *given)

    monkeypatch.setattr(lane, "read", faulty)
    with serving(served) as (url, _), ThreadPoolExecutor(8) as pool:
        asked = [*PROMPTS, "a#"]
        found = list(pool.map(lambda p: httpx.post(f"{url}/v1/completions", json={**TEXT, "prompt": p}), asked))
    assert fault(found[-1], 500) and "memory" not in found[-1].text
    for prompt, response in zip(PROMPTS, found, strict=False):
        alone = words.decode(expected(model, words(prompt).input_ids, 4), skip_special_tokens=True)
        assert response.json()["choices"][0]["text"] == alone


def test_a_batch_that_cannot_be_joined_is_written_apart(served: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = served.models["one"].lane.model, served.models["one"].tokenizer
    tried = []

    def fail(*_given: Any) -> None:
        tried.append(1)
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(batching, "concatenate", fail)
    with serving(served) as (url, _), ThreadPoolExecutor(8) as pool:
        ask = lambda prompt: httpx.post(f"{url}/v1/completions", json={**TEXT, "prompt": prompt, "max_tokens": 20})  # noqa: E731
        found = list(pool.map(ask, PROMPTS))
    assert tried
    for prompt, response in zip(PROMPTS, found, strict=True):
        alone = words.decode(expected(model, words(prompt).input_ids, 20), skip_special_tokens=True)
        assert response.json()["choices"][0]["text"] == alone


@torch.no_grad()
def test_a_text_that_is_written_apart_stays_apart(served: Catalogue) -> None:
    """Others would be too much for it again. No text may end at its first token, which is drawn."""
    engine, made = Engine(8, 8, 128), list[Writing]()
    ends = [str(token) for token in find(served, "one").ends]
    for prompt in ("abc", "def"):
        asked = CompletionRequest(model="one", prompt=prompt, logit_bias=dict.fromkeys(ends, -100.0))
        made += make_job(served, asked, lambda _place, _piece: None, 8).writings
    engine._read_apart(made[:1])
    engine._read_on(*engine._readings[0])
    engine._begin(made[1:])
    engine._read_on(*engine._readings[0])
    assert [writings for _, writings in engine._batches] == [[made[0]], [made[1]]]


def test_response_format_names_the_extra(server: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    from calmlm.data import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    body = {**TEXT, "response_format": {"type": "json_object"}}
    found = httpx.post(f"{server[0]}/v1/completions", json=body)
    assert "calmlm[structured]" in fault(found, 400, "response_format")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nothing_that_the_document_allows_makes_it_fail(server: tuple[str, Engine]) -> None:
    """Requests made from the server's own OpenAPI document, right and wrong, never end in a 5xx."""
    url, engine = server
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses = []

    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "one"  # no other name would come further than to 404
        response = case.call(base_url=url, timeout=60)
        statuses.append(response.status_code)
        assert response.status_code < 500, (case.path, case.body, response.text)

    every = settings(
        max_examples=60,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    for operation in schema.get_all_operations():
        for mode in GenerationMode:
            with suppress(Unsatisfiable):  # nothing can be wrong with a request that has no parts
                every(given(case=operation.ok().as_strategy(generation_mode=mode))(check))()
    assert {200, 400} <= set(statuses) and len(statuses) > 200
    wait(lambda: running(engine) == 0)


def test_nulls_are_defaults_and_limits_are_named(server: tuple[str, Engine]) -> None:
    url, _ = server
    nulls = {"n": None, "stream": None, "presence_penalty": None, "frequency_penalty": None, "stop": None}
    for path, asked, more in (("completions", TEXT, {"suffix": ""}), ("chat/completions", CHAT, {"logprobs": None})):
        plain, given = (httpx.post(f"{url}/v1/{path}", json={**asked, **extra}).json() for extra in ({}, nulls | more))
        assert given["choices"] == plain["choices"]
    for changed, told in (
        ({"stop": ["a"] * 5}, "at most 4 strings are taken, but got 5"),
        ({"stop": 3}, "one string or several"),
        ({"tools": [{"type": "function"}]}, "no tools are called here; leave them out"),
    ):
        response = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **changed})
        assert told in fault(response, 400, next(iter(changed)))
