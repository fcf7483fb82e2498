"""Where a base model lies: an id or a folder is recorded only where loading it gives the model that was composed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, is_offline_mode, resolve_revision
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from calmlm.bases.fingerprint import has_changed, sampled, shapes_of
from calmlm.bases.peft_parts import peft_class, tuner_layers
from calmlm.bases.sharding import is_absent
from calmlm.config import CalmConfig, gguf_name, split_gguf
from calmlm.errors import ModelError, warn

ADAPTER_FILE = "adapter_config.json"
SETTINGS = ("rope_parameters", "sliding_window", "layer_types")  # that people change, and no weight shows
Origin = tuple[str, str | None]
"""An id and its revision, or an absolute folder and None; ``("", None)`` for a model that lies nowhere."""


def check_whole(model: Any, role: str) -> None:
    """Raise where a model is more than one set of weights with one name: adapters, or a composition.

    Raises:
        ModelError: for such a model.
    """
    layers, wrapper = tuner_layers(), peft_class("peft_model", "PeftModel")
    adapted = isinstance(model, torch.nn.Module) and any(isinstance(module, layers) for module in model.modules())
    if adapted or isinstance(model, wrapper):
        raise _adapted(role, getattr(model, "name_or_path", "") or type(model).__name__)
    if isinstance(model, PreTrainedModel) and model.config.model_type == CalmConfig.model_type:
        raise _composed(role, model.name_or_path or type(model).__name__)


def check_folder(source: str, role: str) -> None:
    """Raise where a folder holds an adapter or a composition, before it is loaded.

    Raises:
        ModelError: for such a folder.
    """
    folder = Path(source)
    if not os.path.isdir(source):
        return
    if (folder / ADAPTER_FILE).is_file():
        raise _adapted(role, source)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # loading says what is wrong with it
    if isinstance(found, dict) and found.get("model_type") == CalmConfig.model_type:
        raise _composed(role, source)


def check_config(config: Any, source: str, role: str) -> None:
    """Raise where a configuration is a composition's.

    Raises:
        ModelError: for such a configuration.
    """
    if config.model_type == CalmConfig.model_type:
        raise _composed(role, source)


def _adapted(role: str, name: str) -> ModelError:
    return ModelError(
        f"The {role} must be a model without adapters, but {name!r} has some (PEFT): merge them with "
        f"merge_and_unload(), save the merged model with save_pretrained, and compose from its folder."
    )


def _composed(role: str, name: str) -> ModelError:
    return ModelError(
        f"The {role} must be a single model, but {name!r} is a composition: pass all augmenting models to compose by "
        f"name, or join them with add_augmenting."
    )


def class_named(name: str | None) -> type[PreTrainedModel] | None:
    """The class of models that transformers exports by this name; None where there is none."""
    found: Any = getattr(transformers, name or "", None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        return None
    return found if getattr(found, "config_class", None) is not None else None


def describes(config: PreTrainedConfig, kind: type[PreTrainedModel]) -> bool:
    """Whether a configuration, or a part of it, is one of this class of models."""
    if type(config) is kind.config_class:
        return True
    parts = [getattr(config, key, None) for key in config.sub_configs]
    return any(isinstance(part, PreTrainedConfig) and describes(part, kind) for part in parts)


def brings_code(config: PreTrainedConfig) -> bool:
    """Whether a model brings code of its own for a causal language model."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _has_name(model: PreTrainedModel) -> bool:
    """Whether a model's class can be found again by name: transformers exports it, or knows it of its configuration."""
    kind = type(model)
    if class_named(kind.__name__) is kind or kind.__module__.startswith("transformers_modules."):
        return True
    found = [mapping.get(type(model.config), None) for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)]
    return any(kind in known if isinstance(known, tuple) else kind is known for known in found)


