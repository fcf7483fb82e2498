"""In which form a base model comes: its file, number format, quantisation and devices, each model its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GgufConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from calmlm.config import gguf_name, split_gguf
from calmlm.errors import ConfigError, first_line

SAME = "same"
"""What an augmenting model's setting is by default: the anchor's."""


@dataclass(frozen=True)
class Form:
    """How one base model is loaded.

    Attributes:
        revision: commit, branch or tag.
        gguf_file: a file at its id or in its folder.
        dtype, device_map, quantization_config: as ``from_pretrained`` takes them; the last also as a mapping.
    """

    revision: str | None = None
    gguf_file: str | None = None
    dtype: Any = None
    device_map: Any = None
    quantization_config: Any = None

    def name(self, source: str | Path) -> str:
        """The model's name, its file included."""
        return gguf_name(str(source), self.gguf_file)

    def options(self, source: str) -> dict[str, Any]:
        """Options of ``from_pretrained`` for what lies at ``source``; those of GGUF files go to such files alone.

        Raises:
            ConfigError: for a mapping that describes no quantisation.
        """
        quantization = self.quantization_config
        if isinstance(quantization, Mapping):
            try:
                quantization = AutoQuantizationConfig.from_dict(dict(quantization))
            except Exception as error:  # whatever the method's own class raises
                raise ConfigError(
                    f"quantization_config must describe a quantisation of transformers, with a quant_method, but got "
                    f"{dict(quantization)!r} ({first_line(error)}): write it as a model's config.json does."
                ) from error
        if isinstance(quantization, GgufConfig) and split_gguf(source)[1] is None:
            quantization = None
        return {"dtype": self.dtype, "device_map": self.device_map, "quantization_config": quantization}


def forms(names: Sequence[str], anchor: Form, *, several: bool, **given: Any) -> dict[str, Form]:
    """The forms of augmenting models, by name.

    Args:
        names: of the models.
        anchor: of the anchor, whose settings are taken where ``SAME`` was given.
        several: whether the models were given by name, so that settings may be, too.
        given: the fields of ``Form``, each for all models or a mapping by name.
    """
    made = {}
    for name in names:
        fields = {}
        for field, value in given.items():
            usual = SAME if field in ("dtype", "device_map", "quantization_config") else None
            if several and isinstance(value, Mapping) and value and set(value) <= set(names):
                value = value.get(name, usual)
            fields[field] = getattr(anchor, field) if isinstance(value, str) and value == SAME else value
        made[name] = Form(**fields)
    return made


def recorded(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What a composition's configuration says of the form of a model, besides its name."""
    if split_gguf(name)[1] is None or getattr(model, "hf_quantizer", None) is not None:
        return {}
    return {"dequantize": True}


def of_entry(entry: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by which the model that an entry of a configuration describes is loaded again, as it was.

    Args:
        entry: of ``CalmConfig``.
        name: where the model lies.
        options: given for this time, which win; None counts as not given.
    """
    found = {key: value for key, value in options.items() if value is not None}
    if split_gguf(name)[1] is None:
        return found
    dtype = (entry.get("fingerprint") or {}).get("dtype")
    usual: dict[str, Any] = {}
    if dtype is not None and isinstance(getattr(torch, dtype, None), torch.dtype):
        usual["dtype"] = dtype
    if entry.get("dequantize"):
        usual["quantization_config"] = GgufConfig(dequantize=True)
    return usual | found
