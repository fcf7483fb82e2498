"""Both models' next-token probabilities at one fixed weight: what two models are worth without any training.

    p = (1 - w) p_B + w T p_A

T sends each of m_A's tokens to the anchor's first token of the same bytes. m_A has read the same bytes in tokens of its
own: its last states are those that an untrained composition by words brings to the anchor's positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from calmlm.causal_lm import CalmForCausalLM
from calmlm.data.labels import IGNORE
from calmlm.experiments.real.layout import AUGMENTING, batches, laid_out
from calmlm.experiments.real.measures import bits, text_of
from calmlm.experiments.real.systems import Composed, on_device
from calmlm.experiments.real.world import Item
from calmlm.tokens.vocabularies import first_tokens, with_firsts

__all__ = ["WEIGHTS", "Ensemble", "sent"]

WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
AT_ONCE = 64  # positions whose probabilities are there at a time
LEAST = 1e-12


def sent(probabilities: Tensor, table: Tensor, size: int) -> Tensor:
    """m_A's probabilities (n, V_A) over the anchor's tokens, (n, size); each row sums to 1.

    Args:
        probabilities: float32.
        table: see ``calmlm.tokens.vocabularies.first_tokens``.
        size: of the anchor's vocabulary.
    """
    known = table >= 0
    found = probabilities.new_zeros(len(probabilities), size)
    found.index_add_(1, table[known], probabilities[:, known])
    return found / found.sum(-1, keepdim=True).clamp(min=LEAST)


class Ensemble(Composed):
    """Two models at a fixed weight.

    Args:
        model: a composition with words and nothing trained, which predicts as the anchor does.
        tokenizer, augmenting_tokenizer: the models'.
        weight: of m_A.
    """

    def __init__(self, model: CalmForCausalLM, tokenizer: Any, augmenting_tokenizer: Any, weight: float = 0.5) -> None:
        super().__init__(model, tokenizer)
        self.weight = weight
        self.head: Any = model.augmenting[AUGMENTING].get_output_embeddings()
        self.size = len(model.lm_head.weight)  # type: ignore[arg-type]
        alignment = with_firsts(model.model.alignments[AUGMENTING], tokenizer, augmenting_tokenizer)
        self.table = first_tokens(alignment, self.size, len(self.head.weight)).to(model.device)
        self.heard = torch.zeros(0)
        words: Any = model.model.connectors[AUGMENTING][-1]  # type: ignore[index]
        words.map.register_forward_pre_hook(self._hear)

    def _hear(self, module: Any, given: tuple[Tensor, ...]) -> None:
        self.heard = given[0]

    def said(self, states: Tensor) -> Tensor:
        """What m_A would say in the anchor's tokens, (n, V_B) float32, from its states (n, D_A)."""
        logits = self.head(states.to(self.head.weight.dtype)).float()
        return sent(logits.softmax(-1), self.table, self.size)

    def column_nats(self, batch: dict[str, Any], width: int) -> Tensor:
        """Negative log-probabilities (n,) of a batch's labels at the ensemble's weight."""
        ours, theirs = self.both(batch, width)
        return -((1 - self.weight) * ours + self.weight * theirs).clamp(min=LEAST).log()

    def both(self, batch: dict[str, Any], width: int) -> tuple[Tensor, Tensor]:
        """The labels' probabilities by the anchor and by m_A, (n,) float32 each."""
        given = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.logits(given, batch["labels"], width)
        labels = batch["labels"][:, width:]
        counted = labels != IGNORE
        wanted = labels[counted]
        states = self.heard[:, width - 1 : -1][counted]
        parts = zip(logits[:, :-1][counted].split(AT_ONCE), states.split(AT_ONCE), wanted.split(AT_ONCE), strict=True)
        ours, theirs = [], []
        for logit, state, label in parts:
            ours.append(logit.float().softmax(-1).gather(1, label[:, None])[:, 0])
            theirs.append(self.said(state).gather(1, label[:, None])[:, 0])
        return torch.cat(ours), torch.cat(theirs)

    @torch.no_grad()
    def choose(self, items: Sequence[Item]) -> dict[float, float]:
        """Set the weight with which these items take least; return bits per byte by weight."""
        texts = [text_of(item, self.tokenizer) for item in items]
        nats = dict.fromkeys(WEIGHTS, 0.0)
        for chosen in batches(texts):
            batch, width = laid_out([texts[index] for index in chosen], self.pad)
            ours, theirs = self.both(on_device(batch, self.model.device), width)
            for weight in WEIGHTS:
                nats[weight] -= float(((1 - weight) * ours + weight * theirs).clamp(min=LEAST).log().sum())
        self.weight = min(nats, key=lambda weight: nats[weight])
        return {weight: round(bits([value], items), 4) for weight, value in nats.items()}

    def writing(self) -> dict[str, Any]:
        """Lets ``generate`` read the mixture."""
        return {"logits_processor": LogitsProcessorList([_Mixing(self)])}


class _Mixing(LogitsProcessor):
    """Mixes what m_A says into the anchor's next token."""

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        one, states = self.ensemble, self.ensemble.heard[:, -1]
        theirs = torch.cat([one.said(part) for part in states.split(AT_ONCE)])
        return ((1 - one.weight) * scores.float().softmax(-1) + one.weight * theirs).clamp(min=LEAST).log()
