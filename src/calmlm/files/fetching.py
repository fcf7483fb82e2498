"""The files of a composition, from a folder or a repository of a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from calmlm.bases.reaching import UNREACHED
from calmlm.config import CalmConfig, split_gguf
from calmlm.errors import CheckpointError, first_line

REACH = ("token", "cache_dir", "local_files_only")
PRIVATE = ("_from_auto", "_commit_hash", "adapter_kwargs")  # of transformers, between its classes
HUB_ARGUMENTS = (*REACH, "force_download", "proxies")


def fetch(source: str | Path, name: str, hub: dict[str, Any]) -> Path:
    """The local path of one of the composition's files, downloaded if ``source`` is a hub id.

    Raises:
        CheckpointError: when there is no such file.
    """
    try:
        path = cached_file(str(source), name, **{k: v for k, v in hub.items() if v is not None})
    except UNREACHED as error:
        raise CheckpointError(
            f"A saved composition must hold {name}, but none was found at {str(source)!r} ({first_line(error)}): "
            f"give a folder that save_pretrained wrote, or a hub id that you can reach."
        ) from error
    if path is None:
        raise CheckpointError(
            f"A saved composition must hold {name}, but none was found at {str(source)!r}: "
            f"give a folder that save_pretrained wrote."
        )
    return Path(path)


def fetch_inside(source: str | Path, config: CalmConfig, folder: Path, hub: dict[str, Any]) -> None:
    """Fetch the base models that lie in a composition's own repository, as those of an export do.

    Args:
        source: folder or id of the composition.
        config: its configuration.
        folder: where its files lie here.
        hub: as for ``fetch``.

    Raises:
        CheckpointError: they cannot be fetched.
    """
    names = [entry.get("id") or "" for entry in (config.anchor, *config.augmenting.values())]
    wanting = [name for name in names if name.startswith("./")]
    if Path(source).is_dir() or not wanting:
        return
    subfolder = hub.get("subfolder") or ""
    places = [Path(name) if split_gguf(str(folder / name))[1] is None else Path(name).parent for name in wanting]
    commit = folder.parents[len(Path(subfolder).parts) - 1] if subfolder else folder
    options = {key: hub[key] for key in REACH if hub.get(key) is not None}
    try:
        snapshot_download(
            str(source),
            revision=commit.name,
            allow_patterns=[(Path(subfolder) / place / "*").as_posix() for place in places],
            **options,
        )
    except UNREACHED as error:
        raise CheckpointError(
            f"The composition {str(source)!r} must come with its base models, but {wanting[0]!r} could not be fetched "
            f"({first_line(error)}): check your access and the network."
        ) from error
