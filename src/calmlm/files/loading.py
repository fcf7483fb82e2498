"""Loading a saved composition: its configuration, its base models by id and revision, then its own tensors."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any, TypeVar

from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from calmlm.bases.families import Backbone
from calmlm.bases.fingerprint import check_fingerprint
from calmlm.bases.forms import SAME, Form, forms, of_entry
from calmlm.bases.opening import load_again
from calmlm.bases.origins import check_whole, named_origin, origin_in_memory
from calmlm.config import READS, WORDS, CalmConfig, ConnectorConfig, opening_of, resolve_connections
from calmlm.errors import CheckpointError, ConfigError, first_line, warn
from calmlm.files import storage
from calmlm.files.fetching import HUB_ARGUMENTS, PRIVATE, REACH, fetch, fetch_inside
from calmlm.files.paths import named
from calmlm.tokens.alignment import Alignment, is_of
from calmlm.tokens.collecting import without_collector
from calmlm.tokens.gguf_files import reading_once
from calmlm.tokens.lookup import find_tokenizer
from calmlm.tokens.retokenization import Rewriting

Model = TypeVar("Model", bound=PreTrainedModel)


@reading_once()
def load_composition(
    cls: type[Model],
    source: str | Path,
    *,
    anchor: PreTrainedModel | str | Path | None = None,
    augmenting: PreTrainedModel | str | Path | dict[str, PreTrainedModel | str | Path] | None = None,
    config: CalmConfig | None = None,
    revision: str | None = None,
    subfolder: str = "",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    augmenting_gguf_file: str | dict[str, str] | None = None,
    dtype: Any = None,
    augmenting_dtype: Any = SAME,
    device_map: Any = None,
    augmenting_device_map: Any = SAME,
    quantization_config: Any = None,
    augmenting_quantization_config: Any = SAME,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> Model:
    """Load the composition at ``source`` into a ``cls``; see ``CalmForCausalLM.from_pretrained``.

    Raises:
        CheckpointError: when ``source`` holds no composition, a damaged one, or one made on other bases.
        ModelError: when a base model cannot be loaded.
    """
    hub = {key: options[key] for key in HUB_ARGUMENTS if options.get(key) is not None}
    hub |= {"revision": revision, "subfolder": subfolder.strip("/")}
    # A copy, as of every model: what is done to this composition is done to no other that was loaded by it.
    config = copy.deepcopy(config) if isinstance(config, CalmConfig) else read_config(source, hub)
    weights = fetch(source, storage.WEIGHTS_NAME, hub)
    folder = weights.parent
    fetch_inside(source, config, folder, hub)
    if not isinstance(augmenting, dict):
        names = list(config.augmenting)
        augmenting = {names[0]: augmenting} if augmenting is not None else {}
    unknown = sorted(set(augmenting) - set(config.augmenting))
    if unknown:
        raise CheckpointError(
            f"augmenting must name models of this composition ({', '.join(config.augmenting)}), "
            f"but got {', '.join(unknown)}: use its names."
        )

    # A commit of this repository is none of the bases'.
    options = {key: value for key, value in options.items() if key not in PRIVATE}
    settings = {"trust_remote_code": trust_remote_code, **options}
    form = Form(None, gguf_file, dtype, device_map, quantization_config)
    anchor_model = _base(anchor, config.anchor, "anchor", source, folder, form, settings)
    several = len(config.augmenting) > 1
    each = forms(
        list(config.augmenting),
        form,
        several=True,
        gguf_file=augmenting_gguf_file,
        dtype=augmenting_dtype,
        device_map=augmenting_device_map,
        quantization_config=augmenting_quantization_config,
    )
    augmenting_models = {
        name: _base(
            augmenting.get(name),
            entry,
            f"augmenting model {name!r}" if several else "augmenting model",
            source,
            folder,
            each[name],
            settings,
        )
        for name, entry in config.augmenting.items()
    }
    for name, augmenting_model in augmenting_models.items():
        _check_entry(config.augmenting[name], anchor_model, augmenting_model, config, source)
    config.text_config = anchor_model.config.get_text_config(decoder=True)
    alignments = {
        name: read_alignment(source, name, hub) for name, entry in config.augmenting.items() if entry["reads"] == "text"
    }
    for name, alignment in alignments.items():
        _check_firsts(config.augmenting[name], alignment, name, source)
        _check_tokenizers(alignment, name, anchor_model, augmenting_models[name], config)
    generation = copy.deepcopy(generation_config) or read_generation(source, hub)
    model = cls(config, anchor_model, augmenting_models, alignments)
    try:
        expected = model.composition_tensors()
        for name, entry in config.augmenting.items():
            _check_opening(entry, name, model.model.backbone(name).vocab_size, source)
        for name, alignment in alignments.items():
            _check_ids(alignment, name, model.model.backbone(name).vocab_size, source)
        tensors = storage.read_tensors(weights, expected.items(), str(source))
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.data = parameter.data.to(tensors[name].dtype)
        model.load_state_dict(tensors, strict=False)
    except BaseException:
        for name in augmenting_models:  # an anchor that was passed stays as it was
            model.model.remove(name)
        raise
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def _base(
    given: Any,
    entry: dict[str, Any],
    role: str,
    source: str | Path,
    folder: Path,
    form: Form,
    settings: dict[str, Any],
) -> PreTrainedModel:
    """One base model of the composition in ``folder``: the one that was recorded, or the same one given.

    Args:
        given: a model, an id or a folder instead of the recorded one; None for that.
        entry: what the configuration says of it, with a name that leads nowhere replaced by one that does.
        role: what to call it in messages.
        source: what to call the composition.
        folder: where its files lie; folders of bases are recorded relative to it.
        form: in which it is loaded.
        settings: further options of ``from_pretrained``.

    Raises:
        CheckpointError: when none was recorded or given, or it is another one.
        ModelError: when it cannot be loaded or has adapters.
    """
    recorded = entry.get("id") or ""
    if given is None and not recorded:
        raise CheckpointError(
            f"The {role} of {str(source)!r} must be passed to from_pretrained, because it was a model in memory "
            f"that has no id, but got none: pass it as {'anchor' if role == 'anchor' else 'augmenting'}=model."
        )
    wanted = entry["id"] = storage.resolve_source(recorded, folder)
    made = (entry.get("fingerprint") or {}).get("architecture")
    if given is None:
        name, found = wanted, (wanted, entry.get("revision"))
        again = of_entry(entry, name, {**settings, **form.options(name)})
        model: Any = load_again(name, role, made, revision=found[1], **again)
    elif isinstance(given, (str, Path)):
        name = form.name(named(given))
        found = named_origin(name, None, **{key: settings[key] for key in REACH if key in settings})
        again = of_entry(entry, name, {**settings, **form.options(name)})
        model = load_again(name, role, made, revision=found[1], **again)
    else:
        check_whole(given, role)
        if not isinstance(given, PreTrainedModel):
            Backbone.of(given, role)  # says what is wrong with it
        model, name = given, f"{given.name_or_path or type(given).__name__} (in memory)"
        found = None
    check_fingerprint(model, entry.get("fingerprint"), role, wanted or "(in memory)", name)
    if not wanted or (os.path.isabs(wanted) and not os.path.exists(wanted)):
        entry["id"], entry["revision"] = found or origin_in_memory(model, None)[0]
    return model


def read_config(source: str | Path, hub: dict[str, Any] | None = None) -> CalmConfig:
    """The configuration of the composition at ``source``.

    Raises:
        CheckpointError: when there is none, or it belongs to another kind of model.
    """
    path = fetch(source, "config.json", hub or {})
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{str(source)!r} must hold a readable config.json, but it is damaged ({first_line(error)}): "
            f"save the composition again or fetch it anew."
        ) from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind != CalmConfig.model_type or not data.get("augmenting"):
        raise CheckpointError(
            f"{str(source)!r} must hold a calmlm composition, but its config.json describes "
            f"{kind or 'nothing known'!r}: give the folder that save_pretrained wrote."
        )
    if not _is_whole(data):
        raise CheckpointError(
            f"{str(source)!r} must describe an anchor and, for each augmenting model, connections and a connector, but "
            f"its config.json lacks some of them: save the composition again or fetch it anew."
        )
    try:
        return CalmConfig.from_json_file(path)  # which knows how infinities are written
    except Exception as error:  # a value of the wrong kind may raise any exception
        raise CheckpointError(
            f"{str(source)!r} must hold a readable config.json, but the anchor's part of it is damaged "
            f"({first_line(error)}): save the composition again or fetch it anew."
        ) from error


def _is_whole(data: dict[str, Any]) -> bool:
    """Whether all that a composition's own configuration needs is there, and of its kind."""
    if not all(isinstance(data.get(key), dict) for key in ("anchor", "text_config", "augmenting")):
        return False
    if not isinstance(data.get("order", []), list) or not isinstance(data["text_config"].get("model_type"), str):
        return False
    for entry in data["augmenting"].values():
        pairs = entry.get("connections") if isinstance(entry, dict) else None
        if not isinstance(pairs, list) or not isinstance(entry.get("connector"), dict):
            return False
        if not all(isinstance(pair, list) and [type(layer) for layer in pair] == [int, int] for pair in pairs):
            return False
        if not _are_words(entry.get("words")) or not _are_adapters(entry.get("adapters")):
            return False
        for part in ("beginning", "prefix"):
            before = entry.get(part, [])
            if not isinstance(before, list) or not all(type(index) is int and index >= 0 for index in before):
                return False
        if entry.get("reads", "tokens") not in READS or not isinstance(entry["connector"].get("num_heads"), int):
            return False
    for entry in (data["anchor"], *data["augmenting"].values()):
        mark = entry.get("fingerprint")
        named = all(entry.get(key) is None or isinstance(entry[key], str) for key in ("id", "revision", "layers_path"))
        marked = mark is None or (
            isinstance(mark, dict) and all(value is None or isinstance(value, str) for value in mark.values())
        )
        if not named or not marked or type(entry.get("dequantize", False)) is not bool:
            return False
    return True


