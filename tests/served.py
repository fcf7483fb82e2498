"""A server in a thread, with tiny models behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn

import calmlm
from calmlm.serving.app import make_app
from calmlm.serving.catalogue import Catalogue
from calmlm.serving.desk import EngineDesk
from calmlm.serving.engine import Engine
from compositions import awaken, tiny_composition
from tiny import MAX_POSITIONS, tiny_model, tiny_tokenizer

PROMPTS = ["the keys are", "a", "one, two, three, four and five", "x = 7 + 8", "who?"]


def two_compositions() -> dict[str, calmlm.CalmForCausalLM]:
    """Two compositions around one anchor, with different augmenting models."""
    first = tiny_composition("llama", "gpt2")
    small = tiny_model("mistral", seed=4)
    return {"one": first, "two": awaken(calmlm.compose(first.anchor, small, 2), seed=5)}


def catalogue(**options: Any) -> Catalogue:
    """Two compositions, their anchor, and an augmenting model, all with one tokenizer."""
    models, words = two_compositions(), tiny_tokenizer()
    first = models["one"]
    bases = [
        ("anchor", first.anchor, words, None),
        ("small", first.augmenting["augmenting"], words, None),
    ]
    return Catalogue(models, words, options.pop("max_tokens", MAX_POSITIONS), bases)


def expected(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """What ``generate`` writes behind a prompt, greedily."""
    text = torch.tensor([ids])
    found = model.generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=count, do_sample=False, pad_token_id=0, **options
    )
    return found[0, len(ids) :].tolist()


@contextmanager
def engine_of(served: Catalogue, *, max_batch: int = 8, max_queue: int = 64) -> Iterator[Engine]:
    """A running engine."""
    engine = Engine(max_batch, max_queue, served.max_length)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def serving(
    served: Catalogue, *, max_batch: int = 8, max_queue: int = 64, **options: Any
) -> Iterator[tuple[str, Engine]]:
    """A server's address, and its engine."""
    with engine_of(served, max_batch=max_batch, max_queue=max_queue) as engine:
        app = make_app(EngineDesk(served, engine), **options)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}", engine
        finally:
            server.should_exit = True
            thread.join(timeout=20)


def command(*arguments: str) -> list[str]:
    """``calmlm serve`` at a free port."""
    return [sys.executable, "-m", "calmlm.cli", "serve", *arguments, "--port", "0", "--device", "cpu"]


@contextmanager
def program(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its address."""
    given = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, env=given)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("Serving"))
        yield process, line.split(" at ")[1].strip().removesuffix("/v1")
    finally:
        process.terminate()  # an end of its own lets it end what it has started
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stderr is not None
        process.stderr.close()


def wait(done: Any, seconds: float = 20) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def running(engine: Engine) -> int:
    """Texts that are being written."""
    return int(engine.metrics.registry.get_sample_value("calmlm:num_requests_running") or 0)
