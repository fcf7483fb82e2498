"""How many floating-point operations a training takes, counted on some of its batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calmlm.data.labels import IGNORE
from calmlm.modeling import CalmModel

__all__ = ["Meter"]

_PROBES = 6


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
    def counting(self) -> Iterator[None]:
        """Count what runs inside."""
        # PyTorch has no formula for the fused attention of CPUs: count it as the products that it is made of.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            yield
        self.flops += counter.get_total_flops()

    def probe(self, trainer: Any, rows: Sequence[Any], steps: int) -> None:
        """Count a training of so many steps.

        Some of its batches are counted. The operations of a batch are a sum of multiples of its tokens, of its
        attention's pairs and of its labels; the multiples are found by least squares, and all batches are summed up.
        Where rows hold no ``input_ids``, all batches count as the mean of those counted.

        Args:
            trainer: of which ``compute_loss``, ``data_collator`` and the batch size are used; weights stay as they are.
            rows: what it trains on, in order.
            steps: of the whole training.
        """
        model, size = trainer.model, trainer.args.per_device_train_batch_size
        model.train()
        if isinstance(getattr(model, "model", None), CalmModel):
            model.model.try_padding()  # once, and so no part of a batch
        one_pass = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
        batches = [one_pass[step % len(one_pass)] for step in range(steps)]
        shapes = torch.tensor([_shape(batch) for batch in batches], dtype=torch.float64)
        order = shapes.sum(1).argsort(stable=True)
        chosen = order[torch.linspace(0, len(order) - 1, min(_PROBES, len(order))).round().long()]
        counts = []
        for index in chosen.tolist():
            batch = trainer._prepare_inputs(trainer.data_collator(batches[index]))
            single = Meter()
            with single.counting():
                trainer.compute_loss(model, batch).backward()
            counts.append(single.flops)
            model.zero_grad(set_to_none=True)
        model.eval()
        counted = torch.tensor(counts, dtype=torch.float64)[:, None]
        scale = shapes.amax(0).clamp(min=1.0)
        multiples = torch.linalg.lstsq(shapes[chosen] / scale, counted, driver="gelsd").solution
        self.flops += float((shapes / scale @ multiples).sum())
        self.trainable = max(self.trainable, sum(p.numel() for p in model.parameters() if p.requires_grad))


def _shape(batch: Sequence[Any]) -> tuple[int, int, int]:
    """What the operations of a batch depend on: tokens with padding, pairs that attention looks at, and labels."""
    if "input_ids" not in batch[0]:
        return 1, 0, 0
    width = max(len(row["input_ids"]) for row in batch)
    labels = sum(label != IGNORE for row in batch for label in row["labels"][1:])
    return len(batch) * width, len(batch) * width * width, labels
