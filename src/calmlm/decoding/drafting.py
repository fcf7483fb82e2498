"""Drafting: the augmenting model reads every token anyway, so it proposes tokens and the composition checks them.

A round: the augmenting model reads the last token and writes up to ``num_tokens`` further ones, each from its own
distribution; the anchor reads all of them in one call and keeps those that the composition would have written. The
augmenting model's states over them are those that the connections need, so that drafting costs its output embeddings
and, where a draft is refused, the steps that were in vain. (A model that reads the text in tokens of its own drafts in
these, and reads the text anew for the connections: see ``own_drafts``.)

Greedy decoding gives the same tokens as without drafts; sampling keeps the composition's distribution (speculative
sampling: Leviathan et al. 2023, algorithm 1; Chen et al. 2023). Acceptance, cropping and streaming are transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator

from calmlm.decoding.limits import DraftLimits
from calmlm.errors import ConfigError
from calmlm.modeling import CalmModel
from calmlm.readers import Inputs, OwnReader, SharedReader

__all__ = ["AugmentingCandidateGenerator", "DraftConfig", "DraftStatistics", "Drafter", "Drafts"]

_PRIOR, _WEIGHT, _MEMORY = 0.9, 4.0, 0.95
"""What share of drafts is accepted before any were made, how many such drafts that counts for, what a round forgets."""
_CHECK, _MORE = 0.3, 0.03
"""What a call over several tokens costs more than one over a single token, and what each further token adds, relative
to that single one; measured on a CPU, where both depend on the model little (512 wide with 12 layers, 96 with 16)."""
_PAUSE = 16
"""Rounds without a draft after which one is tried again."""


@dataclass
class DraftStatistics:
    """What drafting did, over all calls of ``generate`` with one ``DraftConfig``."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    tokens: int = 0
    recent_accepted: float = _PRIOR * _WEIGHT
    recent_tried: float = _WEIGHT
    paused: int = 0

    def reset(self) -> None:
        """Set the counts to zero; the expected share of accepted tokens stays."""
        self.drafted = self.accepted = self.passes = self.tokens = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that the composition kept."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens written per call of the anchor."""
        return self.tokens / self.passes if self.passes else 0.0


@dataclass(frozen=True)
class DraftConfig:
    """How an augmenting model drafts.

    Attributes:
        augmenting: its name; by default the first that shares the anchor's token ids, or else the first that reads the
            text in its own tokens.
        num_tokens: tokens that are drafted at most before the composition checks them.
        adaptive: whether the draft gets shorter while few of its tokens are accepted, down to none at all.
        confidence: a draft ends with the first token to which the augmenting model gives less probability.
        statistics: what was done, counted over all calls with this object. With ``adaptive``, later calls begin with
            what earlier ones have shown, so that sampling is repeatable with a new object only.

    Raises:
        ConfigError: for values outside their ranges.
    """

    augmenting: str | None = None
    num_tokens: int = 8
    adaptive: bool = True
    confidence: float = 0.3
    statistics: DraftStatistics = field(default_factory=DraftStatistics, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.num_tokens, bool) or not isinstance(self.num_tokens, int) or self.num_tokens < 1:
            raise ConfigError(
                f"num_tokens must be a whole number of at least 1, but got {self.num_tokens!r}: leave drafting out for "
                f"none."
            )
        if isinstance(self.confidence, bool) or not isinstance(self.confidence, (int, float)):
            raise ConfigError(f"confidence must be a number, but got {self.confidence!r}: give 0 for no limit.")
        if not 0 <= self.confidence <= 1:
            raise ConfigError(f"confidence must lie between 0 and 1, but got {self.confidence}: give 0 for no limit.")


class Drafter:
    """Which augmenting model drafts and how; stands where transformers' ``generate`` takes an assistant model.

    Args:
        model: the composition.
        settings: what the caller asked for.

    Raises:
        ConfigError: when no augmenting model can draft, or the one that is named cannot.
    """

    def __init__(self, model: CalmModel, settings: DraftConfig) -> None:
        self.settings = settings
        self.name = _drafting_model(model, settings.augmenting)
        # generate compares vocabularies, which here are the same by construction.
        self.config = model.config


