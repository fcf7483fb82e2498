"""What `calmlm serve` does under load: many clients at a time, each answer compared with what `generate` writes alone.

    python benchmarks/serve.py                                 # writes benchmarks/results/serve_cpu.json, and prints it
    python benchmarks/serve.py --clients 8 --seconds 5 --prompts 8     # a quick look

Regime: the server is a process of its own on loopback, with one thread; clients are threads here, which ask again as
soon as they are answered, half of them for streams. The models are a random Gemma-style anchor (256 wide, 8 layers) and
augmenting model (128, 4) with three connections. Prompts have 2 to 200 tokens, answers 8 to 64.

`sequential` is `generate` on the same prompts, one after the other, in this process, with one thread; `anchor` is the
anchor alone on the same server. Throughput counts new tokens. `wrong` counts answers that differ from `generate`'s,
`lost` requests without an answer. Prompts on whose way two tokens are nearly equally likely (less than 0.001 apart) are
not asked: a rounding decides there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from measuring import VOCABULARY, gemma, keep
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import calmlm
from calmlm.experiments.record import origin

GOAL = 3  # times sequential generation, with 16 clients
NEAR = 1e-3


@dataclass(frozen=True)
class Question:
    """A prompt, and what is written behind it by each model alone."""

    ids: list[int]
    new: int
    texts: dict[str, str]


@dataclass
class Load:
    """What came back."""

    seconds: float = 0.0
    tokens: int = 0
    wrong: int = 0
    lost: int = 0
    latencies: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """New tokens in a second."""
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Its figures."""
        p50, p95 = (float(np.quantile(self.latencies, q)) for q in (0.5, 0.95))
        return {
            "answers": len(self.latencies), "wrong": self.wrong, "lost": self.lost, "p50_s": round(p50, 3),
            "p95_s": round(p95, 3), "tokens_per_s": round(self.throughput, 1),
        }  # fmt: skip


def words() -> PreTrainedTokenizerFast:
    """A word for each id."""
    vocabulary = {f"w{index}": index for index in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def save(folder: Path) -> tuple[calmlm.CalmForCausalLM, Any]:
    """A composition with its bases and its tokenizer on disk."""
    tokenizer = words()
    for name, model in (("anchor", gemma(256, 8, 0)), ("small", gemma(128, 4, 1))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    made = calmlm.compose(str(folder / "anchor"), str(folder / "small"), [[0, 1], [1, 4], [3, 7]])
    with torch.no_grad():  # awake, so that what it computes is not nothing
        for name, parameter in made.model.connectors.named_parameters():
            if name.endswith("o_proj.weight"):
                parameter.normal_(std=0.02)
    made.save_pretrained(folder / "composition")
    return made.eval(), tokenizer


def questions(composition: Any, tokenizer: Any, count: int, seed: int) -> tuple[list[Question], float]:
    """Prompts with their answers, and how many tokens a second the composition writes for them one after the other."""
    chance, found, tokens, seconds = random.Random(seed), list[Question](), 0, 0.0
    while len(found) < count:
        ids = [chance.randrange(4, VOCABULARY) for _ in range(chance.choice((2, 8, 20, 60, 200)))]
        new, texts, sure = chance.randrange(8, 65), {}, True
        for name, model in (("composition", composition), ("anchor", composition.anchor)):
            text = torch.tensor([ids])
            begun = time.perf_counter()
            output = model.generate(
                text, attention_mask=torch.ones_like(text), max_new_tokens=new, do_sample=False, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            if name == "composition":
                tokens, seconds = tokens + len(output.logits), seconds + time.perf_counter() - begun
            top = torch.cat(output.logits).topk(2).values
            sure = sure and bool((top[:, 0] - top[:, 1]).min() > NEAR)
            texts[name] = tokenizer.decode(output.sequences[0, len(ids) :], skip_special_tokens=True)
        if sure:
            found.append(Question(ids, new, texts))
    return found, tokens / seconds


@contextmanager
def server(folder: Path, clients: int) -> Iterator[tuple[str, int]]:
    """The command in a process of its own: its address and its process."""
    command = [sys.executable, "-m", "calmlm.cli", "serve", str(folder / "composition"), "--port", "0"]
    command += ["--max-batch", str(clients), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if line.startswith("Serving"))
        yield line.split(" at ")[1].strip().removesuffix("/v1"), process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stderr.close()


def drive(url: str, model: str, asked: list[Question], clients: int, seconds: float) -> Load:
    """Let so many clients ask for so long."""
    load, lock, end = Load(), threading.Lock(), time.perf_counter() + seconds

    def run(seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=url, timeout=300) as client:
            while time.perf_counter() < end:
                question, begun = chance.choice(asked), time.perf_counter()
                try:
                    text, tokens = ask(client, model, question, stream=seed % 2 == 0)
                except (httpx.HTTPError, ValueError, KeyError, IndexError):
                    with lock:
                        load.lost += 1
                    continue
                with lock:
                    load.latencies.append(time.perf_counter() - begun)
                    load.tokens += tokens
                    load.wrong += text != question.texts[model]

    begun = time.perf_counter()
    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - begun
    return load


def ask(client: httpx.Client, model: str, question: Question, *, stream: bool) -> tuple[str, int]:
    """One answer, and how many tokens it has."""

    body = {"model": model, "prompt": question.ids, "max_tokens": question.new, "temperature": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    answer = client.post("/v1/completions", json=body).raise_for_status()
    if not stream:
        found = answer.json()
        return found["choices"][0]["text"].lstrip(), found["usage"]["completion_tokens"]
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    if lines[-1] != "[DONE]":
        raise ValueError("the stream was cut")
    events = [json.loads(line) for line in lines[:-1]]
    text = "".join(event["choices"][0]["text"] for event in events[:-1])
    return text.lstrip(), events[-1]["usage"]["completion_tokens"]


def memory(process: int) -> float:
    """MiB of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "serve_cpu.json")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as place:
        composition, tokenizer = save(Path(place))
        asked, sequential = questions(composition, tokenizer, options.prompts, options.seed)
        del composition
        with server(Path(place), options.clients) as (url, process):
            drive(url, "composition", asked, options.clients, options.seconds / 2)  # until memory has its shape
            before = memory(process)
            load = drive(url, "composition", asked, options.clients, options.seconds)
            grown = memory(process) - before
            anchor = drive(url, "anchor", asked, options.clients, options.seconds / 2)
            sixteen = drive(url, "composition", asked, 16, options.seconds / 2)
    figures = load.as_dict()
    result = {
        "benchmark": "serve",
        "clients": options.clients,
        "seconds": round(load.seconds, 1),
        **{name: figures[name] for name in ("wrong", "lost", "p50_s", "p95_s")},
        "throughput_x_sequential": round(load.throughput / sequential, 2),
        "throughput_x_anchor": round(load.throughput / anchor.throughput, 2),
        "memory_growth_mib": round(grown, 1),
        "sequential_tokens_per_s": round(sequential, 1),
        "composition": figures,
        "anchor": anchor.as_dict(),
        "sixteen_clients": {**sixteen.as_dict(), "throughput_x_sequential": round(sixteen.throughput / sequential, 2)},
        "goals": {"throughput_x_sequential_of_sixteen_clients": GOAL, "wrong": 0, "lost": 0},
        "prompts": options.prompts,
        "seed": options.seed,
        **origin("python benchmarks/serve.py"),
    }
    keep(result, options.output)


if __name__ == "__main__":
    main()
