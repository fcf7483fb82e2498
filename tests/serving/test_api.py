"""The official client drives every route; answers are those of ``generate``, alone and among others."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

import calmlm
from calmlm.serving.catalogue import Catalogue
from calmlm.serving.engine import Engine
from calmlm.serving.grammar import SchemaWriter
from compositions import assert_helpful, own, tiny_composition
from served import PROMPTS, catalogue, expected, running, serving, wait
from tokenizers_tiny import AWKWARD, tokenizer

NEW = 10


@pytest.fixture(scope="module")
def served() -> Catalogue:
    return catalogue()


@pytest.fixture(scope="module")
def server(served: Catalogue) -> Iterator[tuple[str, Engine]]:
    with serving(served) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[str, Engine]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def wanted(served: Catalogue, name: str, prompt: str, count: int = NEW) -> str:
    """What ``generate`` writes behind a prompt."""
    lane, words = served.models[name].lane, served.models[name].tokenizer
    return words.decode(expected(lane.model, words(prompt).input_ids, count), skip_special_tokens=True)


def test_a_completion(client: openai.OpenAI, served: Catalogue) -> None:
    found = client.completions.create(model="one", prompt=PROMPTS[0], max_tokens=NEW, temperature=0)
    assert found.choices[0].text == wanted(served, "one", PROMPTS[0])
    assert found.choices[0].finish_reason in ("length", "stop")
    assert found.usage and found.usage.prompt_tokens == len(PROMPTS[0])
    assert found.usage.completion_tokens <= NEW
    ids = served.models["one"].tokenizer(PROMPTS[0]).input_ids
    again = client.completions.create(model="one", prompt=ids, max_tokens=NEW, temperature=0)
    assert again.choices[0].text == found.choices[0].text
    several = client.completions.create(model="one", prompt=PROMPTS, max_tokens=NEW, temperature=0)
    assert [choice.index for choice in several.choices] == list(range(len(PROMPTS)))
    assert [choice.text for choice in several.choices] == [wanted(served, "one", prompt) for prompt in PROMPTS]


def test_a_chat_completion(client: openai.OpenAI, served: Catalogue) -> None:
    said: Any = [{"role": "user", "content": "who are you?"}]
    words = served.models["two"].tokenizer
    ids = words.apply_chat_template(said, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
    new = expected(served.models["two"].lane.model, ids, NEW)
    text = words.decode(new, skip_special_tokens=True)
    found = client.chat.completions.create(model="two", messages=said, max_completion_tokens=NEW, temperature=0)
    assert found.choices[0].message.content == text
    assert found.choices[0].message.role == "assistant"
    assert found.usage and found.usage.prompt_tokens == len(ids) and found.usage.completion_tokens == len(new)
    said[0]["content"] = [{"type": "text", "text": "who are "}, {"type": "text", "text": "you?"}]
    parts = client.chat.completions.create(model="two", messages=said, max_tokens=NEW, temperature=0)
    assert parts.choices[0].message.content == text
    stream = client.chat.completions.create(
        model="two", messages=said, max_tokens=NEW, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events[:-1]) == text
    assert [event.choices[0].finish_reason for event in events[:-2]] == [None] * (len(events) - 2)
    assert events[-2].choices[0].finish_reason == found.choices[0].finish_reason
    assert events[-1].choices == [] and events[-1].usage == found.usage


def test_each_model_of_the_catalogue(client: openai.OpenAI, served: Catalogue) -> None:
    names = ["one", "two", "anchor", "small"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("two").id == "two"
    texts = {}
    for name in names:
        found = client.completions.create(model=name, prompt=PROMPTS[2], max_tokens=NEW, temperature=0)
        texts[name] = found.choices[0].text
        assert texts[name] == wanted(served, name, PROMPTS[2])
    assert len(set(texts.values())) == 4


@pytest.mark.parametrize("kind", ["joined", "read apart", "decoded apart"])
def test_many_at_a_time_are_what_each_is_alone(
    client: openai.OpenAI, served: Catalogue, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than fit into a batch, of all models, whole and as streams; also where models cannot share a batch."""
    for model in served.models.values():
        monkeypatch.setattr(model.lane, "pads", kind == "joined")
        monkeypatch.setattr(model.lane, "joins", kind != "decoded apart")
    asked = [(name, prompt) for prompt in PROMPTS for name in ("one", "two", "anchor", "small")]
    alone = [wanted(served, name, prompt, 4 + place % 7) for place, (name, prompt) in enumerate(asked)]

    def ask(place: int) -> str:
        name, prompt = asked[place]
        given: Any = {"model": name, "prompt": prompt, "max_tokens": 4 + place % 7, "temperature": 0}
        if place % 2:
            return client.completions.create(**given).choices[0].text
        return "".join(event.choices[0].text for event in client.completions.create(**given, stream=True))

    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(ask, range(len(asked)))) == alone


