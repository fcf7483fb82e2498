"""The name of a composition, by which trainers find its tokenizer and load it once more, as a reference.

One that was loaded is called after its folder or id. One in memory is called after a folder of this package that
stands for compositions that were not saved: loading it says so, and its tokenizer is the anchor's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from calmlm.bases.reaching import UNREACHED
from calmlm.config import split_gguf
from calmlm.errors import CheckpointError, first_line
from calmlm.files import storage
from calmlm.files.fetching import PRIVATE, fetch
from calmlm.files.loading import read_config
from calmlm.tokens.gguf_files import about_to_read
from calmlm.tokens.lookup import is_made_up

IN_MEMORY = str(Path(__file__).parent / "in_memory")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "revision", "subfolder")


class InMemory(str):
    """The name of a composition that was not saved, and where its anchor lies.

    A string, because trainers take names for strings; as the revisions of huggingface_hub, it knows more than it says.
    """

    anchor: dict[str, Any]

    def __new__(cls, name: str = IN_MEMORY, anchor: dict[str, Any] | None = None) -> InMemory:
        made = super().__new__(cls, name)
        made.anchor = anchor or {}
        return made

    def __str__(self) -> str:
        return self  # transformers makes a string of each name

    def __reduce__(self) -> tuple[type[InMemory], tuple[str, dict[str, Any]]]:
        return type(self), (str.__str__(self), self.anchor)


def name_of(source: str | Path, options: dict[str, Any]) -> str:
    """The name by which a composition that was loaded can be loaded once more.

    Args:
        source: the folder or id that was given.
        options: those that it was loaded with.
    """
    hub = {key: options[key] for key in HUB_ARGUMENTS if options.get(key)}
    if not Path(source).is_dir() and not {"revision", "subfolder"} & hub.keys():
        return str(source)  # a repository, as it stands now
    return str(fetch(source, storage.WEIGHTS_NAME, hub).parent.resolve())


def rename(model: PreTrainedModel, place: str | None) -> None:
    """Name a composition after the place from which it can be loaded once more, or after none."""
    model.name_or_path = place or ""
    model.config.name_or_path = place or InMemory(anchor=model.config.anchor)


def check_saved(source: str | Path) -> None:
    """Raise for the name of a composition in memory.

    Raises:
        CheckpointError: for that name.
    """
    if str(source) == IN_MEMORY:
        raise CheckpointError(
            "A composition must be saved before it can be loaded by its name, but this one is in memory only, or was "
            "trained or changed since it was loaded: save it and load it from its folder, or pass a copy where a "
            "reference is taken (ref_model=copy.deepcopy(model))."
        )


def _found(auto: Any, name: str, options: dict[str, Any]) -> Any:
    """The tokenizer or processor of a composition: its own, else its anchor's.

    Raises:
        CheckpointError: there is none.
    """
    hub = {key: options[key] for key in HUB_ARGUMENTS if options.get(key) is not None}
    options = {key: value for key, value in options.items() if key not in (*HUB_ARGUMENTS, *PRIVATE)}
    if str(name) == IN_MEMORY:
        anchor, folder = getattr(name, "anchor", {}), None
    else:
        try:
            beside = [
                cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub) for file in TOKENIZER_FILES
            ]
        except UNREACHED as error:
            raise CheckpointError(
                f"A composition must lie in a folder or on a hub that can be reached, but {str(name)!r} could not be "
                f"looked into ({first_line(error)}): check the name, your access and the network."
            ) from error
        if any(beside):
            return AutoTokenizer.from_pretrained(name, config=PreTrainedConfig(), **hub, **options)
        anchor, folder = read_config(name, hub).anchor, fetch(name, "config.json", hub).parent
    source = storage.resolve_source(anchor.get("id") or "", folder)
    hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    reason = "there is none"
    if source:
        try:
            place, file = split_gguf(source)
            if file is not None:
                about_to_read()
                auto, options = AutoTokenizer, options | {"gguf_file": file}
            found = auto.from_pretrained(place, revision=anchor.get("revision"), **hub, **options)
            if not isinstance(found, PreTrainedTokenizerBase) or not is_made_up(found):
                return found
        except Exception as error:  # transformers raises whatever the first missing file gives rise to
            reason = first_line(error)
    where = f"at {source!r}" if source else "for this one in memory"
    raise CheckpointError(
        f"A tokenizer must lie beside the composition or its anchor, but none was found {where} ({reason}): pass it as "
        f"processing_class= (or tokenizer=), or save it in the composition's folder."
    )


class CompositionTokenizer:
    """What ``AutoTokenizer`` takes for a composition without a tokenizer of its own."""

    @classmethod
    def from_pretrained(cls, name: str, *_: Any, **options: Any) -> Any:
        """The composition's tokenizer, else its anchor's.

        Raises:
            CheckpointError: there is none.
        """
        return _found(AutoTokenizer, name, options)


class CompositionProcessor:
    """What ``AutoProcessor`` takes for a composition; the anchor may be a model that sees."""

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Any:
        """The composition's tokenizer, else its anchor's processor or tokenizer.

        Raises:
            CheckpointError: there is none.
        """
        return _found(AutoProcessor, name, options)
