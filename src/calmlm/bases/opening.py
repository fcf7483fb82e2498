"""Loading base models by id or folder, each as the class that it was saved as."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from calmlm.bases.origins import brings_code, check_folder, check_whole, class_named, describes
from calmlm.bases.reaching import UNREACHED
from calmlm.config import split_gguf
from calmlm.errors import ConfigError, ModelError, first_line
from calmlm.tokens.gguf_files import about_to_read, truthful

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")


def load_base(source: str, role: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a hub id or a folder.

    Args:
        source: id or folder.
        role: ``"anchor"`` or ``"augmenting model"``, for messages.
        options: passed to ``AutoModelForCausalLM.from_pretrained`` unless None; remote code is off unless
            ``trust_remote_code`` is given.

    Raises:
        ModelError: when there is no such model, it is no causal language model, or some of its weights are missing.
    """
    return _load(AutoModelForCausalLM, "causal language model", source, role, options)


def load_anchor(source: str, role: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model, or one that speaks and was saved as something else: a vision-language model.

    Otherwise like ``load_base``.
    """
    config = _saved_config(source, options)
    text = config is None or brings_code(config) or config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return (load_base if text else load_encoder)(source, role, **options)


def load_any(source: str, role: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model or, where the id or folder was saved as something else, the class that was saved.

    Raises:
        ModelError: when it is neither.
    """
    return (load_base if holds_decoder(source, **options) else load_encoder)(source, role, **options)


def load_again(source: str, role: str, architecture: str | None, **options: Any) -> PreTrainedModel:
    """Load a model of a composition as the class that it was then, where what lies there is one of that, or holds one.

    Otherwise like ``load_anchor`` and ``load_any``.
    """
    config, known = _saved_config(source, options), class_named(architecture)
    if config is None or known is None or brings_code(config):
        return (load_anchor if role == "anchor" else load_any)(source, role, **options)
    if architecture not in (config.architectures or ()) and not describes(config, known):
        return (load_anchor if role == "anchor" else load_any)(source, role, **options)
    return _load(known, "model", source, role, options)


def load_encoder(source: str, role: str, **options: Any) -> PreTrainedModel:
    """Load a text, image or sound encoder from a hub id or a folder, as the class that was saved.

    Otherwise like ``load_base``.
    """
    config = _saved_config(source, options)
    named = class_named(((config and config.architectures) or [""])[0]) or AutoModel
    return _load(named, "model", source, role, options)


def holds_decoder(source: str, **options: Any) -> bool:
    """Whether what lies at an id or in a folder was saved as a causal language model; True where nothing tells."""
    config = _saved_config(source, options)
    architectures = None if config is None else config.architectures
    if config is not None and brings_code(config):
        return True
    causal = {
        name
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([names] if isinstance(names, str) else names)
    }
    return not architectures or any(name in causal for name in architectures)


def _saved_config(source: str, options: dict[str, Any]) -> PreTrainedConfig | None:
    """The configuration that lies at an id or in a folder; None where there is none, and loading will say so."""
    hub = {key: value for key, value in options.items() if key in HUB_ARGUMENTS and value is not None}
    try:
        return saved_config(source, **hub)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def saved_config(source: str, **hub: Any) -> PreTrainedConfig:
    """The configuration that lies at an id or in a folder, or in a GGUF file there.

    Raises:
        OSError, ValueError, KeyError, ImportError: there is none that can be read.
    """
    place, file = split_gguf(source)
    if file is None:
        try:
            return AutoConfig.from_pretrained(source, **hub)
        except UNREACHED as error:
            if isinstance(error, (OSError, ValueError)):
                raise
            raise OSError(first_line(error)) from error
    about_to_read()
    try:
        return AutoConfig.from_pretrained(place, gguf_file=file, **hub)
    except (OSError, ValueError, KeyError, ImportError):
        raise
    except Exception as error:  # what reading a damaged file raises
        raise ValueError(first_line(error)) from error


def check_dtype(dtype: Any) -> None:
    """Raise unless a format of floating-point numbers is one of torch's, its name, or ``"auto"``.

    Raises:
        ConfigError: for another.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    floats = isinstance(found, dict) or (isinstance(found, torch.dtype) and found.is_floating_point)
    if dtype not in (None, "auto") and not floats:
        raise ConfigError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', but got {dtype!r}: use one.")


UNLOADED: tuple[type[Exception], ...] = (*UNREACHED, KeyError, TypeError, ImportError, RuntimeError)


def _load(auto: Any, kind: str, source: str, role: str, options: dict[str, Any]) -> PreTrainedModel:
    check_dtype(options.get("dtype"))
    place, file = split_gguf(source)
    options = {"trust_remote_code": False, "use_safetensors": True} | {
        k: v for k, v in options.items() if v is not None
    }
    if file is None:
        check_folder(source, role)
    else:
        about_to_read()
        options["gguf_file"] = file

    def load() -> tuple[Any, Any]:
        return auto.from_pretrained(place, output_loading_info=True, **options)  # type: ignore[no-any-return]

    try:
        model, report = load() if file is None else truthful(load)
    except UNLOADED as error:
        raise ModelError(
            f"The {role} must be the id or folder of a {kind}, but {source!r} could not be loaded "
            f"({first_line(error)}): check the name, the revision and your access to it."
        ) from error
    except Exception as error:  # a damaged weights file raises an error type of the safetensors package's own
        kinds = ("safetensors", "safetensors_rust", "builtins")
        if file is None and type(error).__module__.split(".")[0] not in kinds:
            raise
        raise ModelError(
            f"The {role} must have readable weights, but those of {source!r} are damaged "
            f"({first_line(error)}): fetch or save the model again."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would draw them at random
        raise ModelError(
            f"The {role} must come with all its weights, but those of {source!r} lack {len(missing)} tensors, for "
            f"example {missing[0]!r}: choose a complete {kind}."
        )
    if file is not None:  # transformers names it after the folder, which may hold several
        model.name_or_path = model.config.name_or_path = source
    check_whole(model, role)
    return model