@pytest.mark.filterwarnings("ignore:.*tokens that reach across:UserWarning")
@pytest.mark.parametrize("alignment", ["own", "transcode"])
def test_other_tokenizers(alignment: str) -> None:
    """Several bytes of a character in a token of their own; nothing of a character is ever shown alone."""
    words = tokenizer("bytes-large")
    model = tiny_composition("llama", "gpt2", alignment=alignment, **own("sentencepiece", "bytes-large"))
    served = Catalogue({"own": model}, words)
    prompts = [text for text in AWKWARD if text][:6]
    alone = [words.decode(expected(model, words(text).input_ids, NEW), skip_special_tokens=True) for text in prompts]
    with serving(served) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:

        def ask(prompt: str) -> list[str]:
            stream = client.completions.create(model="own", prompt=prompt, max_tokens=NEW, temperature=0, stream=True)
            return [event.choices[0].text for event in stream]

        with ThreadPoolExecutor(len(prompts)) as pool:
            pieces = list(pool.map(ask, prompts))
    assert ["".join(one) for one in pieces] == alone
    assert not any(piece.endswith("\ufffd") for one in pieces for piece in one[:-1])


def test_stop_strings_span_tokens_and_are_left_out(client: openai.OpenAI, served: Catalogue) -> None:
    text = wanted(served, "one", PROMPTS[0], 30)
    stop = text[5:8]
    for stream in (False, True):
        given: Any = {"model": "one", "prompt": PROMPTS[0], "max_tokens": 30, "temperature": 0, "stop": ["\x00", stop]}
        found: Any = client.completions.create(**given, stream=stream)
        events = list(found) if stream else [found]
        assert "".join(event.choices[0].text for event in events) == text[: text.index(stop)]
        assert events[-1].choices[0].finish_reason == "stop"
    assert stop not in text[: text.index(stop)]


def test_seeds_repeat_whatever_else_is_written(client: openai.OpenAI) -> None:
    def draw(seed: int | None, n: int = 1) -> list[str]:
        given: Any = {} if seed is None else {"seed": seed}
        found = client.completions.create(model="one", prompt="so", max_tokens=12, temperature=1.2, n=n, **given)
        return [choice.text for choice in found.choices]

    alone = draw(7)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(draw, [7, None, 8, 7, None, None]))
    assert together[0] == together[3] == alone
    assert len({text for one in together for text in one}) == 5
    three = draw(7, n=3)
    assert three[0] == alone[0] and len(set(three)) == 3 and three == draw(7, n=3)


