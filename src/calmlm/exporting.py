"""A composition with both of its models in one folder, which loads anywhere without a hub.

config.json, model.safetensors, ...   the composition, which names its bases by their places in the folder
anchor/                               the anchor, as it lay where it was loaded from
augmenting/NAME/                      each augmenting model
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from calmlm.bases.reaching import UNREACHED
from calmlm.causal_lm import CalmForCausalLM
from calmlm.config import CalmConfig, check_names, split_gguf
from calmlm.errors import CalmError, CheckpointError, ConfigError, ModelError, first_line
from calmlm.files import storage
from calmlm.files.card import CARD_NAME, model_card, with_bases
from calmlm.files.fetching import fetch, fetch_inside
from calmlm.files.leaderboards import RESULTS
from calmlm.files.loading import read_config
from calmlm.files.naming import check_saved
from calmlm.files.paths import expanded, lies_in

WORDS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "*.spm", "*.bpe", "bpe.codes", "tekken.json", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
"""What a tokenizer is made of."""
SETTINGS = ("config.json", "generation_config.json", "*processor_config.json", CARD_NAME)
PAPERS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "*TERMS*")
OWN = ("alignment.*.json", f"{RESULTS}/*.yaml")
"""What a composition has besides."""
MARGIN = 2**24  # bytes for what the export writes itself, and for the folders


@dataclass(frozen=True)
class _Part:
    """Files that are copied from one folder.

    Attributes:
        folder: where they lie.
        names: of the files, relative to it.
        title: what to call it in messages.
    """

    folder: Path
    names: tuple[str, ...]
    title: str

    @property
    def size(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.names)

    def copy(self, target: Path) -> None:
        for name in self.names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, target / name)


def export(
    source: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a composition and all of its models to one folder, which can be moved and needs no hub.

    The models' files are copied as they lie. The folder is loaded once, to see that nothing is missing, and appears in
    one step when all of that is done.

    Args:
        source: folder or id of a composition.
        target: the folder to write.
        overwrite: whether an earlier export there is replaced.
        trust_remote_code: whether code that comes with a model may run when the folder is loaded.
        report: takes a line about what is copied.

    Returns:
        the folder.

    Raises:
        ConfigError: the folder is not to be replaced, cannot be written, or has no room.
        CheckpointError: there is no composition, a damaged one, or one made on other bases than those that lie there.
        ModelError: a base lies nowhere, or cannot be had whole.
    """
    source, place = expanded(str(source)), Path(os.path.abspath(expanded(str(target))))
    check_saved(source)
    _check_target(place, overwrite)
    config = read_config(source)
    check_names(config.augmenting)
    own = _composition(source, config)
    entries = {"anchor": config.anchor} | {f"augmenting/{name}": entry for name, entry in config.augmenting.items()}
    parts: dict[str, _Part] = {}
    lie: dict[str, str] = {}
    found: dict[tuple[str, str | None], str] = {}
    for where, entry in entries.items():
        key = (storage.resolve_source(entry.get("id") or "", own.folder), entry.get("revision"))
        if key not in found:
            parts[where], found[key] = _base(where, *key), where
        file = split_gguf(key[0])[1]
        lie[where] = found[key] if file is None else f"{found[key]}/{file}"
    _check_apart(place, [own, *parts.values()])
    _check_room(place, sum(part.size for part in (own, *parts.values())))
    report(f"Copying {sum(part.size for part in parts.values()) / 1e9:.1f} GB of models to {place}")
    written = own.folder / CARD_NAME
    card = with_bases(written.read_text(encoding="utf-8") if written.is_file() else model_card(config))
    try:
        with storage.replacing_folder(place) as fresh:
            own.copy(fresh)
            for where, part in parts.items():
                part.copy(fresh / where)
            for where, entry in entries.items():
                entry |= {"id": str(fresh / lie[where]), "revision": None}
            storage.write_text(fresh / "config.json", storage.portable_config(config, fresh).to_json_string())
            storage.write_text(fresh / CARD_NAME, card)
            _check_loads(fresh, source, place, trust_remote_code)
    except OSError as error:
        raise ConfigError(
            f"The export must go to a folder that can be written to, but {place} could not "
            f"({error.strerror or first_line(error)}): name another, or make room."
        ) from error
    return place


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise unless an export may be written there.

    Raises:
        ConfigError: it is a file, holds something that is not to be replaced, or cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"The export must go to a folder, but {target} is a file or a link: name another.")
    try:
        storage.probe_place(target.parent)
        holds = target.exists() and any(target.iterdir())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The export must go to a folder that can be written to, but {target} is none ({first_line(error)}): name "
            f"another."
        ) from None
    if not holds:
        return
    if not overwrite:
        raise ConfigError(
            f"The export must go to an empty folder, but {target} holds files: name another, or replace an earlier "
            f"export with --overwrite."
        )
    if not (_kind(target) == CalmConfig.model_type and (target / "anchor").is_dir()):
        raise ConfigError(
            f"What is overwritten must be an earlier export, but {target} holds other files: name another folder."
        )


