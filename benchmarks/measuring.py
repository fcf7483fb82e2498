"""What the benchmarks have in common: models of a known size, and times taken in turn."""

from __future__ import annotations

import json
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from calmlm.experiments.record import device
from calmlm.files.storage import write_text

__all__ = [
    "VOCABULARY",
    "gemma",
    "keep",
    "kept_bytes",
    "peak_bytes",
    "ratio",
    "saved_bytes",
    "synchronise",
    "take_turns",
    "timed",
]

VOCABULARY = 2000


def gemma(width: int, layers: int, seed: int, vocabulary: int = VOCABULARY) -> Gemma3ForCausalLM:
    """A random Gemma of this size."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=1, head_dim=64, intermediate_size=4 * width, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).to(device()).eval()


def keep(result: dict[str, Any], path: Path) -> None:
    """Write a result, and print it as the last line."""
    write_text(path, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def take_turns(works: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each in each round, after a warm-up; the order is reversed in every other round.

    So a drifting machine favours none of them, and ratios are taken within a round.
    """
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for index in range(rounds):
        order = range(len(works)) if index % 2 == 0 else reversed(range(len(works)))
        for which in order:
            seconds[which].append(timed(works[which]))
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Median and distance of the quartiles of the ratios, round by round."""
    ratios = [one / other for one, other in zip(seconds, base, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return statistics.median(ratios), quartiles[2] - quartiles[0]


class _Live(TorchDispatchMode):
    """Follows how many bytes the tensors made inside it take at a time; weights are known beforehand."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _weights(models: Sequence[Any]) -> dict[int, int]:
    """The bytes of all storages of these models, by address."""
    tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    return {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


def kept_bytes(work: Callable[[], Any], *models: Any) -> int:
    """The memory of tensors that are there once it has run and its result is held, the models' weights left out."""
    if torch.cuda.is_available():
        synchronise()
        before = torch.cuda.memory_allocated()
        kept = work()
        synchronise()
        return torch.cuda.memory_allocated() - before
    with _Live(set(_weights(models))) as live:
        kept = work()
        now = live.now
    del kept
    return now


def saved_bytes(work: Callable[[], Any], *models: Any) -> int:
    """The memory of tensors that are saved for backward, the models' weights left out: ``kept_bytes`` of compiled work.

    Nothing can follow a compiled step's tensors. What checkpointing keeps by itself is not among those that are saved,
    so that only work without any has the same figure in both.
    """
    known = _weights(models)
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in saved.values())


def peak_bytes(work: Callable[[], Any], *models: Any) -> int:
    """The most memory that tensors take at a time while it runs, the models' weights included."""
    weights = _weights(models)
    if torch.cuda.is_available():
        synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        synchronise()
        return sum(weights.values()) + torch.cuda.max_memory_allocated() - before
    with _Live(set(weights)) as live:
        kept = work()
    del kept
    return sum(weights.values()) + live.peak
