"""Base models as ``compose`` takes them: loaded ones, ids, folders and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from calmlm.bases.fingerprint import fingerprint
from calmlm.bases.forms import Form, recorded
from calmlm.bases.origins import Origin, check_whole, named_origin, origin_in_memory
from calmlm.config import split_gguf
from calmlm.errors import ConfigError, warn
from calmlm.files.paths import named
from calmlm.tokens.lookup import find_tokenizer

NOT_RECORDED = frozenset(("subfolder", "variant", "config", "key_mapping", "ignore_mismatched_sizes", "adapter_kwargs"))
"""Options of ``from_pretrained`` that make another model of what lies at an id, as all settings of its configuration
do."""


def is_name(source: Any) -> bool:
    """Whether a model is named, and not loaded already."""
    return isinstance(source, (str, Path))


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether an augmenting model reads text as the anchor does, rather than inputs of its own."""
    speaks = isinstance(model, GenerationMixin) and model.get_output_embeddings() is not None
    return speaks and not model.config.is_encoder_decoder


def check_options(given: list[str]) -> None:
    """Raise for options that change what lies at an id, which nobody would know of when the composition is loaded.

    Raises:
        ConfigError: naming them.
    """
    if given:
        raise ConfigError(
            f"A model must be all that lies at its id or folder, but {', '.join(given)} would change that: save the "
            f"model that you want with save_pretrained, and compose from its own folder."
        )


def opened_model(
    source: Any, role: str, load: Callable[..., PreTrainedModel], form: Form, hub: Any, shared: Any
) -> tuple[Any, Origin]:
    """A base model, loaded where it is named, and its origin."""
    if not is_name(source):
        check_whole(source, role)
        if not isinstance(source, PreTrainedModel):
            return source, ("", None)  # Backbone says what is wrong with it
        if form.gguf_file is not None and split_gguf(source.name_or_path)[1] is None:
            source.name_or_path = form.name(source.name_or_path)
        origin, certain = origin_in_memory(source, form.revision)
        if not certain:
            warn(
                f"The {role} in memory is called {origin[0]!r}, which is neither a folder here nor in the hub's cache: "
                f"pass its id or full path itself, or loading the composition may not find it."
            )
        return source, origin
    name = form.name(named(source))
    origin = named_origin(name, form.revision, **hub)
    model = load(name, role, revision=origin[1], **shared, **form.options(name))
    given = {key for key, value in shared.items() if value is not None}
    check_options(sorted(given & set(model.config.to_dict())))
    return model, origin


def entry_of(model: PreTrainedModel, origin: Origin, layers_path: str | None) -> dict[str, Any]:
    """What a composition's configuration says of a base model itself."""
    entry = {"id": origin[0], "revision": origin[1], "fingerprint": fingerprint(model), **recorded(model, origin[0])}
    return entry | ({"layers_path": layers_path} if layers_path else {})


def tokenizer_of(model: PreTrainedModel, origin: Origin, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies where a model lies, or where a model in memory came from; None where there is none."""
    source, revision = origin if origin[0] else (model.name_or_path, None)
    return find_tokenizer(source, revision=revision, **options) if source else None
