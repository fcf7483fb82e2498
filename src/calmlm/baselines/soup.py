"""Model soups (Wortsman et al., 2022): the average of weights, uniform or greedy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from calmlm.baselines import fine_tuning
from calmlm.baselines.given import Bases, Budget, Data, check_same_shapes, losses_of

__all__ = ["fit", "fit_greedily", "greedy", "uniform", "weighted"]


def weighted(models: Sequence[PreTrainedModel], shares: Sequence[float]) -> PreTrainedModel:
    """A sum of all weights: ``theta = sum_i s_i theta_i``, in the first model's form.

    Raises:
        ModelError: when the models differ in shape.
    """
    check_same_shapes(list(models), "A soup")
    states = [model.state_dict() for model in models]
    mean = {}
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            mean[name] = sum(share * state[name].float() for share, state in zip(shares, states, strict=True)).to(
                tensor.dtype
            )
        else:
            mean[name] = tensor
    made = copy.deepcopy(models[0])
    made.load_state_dict(mean)
    return made.eval()


def uniform(models: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """The mean of all weights: ``theta = (1/n) sum_i theta_i``.

    Raises:
        ModelError: when the models differ in shape.
    """
    return weighted(models, [1 / len(models)] * len(models))


def greedy(models: Sequence[PreTrainedModel], score: Callable[[PreTrainedModel], float]) -> PreTrainedModel:
    """Take models in the order of their scores, and keep each that does not lower the score of the soup."""
    order = sorted(models, key=score, reverse=True)
    chosen, best = [order[0]], score(order[0])
    for model in order[1:]:
        tried = score(uniform([*chosen, model]))
        if tried >= best:
            chosen, best = [*chosen, model], tried
    return uniform(chosen)


def fit(bases: Bases, data: Data, budget: Budget) -> PreTrainedModel:
    """The mean of m_B and its twin; nothing is trained."""
    return uniform(bases.merging_pair("A soup"))


def fit_greedily(bases: Bases, data: Data, budget: Budget) -> PreTrainedModel:
    """A greedy soup of m_B, its twin and m_B fine-tuned on D_C, chosen by the loss on the validation rows."""
    anchor, twin = bases.merging_pair("A soup")
    pad = bases.tokenizer.pad_token_id
    tuned = fine_tuning.fit(bases, data, budget)
    with budget.meter.counting():
        return greedy([anchor, twin, tuned], lambda model: -float(losses_of(model, data.validation, pad).mean()))