def _drafting_model(model: CalmModel, name: str | None) -> str:
    can = [
        other
        for other in model.augmenting
        if other in model.active
        and _drafts(model.reader(other))
        and model.augmenting[other].get_output_embeddings() is not None  # type: ignore[operator]
    ]
    if name is None:
        if not can:
            raise ConfigError(
                "Drafting must have an augmenting model that reads the anchor's ids or, with alignment='own', its "
                "own, and has output embeddings, but none of this composition's that is switched on does: leave "
                "drafting out."
            )
        return min(can, key=lambda other: not isinstance(model.reader(other), SharedReader))
    if name not in can:
        which = ", ".join(can) or "none of this composition's"
        raise ConfigError(
            f"The drafting model must be one that reads the anchor's token ids or, with alignment='own', its own, has "
            f"output embeddings and is switched on ({which}), but got {name!r}: name one of these."
        )
    return name


def _drafts(reader: Any) -> bool:
    return isinstance(reader, SharedReader) or (isinstance(reader, OwnReader) and reader.backbone.branches)


class DraftLength:
    """How many tokens to draft: as many as promise the most tokens for the time, given how many were accepted so far.

    With ``a`` the share of drafts accepted, a draft of ``k`` tokens yields ``1 + a + ... + a^k`` tokens. In units of an
    anchor's call over one token it costs ``1.3 + 0.03 k`` for the anchor and ``(k + 1) c`` for the augmenting model,
    where ``c`` is the larger of the two models' ratios of layers and of parameters. Nothing is timed, so that a seed
    gives the same tokens again. What was accepted is remembered in the statistics of the ``DraftConfig``.
    """

    def __init__(self, settings: DraftConfig, cost: float) -> None:
        self.settings, self.cost, self.known = settings, cost, settings.statistics

    def next(self) -> int:
        """Tokens of the next draft at most."""
        if not self.settings.adaptive:
            return self.settings.num_tokens
        share = min(self.known.recent_accepted / self.known.recent_tried, 0.98)
        best, best_rate, expected = 0, 1 / (1 + self.cost), 1.0
        for count in range(1, self.settings.num_tokens + 1):
            expected += share**count
            rate = expected / (1 + _CHECK + _MORE * count + (count + 1) * self.cost)
            if rate > best_rate:
                best, best_rate = count, rate
        self.known.paused = 0 if best else self.known.paused + 1
        if self.known.paused > _PAUSE:
            self.known.paused, best = 0, 1
        return best

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of a draft and of how much of it was accepted."""
        if drafted:
            self.known.recent_accepted = _MEMORY * self.known.recent_accepted + accepted
            self.known.recent_tried = _MEMORY * self.known.recent_tried + min(accepted + 1, drafted)


class Drafts(CandidateGenerator):
    """Drafts by an augmenting model, on the composition's own cache.

    Args:
        model: the composition.
        drafter: which augmenting model drafts, and how.
        limits: where a draft has to end.
        cost: what a drafted token costs the augmenting model, in its own steps.
    """

    def __init__(self, model: CalmModel, drafter: Drafter, limits: DraftLimits, cost: float = 1.0) -> None:
        self.cache, self.limits, self.name, self.settings = limits.cache, limits, drafter.name, drafter.settings
        self.cache.check(model.bearers())
        self.length = DraftLength(drafter.settings, cost * _cost(model, drafter.name))
        self.drafted = 0

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Take note of how many of the draft's tokens were kept."""
        accepted = min(int(num_matches), self.drafted)
        self.length.learn(self.drafted, accepted)
        statistics = self.settings.statistics
        statistics.drafted += self.drafted
        statistics.accepted += accepted
        statistics.passes += 1
        statistics.tokens += int(num_matches) + 1