def _kind(folder: Path) -> Any:
    """What a folder's config.json says that it is; None where it says nothing."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("model_type") if isinstance(found, dict) else None


def _check_apart(target: Path, parts: Iterable[_Part]) -> None:
    """Raise where replacing the target would remove what is copied.

    Raises:
        ConfigError: naming that part.
    """
    real = target.resolve()
    for part in parts:
        if real == part.folder.resolve() or real in part.folder.resolve().parents:
            raise ConfigError(
                f"The export must go to a folder apart from what is exported, but {target} holds {part.title}: name "
                f"another."
            )


def _check_room(target: Path, size: int) -> None:
    """Raise where the disk has no room.

    Raises:
        ConfigError: saying how much is needed.
    """
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size + MARGIN:
        raise ConfigError(
            f"The export needs room for {(size + MARGIN) / 1e9:.2f} GB at {target}, but its disk has "
            f"{free / 1e9:.2f} GB left: free some, or name a folder on another disk."
        )


def _composition(source: str, config: CalmConfig) -> _Part:
    """The composition's own files."""
    if not Path(source).is_dir():
        _fetch(source, None, [storage.WEIGHTS_NAME, *SETTINGS, *WORDS, *PAPERS, *OWN])
    folder = fetch(source, storage.WEIGHTS_NAME, {}).parent
    fetch_inside(source, config, folder, {})
    for name, entry in config.augmenting.items():
        if entry["reads"] == "text":
            fetch(source, storage.alignment_name(name), {})
    title = f"the composition {source!r}"
    return _Part(
        folder,
        _contained(folder, title, [storage.WEIGHTS_NAME, *_matching(folder, *SETTINGS, *WORDS, *PAPERS, *OWN)]),
        title,
    )


def _base(where: str, source: str, revision: str | None) -> _Part:
    """The files of one base model.

    Args:
        where: its place in the export.
        source: folder or id, or a GGUF file there.
        revision: of an id.

    Raises:
        ModelError: it lies nowhere, or not whole.
    """
    title = f"the model {where.removeprefix('augmenting/')!r}"
    place, file = split_gguf(source)
    if not source:
        raise ModelError(
            f"All models of an export must lie in a folder or have an id, but {title} was given in memory; save it, "
            f"and compose from its folder."
        )
    folder = Path(place)
    if not folder.is_dir():
        if os.path.isabs(place):
            raise ModelError(
                f"All models of an export must lie in a folder or have an id, but {title} is no longer at "
                f"{source!r}; put it back, or compose from where it lies."
            )
        weights = ["*.safetensors", SAFE_WEIGHTS_INDEX_NAME, "*.py"] if file is None else [file]
        folder = _fetch(place, revision, [*weights, *SETTINGS, *WORDS, *PAPERS], file)
    if file is None:
        texts = _matching(folder, *SETTINGS, *WORDS, *PAPERS)
        names = [*_weights(folder, title), *texts, *_code(folder, texts, title)]
    else:  # whose folder may be anybody's
        names = [file, *_matching(folder, *WORDS, *PAPERS)]
    if file is not None and not (folder / file).is_file():
        raise ModelError(f"{title[:1].upper()}{title[1:]} must lie at {source!r}, but there is none; put it back.")
    return _Part(folder, _contained(folder, title, names), title)