def _are_words(found: Any) -> bool:
    """Whether this describes words, or none; those without a kind are maps."""
    if found is None:
        return True
    if not isinstance(found, dict) or found.get("kind", "map") not in WORDS:
        return False
    own = "train_map" if found.get("kind", "map") == "map" else "scale"
    numbers = (found.get("bias", 0.0), found.get("scale", 1.0))
    return (
        not set(found) - {"kind", "bias", own}
        and all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
        and (own == "train_map" or "scale" in found)
        and type(found.get("train_map", False)) is bool
    )


def _are_adapters(found: Any) -> bool:
    """Whether this describes adapters, or none."""
    if found is None:
        return True
    if not isinstance(found, dict) or set(found) != {"rank", "scaling", "dropout", "targets"}:
        return False
    targets = found["targets"]
    return (
        type(found["rank"]) is int
        and found["rank"] > 0
        and all(type(found[key]) in (int, float) and math.isfinite(found[key]) for key in ("scaling", "dropout"))
        and 0 <= found["dropout"] < 1
        and isinstance(targets, dict)
        and all(isinstance(size, list) and [type(width) for width in size] == [int, int] for size in targets.values())
    )


def read_generation(source: str | Path, hub: dict[str, Any]) -> GenerationConfig | None:
    """How the composition at ``source`` generates; None where it does not say, so that the anchor's settings hold.

    Raises:
        CheckpointError: when it says so in a file that is damaged.
    """
    given = {key: value for key, value in hub.items() if value is not None}
    try:
        path = cached_file(str(source), storage.GENERATION_NAME, _raise_exceptions_for_missing_entries=False, **given)
        return None if path is None else GenerationConfig.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except Exception as error:  # a value of the wrong kind may raise any exception
        raise CheckpointError(
            f"{str(source)!r} must hold a readable {storage.GENERATION_NAME} or none, but it is damaged or out of "
            f"reach ({first_line(error)}): save the composition again or fetch it anew."
        ) from error


