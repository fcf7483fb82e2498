"""Where a model keeps what a composition needs: its layers, its positions, its cache.

Architectures put these under different names; this file finds them.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from calmlm.errors import ModelError

LAYER_NAMES = ("layers", "h", "blocks")
POSITION_NAMES = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding", "pos_embed")


def find_layers(
    model: PreTrainedModel, config: PreTrainedConfig, role: str, layers_path: str | None
) -> tuple[nn.Module, nn.ModuleList]:
    if layers_path is not None:
        return layers_at(model, role, layers_path)
    candidates = []
    for decoder in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if isinstance(decoder, nn.Module) and decoder is not model and decoder not in candidates:
            candidates.append(decoder)
    for decoder in candidates:
        for name in LAYER_NAMES:
            layers = getattr(decoder, name, None)
            if isinstance(layers, nn.ModuleList) and len(layers):
                return decoder, layers
    depth = getattr(config, "num_hidden_layers", None)
    for decoder in candidates:
        found = find_list(decoder, depth)
        if found is not None:
            return decoder, found
    raise ModelError(
        f"The layers of the {role} must be found in a module list, but {type(model).__name__} shows none of length "
        f"{depth}: name it with layers_path."
    )


def head_classes(encoder: PreTrainedModel) -> int:
    """Over how many classes an encoder's own head gives a distribution; 0 where there is no such head."""
    if encoder.config.is_encoder_decoder:
        return 0
    name = type(encoder).__name__
    if name.endswith("Classification"):
        return encoder.config.num_labels
    return encoder.config.vocab_size if name.endswith("CTC") else 0


def find_list(module: nn.Module, length: int | None, width: int | None = None) -> nn.ModuleList | None:
    """The first module list of this length, breadth first; with ``width``, all its members have a linear map of it."""
    queue = deque([module])
    while queue:
        module = queue.popleft()
        fits = isinstance(module, nn.ModuleList) and len(module) == length
        if fits and (width is None or all(_maps(member, width) for member in module.children())):
            return module  # type: ignore[return-value]
        queue.extend(module.children())
    return None


def find_encoder_layers(model: PreTrainedModel, length: int | None, width: int | None) -> nn.ModuleList | None:
    """An encoder's layers: what comes before them (the convolutions of Wav2Vec2) may be as many."""
    for part in (model.get_encoder(), getattr(model, "encoder", None), model):
        found = find_list(part, length, width) if isinstance(part, nn.Module) else None
        if found is not None:
            return found
    return find_list(model, length)


def _maps(module: nn.Module, width: int) -> bool:
    """Whether a linear map from or to states of this width is in ``module``."""
    return any(isinstance(m, nn.Linear) and width in (m.in_features, m.out_features) for m in module.modules())


def layers_at(model: PreTrainedModel, role: str, path: str) -> tuple[nn.Module, nn.ModuleList]:
    try:
        layers = model.get_submodule(path)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"layers_path must name a list of layers in the {role}, but {path!r} is none in {type(model).__name__}: "
            f"look at its named_modules()."
        )
    return model.base_model, layers


def find_cache_argument(model: PreTrainedModel, decoder: nn.Module) -> str | None:
    # A few models keep their past in a form of their own, which nothing else can carry along.
    if not model._supports_default_dynamic_cache():
        return None
    return next((name for name in ("past_key_values", "cache_params") if accepts(decoder, name)), None)


def find_state_layers(config: PreTrainedConfig) -> list[int]:
    """Which layers keep a state of their past, of linear attention or a convolution, besides keys and values."""
    layers = DynamicCache(config=config).layers
    return [index for index, layer in enumerate(layers) if isinstance(layer, LinearAttentionCacheLayerMixin)]


def find_turning_length(config: PreTrainedConfig) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [found for found in (rope, *rope.values()) if isinstance(found, dict)]  # of all layers, or by their type
    lengths = [found["original_max_position_embeddings"] for found in kinds if found.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def find_positions(decoder: nn.Module, layers: nn.ModuleList) -> list[Any]:
    """The modules and buffers outside the layers that hold embeddings of absolute positions."""
    found: list[Any] = []
    inside = {id(module) for layer in layers for module in layer.modules()}
    for owner in decoder.modules():
        if id(owner) in inside:
            continue
        held = (*owner.named_children(), *owner.named_buffers(recurse=False))
        found += [value for name, value in held if name in POSITION_NAMES]
    return found


def find_first_position(positions: list[Any]) -> int:
    """Position embeddings with a row for padding begin behind it."""
    paddings = [getattr(module, "padding_idx", None) for module in positions if isinstance(module, nn.Embedding)]
    return max((padding + 1 for padding in paddings if padding is not None), default=0)


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether ``module.forward`` names ``argument``."""
    return accepts_argument(module.forward, argument)


def accepts_argument(function: Callable[..., Any], argument: str) -> bool:
    """Whether ``function`` names ``argument``."""
    return argument in inspect.signature(function).parameters


def state_of(output: Any) -> Any:
    """The hidden state in a layer's output: older architectures return a tuple that begins with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_state(output: Any, state: Tensor) -> Any:
    """``output`` with its hidden state replaced."""
    return (state, *output[1:]) if isinstance(output, (tuple, list)) else state


def last_state(output: Any) -> Tensor:
    """The last state in a decoder's output."""
    found = getattr(output, "last_hidden_state", None)
    return output[0] if found is None else found


def with_last_state(output: Any, state: Tensor) -> Any:
    """A decoder's output with its last state replaced, in the list of all states as well."""
    if isinstance(output, tuple):
        return (state, *output[1:])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = (*output["hidden_states"][:-1], state)
    output["last_hidden_state"] = state
    return output