class AugmentingCandidateGenerator(Drafts):
    """Drafts by a model that shares the anchor's token ids.

    Args:
        model, drafter, limits: see ``Drafts``.
        input_ids: (1, T), what ``generate`` starts from: the whole text, or what follows the cache's tokens.
        logits_processor: applied to the draft's scores as to the composition's.
        generation_config: of this call.
        model_kwargs: of this call; its cache is followed as it grows.
    """

    def __init__(
        self,
        model: CalmModel,
        drafter: Drafter,
        limits: DraftLimits,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        super().__init__(model, drafter, limits)
        reader = model.reader(drafter.name)
        assert isinstance(reader, SharedReader)
        self.reader = reader
        self.processor, self.sample = logits_processor, bool(generation_config.do_sample)
        self.end = generation_config._eos_token_tensor
        self.vocabulary = model.backbone().vocab_size
        self.mask, self.positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        self.total = limits.before + input_ids.shape[1]
        self.known = model.abilities.shared_ids

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Draft.

        Args:
            input_ids: (1, T), the text so far.

        Returns:
            the text with the draft behind it, (1, T + k), and the draft's processed scores, (1, k, V) float32, or None
            for no draft.
        """
        text, before = input_ids.shape[1], self.limits.before
        seen, scores = self.cache.get_seq_length() - before, []
        limit = min(self.length.next(), self.limits.room(text, seen))
        self.drafted = 0
        if limit <= 0:
            return input_ids, None
        past = self.cache.part(self.name)
        for _ in range(limit):
            logits = self._read(input_ids[:, seen:], before + seen, past)
            seen = input_ids.shape[1]
            processed = self._drawable(self.processor(input_ids, self._of_anchor(logits)))
            if not bool(processed.isfinite().any()):
                break
            scores.append(processed)
            probabilities = processed.softmax(-1)
            token = torch.multinomial(probabilities, 1) if self.sample else processed.argmax(-1, keepdim=True)
            input_ids = torch.cat((input_ids, token.to(input_ids.device)), dim=1)
            ended = self.end is not None and bool(torch.isin(token, self.end.to(token.device)).any())
            if ended or float(probabilities.gather(-1, token).min()) < self.settings.confidence:
                break
        self.drafted = self.limits.readable(input_ids, text)
        scores = scores[: self.drafted]
        return input_ids[:, : text + self.drafted], torch.stack(scores, dim=1) if scores else None

    def _read(self, ids: Tensor, start: int, past: Any) -> Tensor:
        end = start + ids.shape[1]
        mask = self.mask
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, max(0, end - mask.shape[1])), value=1)[:, :end]
        return self.reader.draft(Inputs(ids, mask, self._positions(start, end), None, None), past)

    def _positions(self, start: int, end: int) -> Tensor | None:
        """Positions of the columns from ``start`` to ``end``, those after the prompt counted on from its last."""
        given = self.positions
        if given is None:
            return None
        known = given[..., start - self.total :] if start < self.total else given[..., :0]
        new = torch.arange(max(start, self.total), end, device=given.device) - (self.total - 1)
        return torch.cat((known, given[..., -1:] + new), dim=-1)

    def _of_anchor(self, logits: Tensor) -> Tensor:
        """Scores over the anchor's vocabulary, in float32."""
        logits = logits.float()[..., : self.vocabulary]
        return torch.nn.functional.pad(logits, (0, self.vocabulary - logits.shape[-1]), value=float("-inf"))

    def _drawable(self, scores: Tensor) -> Tensor:
        """Processed scores, without tokens that a model which shares the ids does not know and could not read."""
        scores = scores.masked_fill(scores.isnan(), float("-inf"))
        if self.known < self.vocabulary:
            scores[..., self.known :] = float("-inf")
        return scores


def _cost(model: CalmModel, name: str) -> float:
    """A step of the augmenting model relative to one of the anchor."""
    one, other = model.backbone(name), model.backbone()
    sizes = [sum(p.numel() for layer in found.layers for p in layer.parameters()) for found in (one, other)]
    return max(len(one.layers) / len(other.layers), sizes[0] / max(sizes[1], 1))