def test_probabilities(client: openai.OpenAI, served: Catalogue) -> None:
    words, model = served.models["one"].tokenizer, served.models["one"].lane.model
    found = client.completions.create(model="one", prompt="abc", max_tokens=6, temperature=0.7, seed=3, logprobs=3)
    told, text = found.choices[0].logprobs, found.choices[0].text
    assert told and told.tokens and told.token_logprobs and told.text_offset
    ids = words("abc").input_ids + words(text).input_ids
    with torch.no_grad():
        own_ = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    exact = [float(own_[2 + place, token]) for place, token in enumerate(ids[3:])]
    assert told.token_logprobs == pytest.approx(exact, abs=1e-4)
    assert [text[at] for at in told.text_offset] == told.tokens == list(text)
    for place, top in enumerate(told.top_logprobs or []):
        assert top and len(top) == 3
        assert list(top.values()) == pytest.approx(own_[2 + place].topk(3).values.tolist(), abs=1e-4)
    said: Any = [{"role": "user", "content": "q"}]
    chat = client.chat.completions.create(
        model="one", messages=said, max_tokens=5, temperature=0, logprobs=True, top_logprobs=20, stream=True
    )
    entries = [entry for e in chat if e.choices[0].logprobs for entry in e.choices[0].logprobs.content or []]
    assert 0 < len(entries) <= 5
    for entry in entries:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob == max(one.logprob for one in entry.top_logprobs)
        assert 0 < sum(math.exp(one.logprob) for one in entry.top_logprobs) <= 1 + 1e-5


def test_settings_change_what_is_written(client: openai.OpenAI, served: Catalogue) -> None:
    plain = wanted(served, "one", "abc", 8)

    def write(**options: Any) -> str:
        given: Any = {"model": "one", "prompt": "abc", "max_tokens": 8, "temperature": 0, **options}
        return client.completions.create(**given).choices[0].text

    token = served.models["one"].tokenizer("#").input_ids[0]
    assert write(logit_bias={str(token): 100}) == "#" * 8
    assert write(logit_bias={str(token): 100}, frequency_penalty=2) != plain
    assert write(temperature=2, top_p=0, seed=1) == plain
    assert write(temperature=2, seed=1) != plain


