"""What decoding costs: a composition beside its anchor alone, beside both of its models, and with drafts.

    python benchmarks/decode.py                  # writes benchmarks/results/decode_cpu.json, and prints it
    python benchmarks/decode.py --rounds 2 --modes eager --prompts 64   # a quick look
    python benchmarks/decode.py --models trained         # what a deep anchor gains from drafts

Regime: one process; composition, anchor and augmenting model take turns (A B C, C B A, ...) after a warm-up; medians of
the ratios round by round. The floor is what both models take alone, one after the other, each with its own cache.

``random`` are a Gemma-style anchor (512 wide, 12 layers) and augmenting model (256, 6), three connections and random
weights: hardly anything that is drafted there is accepted, which is where drafting loses. ``trained`` are the models of
``deep.py``: an anchor of 16 layers that calculates, and an augmenting model of 4 that knows 1000 keys. ``known`` asks
for what the augmenting model knows, ``combined`` for what takes both. ``words`` are the random models: a composition
that carries words as well, beside the same one without.

What was timed is checked: compiled and with drafts, the tokens are the likeliest ones without any cache.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deep import TASKS, deep_models
from measuring import VOCABULARY, gemma, peak_bytes, ratio, take_turns
from torch import Tensor
from transformers import CompileConfig

import calmlm
from calmlm.experiments.flops import Meter
from calmlm.experiments.record import device, origin
from calmlm.files.storage import write_text

NEW = 64
CONNECTIONS = [[1, 3], [3, 7], [5, 11]]
GOALS = {
    "time_x_floor": 1.15,
    "flops_x_floor_without_connections": 1.03,
    "prefill_time_x_floor": 1.12,
    "prefill_peak_x_floor": 1.2,
    "drafting_speed_x_anchor": 1.0,
    "map_of_words_x_without": 1.02,
}


@dataclass
class Setting:
    """A composition, its models alone, prompts, and how many tokens are written behind each."""

    name: str
    composition: calmlm.CalmForCausalLM
    anchor: Any
    augmenting: Any
    prompts: list[Tensor]
    new: int

    def writing(self, model: Any, **options: Any) -> Callable[[], list[Tensor]]:
        """Greedy generation behind all prompts, always equally many tokens."""

        def write() -> list[Tensor]:
            length = {"max_new_tokens": self.new, "eos_token_id": None, "pad_token_id": 0}
            return [
                model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length, **options)
                for ids in self.prompts
            ]

        return write


def random_models() -> tuple[calmlm.CalmForCausalLM, Any, Any]:
    """Gemma-style, random; the composition is awake, so that what it computes is not nothing."""
    anchor, augmenting = gemma(512, 12, 0), gemma(256, 6, 1)
    composition = calmlm.compose(copy.deepcopy(anchor), copy.deepcopy(augmenting), CONNECTIONS)
    with torch.no_grad():
        for name, parameter in composition.model.connectors.named_parameters():
            if name.endswith("o_proj.weight"):
                parameter.normal_(std=0.02)
    return composition.eval(), anchor, augmenting


def random_prompt(batch: int, length: int) -> Tensor:
    """Random tokens (batch, length)."""
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator).to(device())


def compiled() -> dict[str, Any]:
    """A static cache and a compiled step, on CPUs too."""
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def prefill(model: Any, ids: Tensor) -> Callable[[], Any]:
    """One call over the prompt, with a cache, logits of the last position only."""

    def read() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return read


def connection_flops(composition: calmlm.CalmForCausalLM, past: int) -> float:
    """What the connections themselves compute for one token: projections, and attention over the past."""
    total = 0
    kinds: Any = composition.model.connectors
    for connectors in kinds.values():
        for connector in connectors:
            matrices = (p for name, p in connector.named_parameters() if name.endswith("proj.weight"))
            total += sum(2 * matrix.numel() for matrix in matrices)
            total += 4 * (past + 1) * connector.o_proj.weight.shape[0]
    return total


def flops(model: Any, ids: Tensor) -> float:
    """Operations of one decoded token of a row, with the prompt in the cache."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        meter = Meter()
        with meter.counting():
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return meter.flops / ids.shape[0]