def _is_class_of(model: PreTrainedModel, folder: Path) -> bool:
    """Whether what lies in a folder is loaded as a model's class once more, see ``opening.load_again``."""
    kind = type(model)
    if not _has_name(model):
        return False
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # what a damaged configuration, or one with code of its own, raises
        return True
    listed = kind.__name__ in (config.architectures or [kind.__name__])
    if class_named(kind.__name__) is not kind or listed or brings_code(config):
        return True
    return describes(config, kind) and not _lacks_some(kind, folder)


def _lacks_some(kind: type[PreTrainedModel], folder: Path) -> bool:
    """Whether a folder lacks tensors of this class of models, which are drawn at random then; no values are kept."""
    told = logging.get_verbosity()
    logging.set_verbosity_error()
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    try:
        with torch.random.fork_rng(devices=[]):
            _, report = kind.from_pretrained(folder, device_map="meta", output_loading_info=True, **options)
        return bool(report["missing_keys"])
    except Exception:  # what a model's own code raises on a device without values
        return False
    finally:
        logging.set_verbosity(told)


def named_origin(source: str, revision: str | None, **hub: Any) -> Origin:
    """The origin of a model that is to be loaded by name, and stays the same if its repository moves on.

    Args:
        source: id or folder.
        revision: the revision that was asked for.
        hub: ``token``, ``cache_dir`` and ``local_files_only``, where given.
    """
    place, file = split_gguf(source)
    if Path(place).is_dir():
        return gguf_name(str(Path(place).resolve()), file), revision
    return source, commit_of(place, revision, **hub) or revision


def commit_of(source: str, revision: str | None = None, **hub: Any) -> str | None:
    """The commit that a revision of a repository stands at now; None where that cannot be found out."""
    hub["local_files_only"] = hub.get("local_files_only") or is_offline_mode()
    try:
        return resolve_revision(source, revision=revision, **hub).resolved
    except Exception:  # no such repository, no right to it, no network, ...: loading says what is wrong
        return None


def origin_in_memory(model: PreTrainedModel, revision: str | None) -> tuple[Origin, bool]:
    """The origin of a model that was given in memory, which may have changed since it was loaded.

    Args:
        model: as given.
        revision: of which it is said to be, or None.

    Returns:
        the origin, and whether it is certain: False for a name that is neither a folder nor in the hub's cache.
    """
    name = os.path.expanduser(model.name_or_path or "")
    if not name:
        return ("", None), True
    place, file = split_gguf(name)
    if file is not None:
        found = os.path.isfile(os.path.join(place, file))
        return ((str(Path(place).resolve() / file), None) if found else (name, commit_of(place, revision))), True
    if os.path.isdir(name) and _is_class_of(model, Path(name)) and difference(model, Path(name)) is None:
        return (str(Path(name).resolve()), None), True
    snapshots = _snapshots(name, revision)
    for snapshot in snapshots:
        if _is_class_of(model, snapshot) and difference(model, snapshot) is None:
            return (name, snapshot.name), True
    nowhere = snapshots or os.path.isdir(name) or not _has_name(model)
    return (("", None), True) if nowhere else ((name, revision), False)


def _snapshots(name: str, revision: str | None) -> list[Path]:
    """What the hub's cache holds of a repository: the folders of its commits, the likeliest first."""
    try:
        root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
        found = sorted(path for path in root.iterdir() if path.is_dir())
    except (OSError, ValueError):
        return []
    likely = commit_of(name, revision, local_files_only=True)
    return sorted(found, key=lambda path: path.name != likely)