def _fetch(place: str, revision: str | None, patterns: list[str], file: str | None = None) -> Path:
    """The folder of a repository in the hub's cache, filled where the hub can be reached.

    Raises:
        ModelError: it can neither be reached nor found in the cache.
    """
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=patterns))
    except UNREACHED as error:  # the cache may hold what is needed, and not all that was asked for
        try:
            known = cached_file(place, file or "config.json", revision=revision, local_files_only=True)
        except (OSError, ValueError):
            known = None
        if known is None:
            raise ModelError(
                f"All models of an export must be in reach, but {place!r} is neither on the hub nor in its cache "
                f"({first_line(error)}); check the name, the token and the network."
            ) from error
        return Path(known).parents[len(Path(file).parts) - 1 if file else 0]


def _weights(folder: Path, title: str) -> list[str]:
    """The files of a model's weights: those that transformers loads, and no others that lie beside them.

    Raises:
        ModelError: there are none, or some of them are missing.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    try:
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        names = [SAFE_WEIGHTS_INDEX_NAME, *sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        names = []
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ModelError(
            f"{title[:1].upper()}{title[1:]} must have its weights as safetensors, but {folder} lacks "
            f"{missing[0] if missing else SAFE_WEIGHTS_NAME}; fetch or save the model again."
        )
    return names


def _matching(folder: Path, *patterns: str) -> list[str]:
    """The files whose names match, relative to the folder; nothing else that lies there is copied."""
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return sorted({path.relative_to(folder).as_posix() for path in found})


def _code(folder: Path, texts: Iterable[str], title: str) -> list[str]:
    """Code that comes with a model and that its configuration names; it runs with ``trust_remote_code`` alone.

    Raises:
        ModelError: it lies in another repository.
    """
    named = [value for text in texts if text.endswith(".json") and (value := _auto_map(folder / text))]
    if not named:
        return []
    elsewhere = [value for value in named if "--" in value]
    if elsewhere:
        raise ModelError(
            f"All parts of an export must lie with its models, but {title} takes its code from another repository "
            f"({elsewhere[0].partition('--')[0].split()[-1]}); save the model with its code first."
        )
    return sorted(path.name for path in folder.glob("*.py"))


def _auto_map(path: Path) -> str:
    """What a configuration says about code of its own, in words; nothing where it has none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    named = found.get("auto_map") if isinstance(found, dict) else None
    values = named.values() if isinstance(named, dict) else named if isinstance(named, list) else []
    return " ".join(str(part) for value in values for part in (value if isinstance(value, list) else [value]) if part)


def _contained(folder: Path, title: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, where each leads to a file in the folder, or among the blobs of the hub's cache.

    Raises:
        CheckpointError: for a name that leads elsewhere.
    """
    unique = tuple(dict.fromkeys(names))
    for name in unique:
        if ".." in Path(name).parts or os.path.isabs(name) or not lies_in(folder / name, folder):
            raise CheckpointError(
                f"{title[:1].upper()}{title[1:]} must lie in its folder, but {name!r} leads out of {folder}; put the "
                f"file itself there."
            )
    return unique


def _check_loads(fresh: Path, source: str, target: Path, trust_remote_code: bool) -> None:
    """Load what was written, without a hub.

    Raises:
        CalmError: as loading the source does, or because something was left behind.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        CalmForCausalLM.from_pretrained(fresh, **options)
    except CalmError as error:
        CalmForCausalLM.from_pretrained(source, **options)  # which says so in its own names
        raise ModelError(
            f"An export must hold all that its models need, but {str(target)!r} would not load "
            f"({first_line(error).replace(str(fresh), str(target))}); save the models anew with save_pretrained."
        ) from error
