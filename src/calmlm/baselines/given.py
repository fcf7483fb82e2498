"""What every baseline is given: the base models, the data and the budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calmlm.errors import ModelError
from calmlm.experiments.fitting import IGNORED, Row, Stage, collator, prompt_argument
from calmlm.experiments.flops import Meter

__all__ = [
    "Bases",
    "Budget",
    "Data",
    "batches_of",
    "check_same_shapes",
    "least_loss",
    "losses_of",
    "padded",
    "row_losses",
]


LOGITS = 2**28  # 1 GiB in float32


@dataclass(frozen=True)
class Bases:
    """The pretrained models; none of them is changed.

    Attributes:
        anchor: m_B.
        augmenting: m_A, with the same tokenizer.
        tokenizer: of both; pads on the left.
        twin: a model of the anchor's architecture that knows what m_A knows, for the systems that merge.
    """

    anchor: PreTrainedModel
    augmenting: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    twin: PreTrainedModel | None = None

    def merging_pair(self, method: str) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The anchor and its twin.

        Raises:
            ModelError: when there is no twin, or it has another architecture.
        """
        if self.twin is None:
            raise ModelError(
                f"{method} needs two models of one architecture, but no twin of the anchor was given: train an m_A of "
                f"the anchor's architecture and pass it as twin."
            )
        check_same_shapes([self.anchor, self.twin], method)
        return self.anchor, self.twin


@dataclass(frozen=True)
class Data:
    """Rows of ``input_ids`` and ``labels``.

    Attributes:
        composition: D_C.
        corpus: what m_A was trained on.
        validation: rows like D_C's that no training sees; where a system has to choose, it chooses on these.
    """

    composition: list[Row]
    corpus: list[Row]
    validation: list[Row]


@dataclass(frozen=True)
class Budget:
    """What a baseline may spend.

    Attributes:
        stage: steps, batch size, learning rate, weight decay of its training.
        seed: of everything random.
        parameters: how many parameters it may add, as many as the composition does.
        full_rate: the learning rate where all weights of m_B are trained; the stage's own if None.
        meter: counts what is spent.
    """

    stage: Stage
    seed: int
    parameters: int
    full_rate: float | None = None
    meter: Meter = field(default_factory=Meter, compare=False)

    @property
    def full(self) -> Stage:
        """The stage of a training of all weights."""
        return self.stage if self.full_rate is None else replace(self.stage, learning_rate=self.full_rate)


def check_same_shapes(models: list[PreTrainedModel], method: str) -> None:
    """Raise unless all models have the same tensors.

    Raises:
        ModelError: naming the first that differs.
    """
    first = {name: tuple(tensor.shape) for name, tensor in models[0].state_dict().items()}
    for model in models[1:]:
        other = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        wrong = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if wrong:
            raise ModelError(
                f"{method} needs two models of one architecture, but they differ in {len(wrong)} tensors, for example "
                f"{wrong[0]!r} ({first.get(wrong[0], 'none')} and {other.get(wrong[0], 'none')}): pass models of one "
                f"architecture."
            )


def padded(rows: list[Row], pad: int, device: Any = None) -> dict[str, Tensor]:
    """A batch of rows, padded on the right: ``input_ids``, ``labels`` and ``attention_mask``, each (B, T) int64."""
    batch = collator(pad, masked=True)(rows)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def batches_of(model: Any, rows: list[Row], pad: int, batch_size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """All rows, those of about one length together: their indices, and the batch that they make (see ``padded``).

    Batches are smaller than asked for where their logits would not fit into ``LOGITS`` numbers.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]), reverse=True)
    while order:
        longest = len(rows[order[0]]["input_ids"])
        size = max(1, min(batch_size, LOGITS // (longest * vocabulary)))
        chosen, order = order[:size], order[size:]
        yield torch.tensor(chosen), padded([rows[index] for index in chosen], pad, model.device)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each row's labelled tokens, (B,) float32, in nats.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, of the same tokens; each is predicted by the logits before it.
    """
    labels = labels[:, 1:]
    supervised = labels != IGNORED
    each = torch.nn.functional.cross_entropy(logits[:, :-1][supervised].float(), labels[supervised], reduction="none")
    sums = torch.zeros(len(labels), device=each.device).index_add(0, supervised.nonzero()[:, 0], each)
    return sums / supervised.sum(1).clamp(min=1)


@torch.no_grad()
def losses_of(model: Any, rows: list[Row], pad: int, batch_size: int = 64) -> Tensor:
    """The mean cross-entropy of each row's labelled tokens, (rows,) float32, in nats."""
    found = torch.zeros(len(rows))
    for indices, batch in batches_of(model, rows, pad, batch_size):
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**given, **prompt_argument(model, batch["labels"], batch["attention_mask"])).logits
        found[indices] = row_losses(logits, batch["labels"]).cpu()
    return found


def least_loss(models: Sequence[PreTrainedModel], bases: Bases, data: Data, budget: Budget) -> PreTrainedModel:
    """The model whose mean loss on the validation rows is least; what that takes is counted."""
    with budget.meter.counting():
        losses = [float(losses_of(model, data.validation, bases.tokenizer.pad_token_id).mean()) for model in models]
    return models[losses.index(min(losses))]
