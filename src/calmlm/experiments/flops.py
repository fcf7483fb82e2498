"""How many floating-point operations a training takes, counted on some of its batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Meter"]

_PROBES = 3


def _grouped(first: Any, second: Any, *_: Any, **__: Any) -> int:
    """The products of experts: each row of the first is multiplied with one matrix of the second."""
    return 2 * math.prod(first) * second[-1]


_FORMULAS = {torch.ops.aten._grouped_mm: _grouped}


class Meter:
    """Counts the operations of matrix products and attention, forward and backward.

    Attributes:
        flops: so far; a multiplication and an addition are two.
        trainable: the most parameters that were trained at a time.
    """

    def __init__(self) -> None:
        self.flops = 0.0
        self.trainable = 0

    @contextmanager
    def counting(self, times: float = 1.0) -> Iterator[None]:
        """Count what runs inside, so many times."""
        # PyTorch has no formula for the fused attention of CPUs: count it as the products that it is made of.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            yield
        self.flops += times * counter.get_total_flops()

    def probe(self, trainer: Any, rows: Sequence[Any], steps: int) -> None:
        """Count a training of so many steps: the mean over some batches spread over the rows.

        Args:
            trainer: of which ``compute_loss``, ``data_collator`` and the batch size are used; weights stay as they are.
            rows: what it trains on, in order.
            steps: of the whole training.
        """
        model, size = trainer.model, trainer.args.per_device_train_batch_size
        model.train()
        last = max(0, min(len(rows), steps * size) - size)
        starts = sorted({round(last * part / (_PROBES - 1)) for part in range(_PROBES)})
        for start in starts:
            batch = trainer.data_collator(list(rows[start : start + size]))
            batch = trainer._prepare_inputs(batch)
            with self.counting(steps / len(starts)):
                trainer.compute_loss(model, batch).backward()
            model.zero_grad(set_to_none=True)
        model.eval()
        self.trainable = max(self.trainable, sum(p.numel() for p in model.parameters() if p.requires_grad))
