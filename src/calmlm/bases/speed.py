"""Which dtype this machine multiplies fastest in."""

from __future__ import annotations

import time

import torch

__all__ = ["faster_dtype", "slowness"]

SHAPE = (64, 512, 1024)
ROUNDS = 5


def slowness(dtype: torch.dtype) -> float:
    """How many times as long this processor takes for a product of matrices in a dtype as in float32.

    With AMX or AVX-512 BF16, bfloat16 takes a fraction; without, it may take forty times as long. The fastest round of
    several counts, since other work on the machine can only slow one down.
    """
    rows, inner, columns = SHAPE
    factors = {
        each: (torch.ones(rows, inner, dtype=each), torch.ones(columns, inner, dtype=each))
        for each in (torch.float32, dtype)
    }
    seconds = dict.fromkeys(factors, float("inf"))
    for one, weight in factors.values():
        torch.nn.functional.linear(one, weight)  # the first time prepares
    for _ in range(ROUNDS):
        for each, (one, weight) in factors.items():
            start = time.perf_counter()
            torch.nn.functional.linear(one, weight)
            seconds[each] = min(seconds[each], time.perf_counter() - start)
    return seconds[dtype] / seconds[torch.float32]


def faster_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16, or float32 on a processor that multiplies faster in it."""
    if torch.device(device).type != "cpu" or slowness(torch.bfloat16) < 1:
        return torch.bfloat16
    return torch.float32