def warn_of_changes(bases: Iterable[tuple[str, PreTrainedModel, dict[str, Any]]]) -> None:
    """Warn of each base that the names in a composition's configuration would not lead to: it is named, not saved.

    Args:
        bases: name and model of each, and what the configuration says of it.
    """
    for name, model, entry in bases:
        source = entry.get("id") or ""
        if has_changed(model, entry.get("fingerprint")):
            message = (
                f"The model {name!r} has changed since it was composed, and the composition is saved without it: "
                f"save that model, and compose anew from what was saved."
            )
        elif not source and model.name_or_path and not _has_name(model):
            message = (
                f"The model {name!r} was given in memory as a {type(model).__name__}, which transformers does not load "
                f"by name, so that the composition is saved without a name for it: pass it to from_pretrained each "
                f"time."
            )
        elif not source and model.name_or_path:
            message = (
                f"The model {name!r} was given in memory and is not what lies at {model.name_or_path!r}, so that the "
                f"composition is saved without a name for it: pass it to from_pretrained each time, or save that model "
                f"in a folder of its own and compose from there."
            )
        elif os.path.isabs(source) and (reason := difference(model, Path(source))):
            message = (
                f"What lies at {source!r} is no longer the model {name!r} that was composed ({reason}), and the "
                f"composition is saved without it: put that model back, or save it elsewhere and compose from there."
            )
        else:
            continue
        warn(message)


def difference(model: PreTrainedModel, folder: Path) -> str | None:
    """How a model differs from the one that lies in a folder, as far as a fingerprint would tell; None for equals.

    Nothing is loaded: the shapes are those of an empty model of the folder's configuration, and of the weights only
    the samples are read.
    """
    if folder.is_file():
        return None  # a GGUF file, of which only loading it would tell
    files = _weights(folder)
    if not (folder / "config.json").is_file() or not files:
        return "no weights in safetensors lie there"
    if getattr(model, "hf_quantizer", None) is not None or any(is_absent(p) for p in model.parameters()):
        return None
    empty = _empty_like(model, folder)
    if empty is not None:
        if shapes_of(empty) != shapes_of(model):
            return "its tensors have other names or shapes"
        changed = [key for key in SETTINGS if getattr(empty.config, key, None) != getattr(model.config, key, None)]
        if changed:
            return f"its configuration has another {changed[0]}"
    try:
        return _difference_of_values(model, files)
    except (OSError, SafetensorError):
        return "its weights cannot be read"


def _empty_like(model: PreTrainedModel, folder: Path) -> PreTrainedModel | None:
    """A model without weights, as the folder's configuration describes it; None where it cannot be made."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        if type(config) is not type(model.config):
            config = config.get_text_config()
        if type(config) is not type(model.config):
            return None
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return type(model)(config)
    except Exception:  # what a model's own code raises on a device without values
        return None


def _weights(folder: Path) -> dict[str, Path]:
    """The files of a folder's tensors, by the tensors' names."""
    try:
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / SAFE_WEIGHTS_NAME)
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        return {name: folder / file for name, file in index["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
        return {}


def _difference_of_values(model: PreTrainedModel, files: dict[str, Path]) -> str | None:
    parameters, stored = dict(model.named_parameters()), {}
    for name in parameters:  # one that is renamed or joined with others on loading is passed over
        found = next((stored_as for stored_as in _names(model, name) if stored_as in files), None)
        if found is not None:
            stored[name] = found
    # RWKV scales its weights when it runs.
    rescaled = any(hasattr(module, "layers_are_rescaled") for module in model.modules())
    for path in () if rescaled else set(files.values()):
        with safe_open(path, framework="pt") as file:
            for name, found in stored.items():
                if files[found] != path:
                    continue
                ours, theirs = parameters[name], file.get_tensor(found)
                if ours.shape == theirs.shape and not torch.equal(sampled(ours), sampled(theirs, ours.dtype)):
                    return "its weights are others"
    known = set(model.state_dict())
    if not all(known.intersection(_names(model, name)) for name in files):
        return None  # the names in the files are not those in the model, so that they cannot tell what is missing
    tied: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), set()).update(_names(model, name))
    return None if all(names & files.keys() for names in tied.values()) else "some of its tensors are missing there"


def _names(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """How a tensor may be called: models are saved with and without their heads."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)
