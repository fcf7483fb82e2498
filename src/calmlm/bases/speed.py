"""Which dtype this machine multiplies fastest in."""

from __future__ import annotations

import time

import torch

__all__ = ["faster_dtype", "slowness"]

SHAPE = (64, 512, 1024)


def slowness(dtype: torch.dtype) -> float:
    """How many times as long this processor takes for a product of matrices in a dtype as in float32.

    With AMX, bfloat16 takes a fraction; without, it may take forty times as long.
    """
    seconds = {}
    rows, inner, columns = SHAPE
    for each in (torch.float32, dtype):
        one, other = torch.ones(rows, inner, dtype=each), torch.ones(inner, columns, dtype=each)
        torch.mm(one, other)  # the first time prepares
        start = time.perf_counter()
        torch.mm(one, other)
        seconds[each] = time.perf_counter() - start
    return seconds[dtype] / seconds[torch.float32]


def faster_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16, or float32 on a processor that multiplies faster in it."""
    if torch.device(device).type != "cpu" or slowness(torch.bfloat16) < 1:
        return torch.bfloat16
    return torch.float32
