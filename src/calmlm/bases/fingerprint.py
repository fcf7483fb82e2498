"""Fingerprints of base models: a composition runs on the models that it was made on, or not at all."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from calmlm.errors import CheckpointError

SAMPLE = 256  # values per tensor that go into a fingerprint


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a base model: its architecture, the shapes of its tensors and a sample of their values.

    The sample is rounded to bfloat16 first, so that a model loaded in float32 or bfloat16 keeps its fingerprint.

    Returns:
        ``{"architecture", "shapes", "values", "dtype"}``: a class name, two sha256 digests, and the dtype of the
        weights; ``values`` is None for quantised weights, whose numbers depend on the quantiser.
    """
    shapes, values, quantised = hashlib.sha256(), hashlib.sha256(), getattr(model, "hf_quantizer", None) is not None
    for name, tensor in sorted(model.named_parameters()):
        shapes.update(f"{name}:{tuple(tensor.shape)};".encode())
        if quantised or tensor.is_meta:
            quantised = True
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].to("cpu", torch.bfloat16)
        values.update(sample.view(torch.int16).numpy().tobytes())
    return {
        "architecture": type(model).__name__,
        "shapes": None if quantised else shapes.hexdigest(),
        "values": None if quantised else values.hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def has_changed(model: PreTrainedModel, expected: dict[str, Any] | None) -> bool:
    """Whether a model is no longer what its fingerprint was taken of; what RWKV scales when it runs does not count."""
    if any(hasattr(module, "layers_are_rescaled") for module in model.modules()):
        return False
    try:
        check_fingerprint(model, expected, "", "", "")
    except CheckpointError:
        return True
    return False


def check_fingerprint(
    model: PreTrainedModel, expected: dict[str, Any] | None, role: str, wanted: str, got: str
) -> None:
    """Raise unless ``model`` is the base that a composition was made on.

    Values are compared where both sides are float32 or bfloat16; other dtypes round differently, so that only
    architecture and shapes can be held against each other.

    Raises:
        CheckpointError: naming both models.
    """
    if not expected:
        return
    found = fingerprint(model)
    keys = ["architecture", "shapes"]
    if {found["dtype"], expected.get("dtype")} <= {"float32", "bfloat16"}:
        keys.append("values")
    for key in keys:
        if None not in (found[key], expected.get(key)) and found[key] != expected[key]:
            raise CheckpointError(
                f"The {role} must be {wanted!r} ({expected.get('architecture')}), on which this composition was made, "
                f"but got {got!r} ({found['architecture']}) with other {key}: load it on the model that it was made on."
            )
