"""Fingerprints of base models: a composition runs on the models that it was made on, or not at all."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calmlm.bases.placement import real_parameters
from calmlm.bases.sharding import is_absent, is_sharded, shape_of
from calmlm.errors import CheckpointError

SAMPLE = 256  # values per tensor that go into a fingerprint
DIFFERENCES = {
    "architecture": "of another architecture",
    "shapes": "with tensors of other names or shapes",
    "values": "with other weights",
}


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a base model: its architecture, the shapes of its tensors and a sample of their values.

    The sample is rounded to bfloat16 first, so that a model loaded in float32 or bfloat16 keeps its fingerprint.

    Returns:
        ``{"architecture", "shapes", "values", "dtype"}``: a class name, two sha256 digests, and the dtype of the
        weights; ``values`` is None for quantised weights, whose numbers depend on the quantiser, and for weights that
        other processes hold.
    """
    quantised = _is_quantised(model)
    unknown = quantised or any(is_sharded(tensor) for tensor in model.parameters())
    values = hashlib.sha256()
    for _, tensor in () if unknown else real_parameters(model):
        if is_absent(tensor):
            unknown = True
            break
        values.update(sampled(tensor).view(torch.int16).numpy().tobytes())
    return {
        "architecture": type(model).__name__,
        "shapes": None if quantised else shapes_of(model),
        "values": None if unknown else values.hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _is_quantised(model: PreTrainedModel) -> bool:
    """Whether a model's tensors are a quantiser's; transformers unpacks some GGUF files as it loads them.

    torchao can quantise a model in memory, of which only its tensors tell.
    """
    if any(type(tensor.detach()) is not Tensor and not is_sharded(tensor) for tensor in model.parameters()):
        return True
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None or getattr(quantiser.quantization_config, "quant_method", None) != "gguf":
        return quantiser is not None
    return any(tensor.dtype in (torch.uint8, torch.int8) for tensor in (*model.parameters(), *model.buffers()))


def shapes_of(model: PreTrainedModel) -> str:
    """A sha256 digest of the names and shapes of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name}:{shape_of(tensor)};".encode())
    return digest.hexdigest()


def sampled(tensor: Tensor, loaded_as: torch.dtype | None = None) -> Tensor:
    """Up to ``SAMPLE`` values from all over a tensor, or from what it is loaded as, rounded to bfloat16, on the CPU."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].to(loaded_as or tensor.dtype).to("cpu", torch.bfloat16)


def comparable(first: str, second: str | None) -> bool:
    """Whether the same weights in these two dtypes have equal samples; float16 rounds otherwise than bfloat16."""
    return first == second or {first, second} <= {"float32", "bfloat16"}


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

    Raises:
        CheckpointError: naming both models.
    """
    if not expected:
        return
    found = fingerprint(model)
    key = difference(found, expected)
    if key is None:
        return
    made, now = f"{wanted!r} ({expected.get('architecture')})", f"{got!r} ({found['architecture']})"
    if wanted == got:
        raise CheckpointError(
            f"The {role} must be {made} as it was when this composition was made, but it has changed since and "
            f"is now a model {DIFFERENCES[key]}: bring that model back, or pass it as "
            f"{'anchor' if role == 'anchor' else 'augmenting'}=."
        )
    raise CheckpointError(
        f"The {role} must be {made}, on which this composition was made, but got {now}, a model "
        f"{DIFFERENCES[key]}: load it on the model that it was made on."
    )


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """In which of ``DIFFERENCES`` two fingerprints differ first; None where nothing is known to differ.

    Values are compared where both sides are of one dtype, or of float32 and bfloat16; others round differently, so that
    only architecture and shapes can be held against each other.
    """
    keys = ["architecture", "shapes", *(["values"] if comparable(found["dtype"], expected.get("dtype")) else [])]
    different = (key for key in keys if None not in (found[key], expected.get(key)) and found[key] != expected[key])
    return next(different, None)
