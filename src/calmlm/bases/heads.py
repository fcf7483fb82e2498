"""The head of a language model: what it makes of the last state, as one matrix or as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calmlm.bases.families import Backbone, text_config
from calmlm.bases.placement import execution_device
from calmlm.bases.structure import last_state
from calmlm.errors import ModelError

TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2
ROWS = 256  # of the last state's dimensions that a quantised head is asked for at a time


@torch.no_grad()
def output_matrix(model: PreTrainedModel, backbone: Backbone, role: str) -> tuple[Tensor, Tensor | None]:
    """The matrix E and the bias b of a model's head: its logits are E h + b, but for a cap on large ones.

    Args:
        model: a causal language model.
        backbone: its decoder.
        role: what to call it in messages.

    Returns:
        (V, D) and (V,) or None, float32 on the CPU; with the factor by which the model scales its logits.

    Raises:
        ModelError: for a model whose logits are not linear in its last state.
    """
    matrix: Tensor
    bias: Tensor | None
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if isinstance(head, nn.Linear) and isinstance(weight, Tensor) and type(weight.data) is Tensor:
        matrix, bias = weight.float().cpu(), None if head.bias is None else head.bias.float().cpu()
    else:
        device, width = execution_device(head), backbone.size
        zero = head(torch.zeros(1, width, dtype=backbone.dtype, device=device))[0].float().cpu()
        rows = [head(part.to(device, backbone.dtype)).float().cpu() - zero for part in torch.eye(width).split(ROWS)]
        matrix, bias = torch.cat(rows).T.contiguous(), zero if bool(zero.any()) else None

    def linear(states: Tensor) -> Tensor:
        found = states.float().cpu() @ matrix.T
        return found if bias is None else found + bias

    scale = _scale(model, backbone, linear, role)
    return matrix * scale, None if bias is None else bias * scale


@torch.no_grad()
def head_scale(model: PreTrainedModel, backbone: Backbone, role: str) -> float:
    """By how much a model multiplies what its head makes of the last state; 1 for most.

    Args:
        model: a causal language model.
        backbone: its decoder.
        role: what to call it in messages.

    Raises:
        ModelError: for a model whose logits are something else, but for a cap on large ones.
    """
    return _scale(model, backbone, model.get_output_embeddings(), role)


@torch.no_grad()
def head_logits(model: PreTrainedModel, states: Tensor, scale: float) -> Tensor:
    """A model's own logits from its last states: (n, D) to (n, V) float32.

    Args:
        model: a causal language model.
        states: its last states, behind its last norm.
        scale: see ``head_scale``.
    """
    head: Any = model.get_output_embeddings()
    logits: Tensor = scale * head(states.to(execution_device(head))).float()
    cap = getattr(text_config(model), "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def _scale(model: PreTrainedModel, backbone: Backbone, head: Callable[[Tensor], Tensor], role: str) -> float:
    """By how much a model multiplies the logits that ``head`` makes of its last states (n, D)."""
    states, logits = _asked(model, backbone)
    _check_width(states, model, backbone, role)
    expected = head(states).float().cpu()
    config = text_config(model)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.atanh((logits / cap).clamp(-0.9999, 0.9999))
        known = logits.abs() < 0.9 * cap
        logits, expected = logits * known, expected * known
    if logits.shape != expected.shape:
        raise _other(role, model)
    scale = float((logits * expected).sum() / expected.square().sum().clamp(min=1e-12))
    half = states.dtype in (torch.float16, torch.bfloat16) or getattr(model, "hf_quantizer", None) is not None
    off = (logits - scale * expected).norm() / logits.norm().clamp(min=1e-12)
    if not off <= (TOLERANCE_HALF if half else TOLERANCE):
        raise _other(role, model)
    return 1.0 if abs(scale - 1) < 1e-2 and half else scale


def check_last_state(model: PreTrainedModel, backbone: Backbone, role: str) -> None:
    """Raise where a model's last state has another width than its layers, as OPT-350m's.

    Raises:
        ModelError: for such a model.
    """
    _check_width(_asked(model, backbone)[0], model, backbone, role)


def _check_width(states: Tensor, model: PreTrainedModel, backbone: Backbone, role: str) -> None:
    """The same for last states (n, D) that are known."""
    if states.shape[-1] != backbone.size:
        raise ModelError(
            f"words need models whose last state is as wide as their layers ({backbone.size}), but that of the {role} "
            f"({type(model).__name__}) is {states.shape[-1]} wide: leave words out."
        )


@torch.no_grad()
def _asked(model: PreTrainedModel, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """A model's last states (n, D) and logits (n, V) of a few tokens."""
    states: list[Tensor] = []
    handle = backbone.decoder.register_forward_hook(lambda _, __, output: states.append(last_state(output)))
    training = model.training
    model.eval()
    try:
        ids = torch.arange(1, 9, device=execution_device(backbone.decoder))[None] % backbone.vocab_size
        given = {"use_cache": False} if backbone.takes_use_cache else {}
        logits = model(input_ids=ids, **given).logits[0].float().cpu()
    finally:
        handle.remove()
        model.train(training)
    return states[0][0], logits


def _other(role: str, model: PreTrainedModel) -> ModelError:
    return ModelError(
        f"words need models whose logits are their output embeddings times their last state, but those of the {role} "
        f"({type(model).__name__}) are not: leave words out."
    )
