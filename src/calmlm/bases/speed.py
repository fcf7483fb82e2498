"""Which dtype this machine multiplies fastest in, and which attention it learns fastest with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

__all__ = ["faster_attention", "faster_dtype", "slowness"]

SHAPE = (64, 512, 1024)
ROUNDS = 5
SHORT = 160  # tokens of a text, up to which plain products are the faster attention


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


@contextmanager
def faster_attention(model: Any, longest: int) -> Iterator[bool]:
    """Train a composition with the faster kind of attention where short texts are read in bfloat16 on a processor.

    There, PyTorch's fused attention is slow on its way back: with 9 heads of width 64, a layer takes 45 ms for 16 texts
    of 80 tokens and 84 ms for 160, plain products (``eager``) 8 and 33 ms. They draw even at 200 tokens, and plain
    products keep all weights of attention in memory. So texts above ``SHORT`` keep what they have. So do augmenting
    models, whose states have no gradient.

    Args:
        model: a composition that is to be trained; other attention than ``sdpa`` stays.
        longest: the tokens of the longest text, or of a packed row.

    Yields:
        whether attention is another meanwhile.
    """
    anchor = model.anchor
    weight = next(anchor.parameters())
    slow = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not slow or longest > SHORT or model.config._attn_implementation != "sdpa":
        yield False
        return
    configs = [part.config for part in anchor.modules() if isinstance(part, PreTrainedModel)]
    before = [(config, config._attn_implementation) for config in (model.config, *configs)]
    anchor.set_attn_implementation("eager")
    if anchor.config._attn_implementation != "eager":  # of a family that cannot change it, as transformers has warned
        yield False
        return
    model.config._attn_implementation = "eager"
    try:
        yield True
    finally:
        for config, kind in before:
            config._attn_implementation = kind