def test_the_models_own_settings_hold(
    client: openai.OpenAI, served: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties and ends of ``generation_config.json`` are those of ``generate``."""
    settings = served.models["two"].lane.model.generation_config
    plain = wanted(served, "two", PROMPTS[0])
    monkeypatch.setattr(settings, "repetition_penalty", 3.0)
    monkeypatch.setattr(settings, "no_repeat_ngram_size", 1)
    given: Any = {"model": "two", "prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0}
    found = client.completions.create(**given).choices[0].text
    assert found == wanted(served, "two", PROMPTS[0]) != plain
    end = served.models["two"].tokenizer(found[2]).input_ids[0]
    monkeypatch.setattr(settings, "eos_token_id", [2, end])
    ended = client.completions.create(**given)
    assert ended.choices[0].text == found[: found.index(found[2])] and ended.choices[0].finish_reason == "stop"
    assert ended.usage and ended.usage.completion_tokens == len(ended.choices[0].text) + 1
    monkeypatch.setattr(settings, "eos_token_id", 2)
    monkeypatch.setattr(settings, "temperature", 1e-9)
    del given["temperature"]
    assert client.completions.create(**given).choices[0].text == found


def test_json_that_follows_a_schema() -> None:
    words = tokenizer("bytes-large")
    model = tiny_composition("llama", "gpt2", **own("bytes", "bytes-large"))
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["fox", "dog"]}, "age": {"type": "boolean"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    with (
        serving(Catalogue({"own": model}, words)) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        for seed in range(3):
            given: Any = {"model": "own", "prompt": "a fox", "max_tokens": 100, "seed": seed, "temperature": 1}
            found = client.completions.create(**given, extra_body={"response_format": form})
            assert found.choices[0].finish_reason == "stop"
            assert set(json.loads(found.choices[0].text)) == {"name", "age"}
        form["json_schema"]["schema"] = {"type": "nonsense"}
        with pytest.raises(openai.BadRequestError, match="JSON schema that can be followed"):
            client.completions.create(**given, extra_body={"response_format": form})


def test_schemas_that_never_come_to_an_end_are_refused_and_give_no_half_answer() -> None:
    """At once where nothing at all can be written, else where nothing can follow."""
    words = tokenizer("bytes-large")
    writer = SchemaWriter(words, len(words), {words.eos_token_id})
    for schema in ({"$ref": "#"}, {"allOf": [{"$ref": "#"}]}):
        with pytest.raises(calmlm.ConfigError) as error:
            writer.grammar(schema)
        assert_helpful(error.value, "JSON schema that can be followed")
    inner = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "required": ["a"]}
    grammar = writer.grammar({**inner, "$defs": {"b": {"$ref": "#/$defs/b"}}})
    with pytest.raises(calmlm.ConfigError) as error:
        while not grammar.ended:
            grammar.take(int(grammar.allowed(len(words)).int().argmax()))
    assert_helpful(error.value, "JSON schema that can be followed")


def test_json_where_the_tokenizer_has_more_tokens_than_its_model() -> None:
    """As Gemma's has one for pictures: it is never written."""
    words = copy.deepcopy(tokenizer("bytes-large"))
    known = len(words)
    words.add_tokens(["extra"])
    grammar = SchemaWriter(words, known, {words.eos_token_id}).grammar({"type": "string"})
    grammar.take(words.convert_tokens_to_ids('"'))
    allowed = grammar.allowed(known + 2)
    assert allowed[:known].any() and not allowed[known:].any()


def test_tokenize_health_and_metrics(server: tuple[str, Engine], client: openai.OpenAI) -> None:
    url = server[0]
    found = httpx.post(f"{url}/tokenize", json={"model": "one", "prompt": "abc"}).json()
    assert found["count"] == len(found["tokens"]) == 3 and found["max_model_len"] == 128
    said = [{"role": "user", "content": "abc"}]
    chat = httpx.post(f"{url}/tokenize", json={"model": "one", "messages": said}).json()
    told = client.chat.completions.create(model="one", messages=said, max_tokens=3, logit_bias={"9": 100})  # type: ignore[arg-type]
    assert told.usage and chat["count"] == told.usage.prompt_tokens
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.head(f"{url}/health").status_code == 200  # as some probes ask
    page = httpx.get(f"{url}/metrics").text
    for name in (
        "num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens_total generation_tokens_total "
        "time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket e2e_request_latency_seconds_bucket "
        "request_queue_time_seconds_bucket"
    ).split():
        assert f"\ncalmlm:{name}" in page, name


def test_metrics_count_tokens(served: Catalogue) -> None:
    with serving(served) as (url, engine):
        sample = engine.metrics.registry.get_sample_value
        given = {"model": "one", "prompt": "abcd", "max_tokens": 5, "temperature": 0, "logit_bias": {"9": 100}, "n": 2}
        assert httpx.post(f"{url}/v1/completions", json=given).status_code == 200
        labels = {"model_name": "one"}
        assert sample("calmlm:prompt_tokens_total", labels) == 8
        assert sample("calmlm:generation_tokens_total", labels) == 10
        assert sample("calmlm:time_to_first_token_seconds_count", labels) == 2
        assert sample("calmlm:inter_token_latency_seconds_count", labels) == 8
        assert sample("calmlm:e2e_request_latency_seconds_count", labels) == 2
        wait(lambda: running(engine) == 0)
        assert sample("calmlm:kv_cache_usage_perc") == 0


def test_rows_of_the_anchor_share_the_compositions_batch(served: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step for both, while a text of the composition is written."""
    lane = served.models["one"].lane
    read, rows, begun, go = lane.read, [], threading.Event(), threading.Event()

    def slow(*given: Any) -> Any:
        rows.append((len(given[0]), given[3]))
        begun.set()
        assert go.wait(20)
        return read(*given)

    monkeypatch.setattr(lane, "read", slow)
    with serving(served) as (url, engine), ThreadPoolExecutor(2) as pool:
        ask = lambda name: httpx.post(  # noqa: E731
            f"{url}/v1/completions",
            json={"model": name, "prompt": "abc", "max_tokens": 20, "temperature": 0, "logit_bias": {"9": 1}},
            timeout=30,
        )
        one = pool.submit(ask, "one")
        assert begun.wait(20)
        other = pool.submit(ask, "anchor")
        wait(lambda: engine.metrics.registry.get_sample_value("calmlm:num_requests_waiting") == 1)
        go.set()
        texts = [found.result().json()["choices"][0]["text"] for found in (one, other)]
    assert any(count == 2 and composed is not None and composed.tolist() == [True, False] for count, composed in rows)
    assert texts[0] != texts[1]