@without_collector()
def read_alignment(source: str | Path, name: str, hub: dict[str, Any]) -> Alignment | Rewriting:
    """The alignment of one augmenting model, as it was when the composition was made.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    path = fetch(source, storage.alignment_name(name), hub)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Rewriting.from_json(data) if "method" in data else Alignment.from_json(data)
    except BaseException as error:  # the tokenizers library raises bare exceptions, and panics, for what it cannot read
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(
            f"{str(source)!r} must hold a readable {path.name}, but it is damaged ({first_line(error)}): "
            f"save the composition again or fetch it anew."
        ) from error


def _check_ids(alignment: Alignment | Rewriting, name: str, size: int, source: str | Path) -> None:
    """Raise if a text may need tokens that the augmenting model does not have.

    Raises:
        CheckpointError: for such an alignment.
    """
    if alignment.highest >= size:
        raise CheckpointError(
            f"{str(source)!r} must hold an alignment for the {size} tokens of {name!r}, but "
            f"{storage.alignment_name(name)} asks for token {alignment.highest}: it belongs to another composition."
        )


def _check_firsts(entry: dict[str, Any], alignment: Alignment | Rewriting, name: str, source: str | Path) -> None:
    """Raise if an ingestor or a pointer asks for the anchor's first tokens, and the alignment does not know them.

    Raises:
        CheckpointError: for such an alignment.
    """
    table = alignment if isinstance(alignment, Alignment) else alignment.alignment
    asks = entry["connector"].get("ingestor") == "anchor" or (entry.get("words") or {}).get("kind") == "pointer"
    if asks and not any(index is not None for index in table.firsts):
        raise CheckpointError(
            f"{str(source)!r} must hold the anchor's first tokens of those of {name!r}, but "
            f"{storage.alignment_name(name)} has none: it belongs to another composition."
        )


def _check_opening(entry: dict[str, Any], name: str, size: int, source: str | Path) -> None:
    """Raise if a beginning or prefix holds tokens that the augmenting model does not have.

    Raises:
        CheckpointError: for such a one.
    """
    highest = max(opening_of(entry), default=-1)
    if highest >= size:
        raise CheckpointError(
            f"{str(source)!r} must begin texts with tokens of {name!r}, which has {size}, but its config.json asks for "
            f"token {highest}: it belongs to another composition."
        )


def _check_tokenizers(
    alignment: Alignment | Rewriting,
    name: str,
    anchor: PreTrainedModel,
    augmenting: PreTrainedModel,
    config: CalmConfig,
) -> None:
    """Warn where the tokenizers that lie beside both models are not those that the alignment was made from."""
    found = []
    for model, entry in ((anchor, config.anchor), (augmenting, config.augmenting[name])):
        revision = entry.get("revision") if model.name_or_path == entry.get("id") else None
        place = model.name_or_path
        found.append(find_tokenizer(place, revision=revision, local_files_only=True) if place else None)
    if None in found or any(not hasattr(tokenizer, "backend_tokenizer") for tokenizer in found):
        return  # the saved table needs neither
    if not is_of(alignment.digest, *found, templates=getattr(alignment, "view", None) is not None):
        warn(
            f"The tokenizer of the anchor or of the augmenting model {name!r}, with its special tokens and its chat "
            f"template, is not the one that this composition was made with: its saved table still reads by the old "
            f"ones. Use those to write its input."
        )


def _check_entry(
    entry: dict[str, Any], anchor: PreTrainedModel, augmenting: PreTrainedModel, config: CalmConfig, source: str | Path
) -> None:
    """Raise unless the connections and the connector of ``entry`` fit the two models."""
    above = Backbone.of(anchor, "anchor", config.anchor.get("layers_path"))
    find = Backbone.of_encoder if entry.get("reads") == "inputs" else Backbone.of
    below = find(augmenting, "augmenting model", entry.get("layers_path"))
    try:
        if entry["connections"] or not entry.get("words"):
            resolve_connections(entry["connections"], len(below.layers), len(above.layers))
        entry["connector"] = vars(ConnectorConfig.build(entry["connector"], above.size, above.num_heads))
        for target, size in (entry.get("adapters") or {}).get("targets", {}).items():
            _check_target(above.decoder, target, size)
    except ConfigError as error:
        raise CheckpointError(
            f"{str(source)!r} must hold connections that fit its models, but its config.json is damaged "
            f"({first_line(error)}): save the composition again or fetch it anew."
        ) from error


def _check_target(decoder: Any, target: str, size: list[int]) -> None:
    """Raise unless the anchor has a linear map of this name, inputs and outputs."""
    found = dict(decoder.named_modules()).get(target)
    if isinstance(found, Conv1D):
        widths = [found.nx, found.nf]
    else:
        widths = [getattr(found, "in_features", None), getattr(found, "out_features", None)]
    if widths != size:
        raise ConfigError(f"{target!r} in the anchor is no linear map from {size[0]} to {size[1]}")