def cache_bytes(model: Any, ids: Tensor) -> float:
    """Bytes that a token takes in the cache; a composition's holds the anchor's, m_A's and the connections'."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    parts = cache.parts() if isinstance(cache, calmlm.CalmCache) else [cache]
    states = [t for part in parts for layer in part.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in states) / ids.numel()


def floor_of(seconds: list[list[float]]) -> list[float]:
    """Both models alone, round by round."""
    return [one + other for one, other in zip(seconds[1], seconds[2], strict=True)]


def decoding_case(setting: Setting, mode: str, drafting: bool, rounds: int) -> dict[str, Any]:
    """One way of decoding, beside the anchor and the augmenting model in the same mode (without drafts)."""
    options = compiled() if mode == "compiled" else {}
    config = calmlm.DraftConfig()
    own = setting.writing(setting.composition, **options, **({"drafting": config} if drafting else {}))
    works = [own, *(setting.writing(model, **options) for model in (setting.anchor, setting.augmenting))]
    match = all(is_greedy(setting.composition, text, setting.new) for text in own())
    config.statistics.reset()
    seconds = take_turns(works, rounds)
    times, spread = ratio(seconds[0], floor_of(seconds))
    speed, _ = ratio(seconds[1], seconds[0])
    ids = setting.prompts[0]
    composed, alone = flops(setting.composition, ids), flops(setting.anchor, ids) + flops(setting.augmenting, ids)
    connections = connection_flops(setting.composition, ids.shape[1])
    both = cache_bytes(setting.anchor, ids) + cache_bytes(setting.augmenting, ids)
    return {
        "models": setting.name, "batch": ids.shape[0], "prompt": ids.shape[1], "mode": mode, "drafting": drafting,
        "time_x_floor": round(times, 3), "quartile_distance": round(spread, 3), "speed_x_anchor": round(speed, 3),
        "milliseconds_per_token": [
            round(1e3 * statistics.median(each) / (len(setting.prompts) * setting.new), 2) for each in seconds
        ],
        "acceptance": round(config.statistics.acceptance, 3) if drafting else None,
        "tokens_per_anchor_pass": round(config.statistics.tokens_per_pass, 2) if drafting else None,
        "flops_x_floor": round(composed / alone, 4),
        "flops_x_floor_without_connections": round((composed - connections) / alone, 4),
        "cache_bytes_per_token": round(cache_bytes(setting.composition, ids)),
        "cache_bytes_per_token_of_both_models": round(both),
        "tokens_match": match,
    }  # fmt: skip


def is_greedy(composition: calmlm.CalmForCausalLM, text: Tensor, new: int) -> bool:
    """Whether the last tokens are what the composition writes without a cache, token by token."""
    with torch.no_grad():
        logits = composition(input_ids=text, use_cache=False, logits_to_keep=new + 1).logits
    return bool(torch.equal(logits[:, :-1].argmax(-1), text[:, -new:]))


def prefill_case(batch: int, prompt: int, rounds: int) -> dict[str, Any]:
    """Reading a prompt: time and peak memory, weights included, beside both models one after the other."""
    models, ids = random_models(), random_prompt(batch, prompt)
    works = [prefill(model, ids) for model in models]
    seconds = take_turns(works, rounds)
    times, spread = ratio(seconds[0], floor_of(seconds))

    def both() -> Any:
        return works[1](), works[2]()  # both caches are kept, as a composition keeps them

    peak = peak_bytes(works[0], models[0]) / peak_bytes(both, *models[1:])
    return {
        "models": "random", "batch": batch, "prompt": prompt, "time_x_floor": round(times, 3),
        "quartile_distance": round(spread, 3), "peak_x_floor": round(peak, 3),
    }  # fmt: skip


def words_case(kind: str, batch: int, prompt: int, rounds: int) -> dict[str, Any]:
    """A composition that carries words as well, beside the same one without them."""
    plain, anchor, augmenting = random_models()
    words = calmlm.compose(copy.deepcopy(anchor), copy.deepcopy(augmenting), CONNECTIONS, words=kind).eval()
    with torch.no_grad():
        own = dict(words.model.connectors.named_parameters())
        for name, parameter in plain.model.connectors.named_parameters():
            own[name].copy_(parameter)
        words.model.connectors["augmenting"][-1].opening.fill_(1.0)  # type: ignore[index,operator,union-attr]
    ids = random_prompt(batch, prompt)
    settings = [Setting("words", model, anchor, augmenting, [ids], NEW) for model in (words, plain)]
    times, spread = ratio(*take_turns([setting.writing(setting.composition) for setting in settings], rounds))
    return {
        "models": "random", "words": kind, "batch": batch, "prompt": prompt, "time_x_without": round(times, 3),
        "quartile_distance": round(spread, 3), "flops_x_without": round(flops(words, ids) / flops(plain, ids), 4),
    }  # fmt: skip


def calm_pytorch_case(batch: int, prompt: int, rounds: int) -> dict[str, Any] | None:
    """PyPI's CALM-pytorch around the same models, beside the same floor; None where it is not installed."""
    try:
        from CALM_pytorch import CALM
        from CALM_pytorch.CALM import AugmentParams
    except ImportError:
        return None
    _, anchor, augmenting = random_models()

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits

    def blocks(wrapped: Any) -> list[Any]:
        return list(wrapped.model.model.layers)

    wrapped = [Logits(copy.deepcopy(model)) for model in (anchor, augmenting)]
    connections = tuple((i + 1, j + 1) for i, j in CONNECTIONS)
    parameters = AugmentParams(model=wrapped[1], extract_blocks_fn=blocks, connections=connections)
    other = CALM(wrapped[0], parameters, anchor_extract_blocks_fn=blocks)
    ids = random_prompt(batch, prompt)
    setting = Setting("random", None, anchor, augmenting, [ids], NEW)  # type: ignore[arg-type]
    works: list[Callable[[], Any]] = [lambda: other.generate(ids, prompt + NEW)]
    seconds = take_turns([*works, setting.writing(anchor), setting.writing(augmenting)], rounds)
    times, spread = ratio(seconds[0], floor_of(seconds))
    speed, _ = ratio(seconds[1], seconds[0])
    return {
        "models": "random", "system": "CALM-pytorch 0.2.2", "batch": batch, "prompt": prompt,
        "time_x_floor": round(times, 3), "quartile_distance": round(spread, 3), "speed_x_anchor": round(speed, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    kinds = ["random", "trained", "words"]
    parser.add_argument("--models", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--bases", type=Path, default=Path("runs/decode"), help="where the trained models lie or go")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / f"decode_{device()}.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "benchmark": "decode",
        "goals": GOALS,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "cases": [],
        "prefill": [],
        "words": [],
        "other_systems": [],
        **origin("python benchmarks/decode.py"),
    }

    def note(where: str, case: dict[str, Any]) -> None:
        """Keep a result, in the file too: what is long may be stopped."""
        result[where].append(case)
        print(case, flush=True)
        write_text(options.output, json.dumps(result, indent=2) + "\n")

    shapes = [(batch, prompt) for batch in options.batches for prompt in options.prompts]
    if "random" in options.models:
        for batch, prompt in shapes:
            note("prefill", prefill_case(batch, prompt, options.rounds))
        found = calm_pytorch_case(1, options.prompts[0], max(1, options.rounds // 3))
        if found is not None:
            note("other_systems", found)
    if "trained" in options.models:
        for task in TASKS:
            setting = Setting(task, *deep_models(options.bases, task))
            for drafting in (False, True):
                note("cases", decoding_case(setting, "eager", drafting, options.rounds))
    if "words" in options.models:
        for kind in ("map", "pointer"):
            for batch, prompt in shapes:
                note("words", words_case(kind, batch, prompt, options.rounds))
    if "random" in options.models:
        for mode in options.modes:
            for batch, prompt in shapes:
                setting = Setting("random", *random_models(), [random_prompt(batch, prompt)], NEW)
                # transformers' assisted generation takes one row and a dynamic cache.
                for drafting in (False, True) if mode == "eager" and batch == 1 else (False,):
                    note("cases", decoding_case(setting, mode, drafting, options.rounds))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
