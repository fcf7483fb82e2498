"""Writing and reading a composition's own files: safetensors and JSON, written atomically, read strictly."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calmlm.config import CalmConfig
from calmlm.errors import CheckpointError, ConfigError

WEIGHTS_NAME = "model.safetensors"
GENERATION_NAME = "generation_config.json"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def alignment_name(name: str) -> str:
    """The file that holds one augmenting model's alignment."""
    return f"alignment.{name}.json"


WRITING = "calmlm-"
Writer = Callable[[Path], object]
"""Fills the file whose path it is given."""


def write_together(folder: Path, writers: dict[str, Writer]) -> None:
    """Write files of ``folder``, by name: all to temporary files first, so that a failure leaves what was there."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    temporaries: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.{WRITING}", dir=folder)
            os.close(descriptor)
            temporaries[name] = Path(temporary)
            write(temporaries[name])
            os.chmod(temporary, 0o644)
        for name, path in temporaries.items():
            os.replace(path, folder / name)
    except BaseException:
        for path in temporaries.values():
            path.unlink(missing_ok=True)
        for place in made:
            with suppress(OSError):  # it was not made, or another process has written into it
                place.rmdir()
        raise


TEMPORARY = re.compile(rf"\..+\.{WRITING}[a-z0-9_]+")
"""The names of the files that ``write_together`` fills before it moves them."""


def temporaries_in(folder: Path) -> list[Path]:
    """Files in a folder that a process was writing with ``write_together`` when it was killed, or still is."""
    return sorted(path for path in folder.glob(".*") if TEMPORARY.fullmatch(path.name) and path.is_file())


def write_atomically(path: Path, write: Writer) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    Where ``path`` is a link, it is what the link leads to. A device or a pipe is written into, and stays what it is.
    """
    if is_stream(path):
        write(path)
        return
    path = Path(os.path.realpath(path))
    write_together(path.parent, {path.name: write})


def is_stream(path: Path) -> bool:
    """Whether something stands at a path that is no file and no folder: a terminal, a pipe, a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `target` when the block ends well and vanishes otherwise.

    Until then `target` stays as it was. Where it is a link, it is what the link leads to.
    """
    target = target.resolve() if target.is_symlink() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    for left in _left_behind(target, "old"):  # by a process that was killed
        left.rename(target) if not target.exists() else shutil.rmtree(left, ignore_errors=True)
    for left in _left_behind(target, "new"):
        shutil.rmtree(left, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _left_behind(target: Path, kind: str) -> list[Path]:
    """What ``replacing_folder`` has left of this target, and of no other whose name begins like its own."""
    name = re.compile(rf"\.{re.escape(target.name)}\.\d+\.{kind}")
    return sorted(path for path in target.parent.iterdir() if name.fullmatch(path.name))


def probe_folder(folder: Path) -> None:
    """Make a folder if it is missing, and raise an OSError unless it can be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    probe_place(folder)


def probe_place(folder: Path) -> None:
    """Raise an OSError or a ValueError unless a folder can be written to, or made; it is not made."""
    if "\0" in str(folder):
        raise ValueError("its name holds a null character")
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
        probe.write(b"\n")  # which a full disk refuses


def check_writable(path: Path) -> None:
    """Find out before anything is computed whether a file can be written.

    Raises:
        ConfigError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if not is_stream(path):
            probe_folder(Path(os.path.realpath(path)).parent)
        elif not os.access(path, os.W_OK):
            raise PermissionError(None, "it takes nothing from this user")
    except OSError as error:
        raise ConfigError(
            f"Expected a file that can be written at {path}, but it cannot ({error.strerror}): name another."
        ) from None


def check_free(folder: Path) -> None:
    """Raise where a folder holds another model, which a composition would overwrite: one of its bases, say.

    Raises:
        ConfigError: naming that model.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind is not None and kind != CalmConfig.model_type:
        raise ConfigError(
            f"save_directory must be a folder of its own, but {str(folder)!r} holds another model ({kind}), which "
            f"would be overwritten: choose another folder."
        )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    write_atomically(path, text_writer(text))


def text_writer(text: str) -> Writer:
    """Writes ``text`` as UTF-8."""
    return lambda path: path.write_text(text, encoding="utf-8")


def tensor_writer(tensors: dict[str, Tensor]) -> Writer:
    """Writes ``tensors`` as safetensors."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return lambda path: save_file(tensors, str(path), metadata={"format": "pt"})


def read_tensors(path: Path, expected: Iterable[tuple[str, Tensor]], source: str) -> dict[str, Tensor]:
    """Read the composition's tensors, all of them and nothing else.

    Args:
        path: the safetensors file.
        expected: names and tensors of the composition that is to be filled.
        source: what to call the checkpoint in messages.

    Raises:
        CheckpointError: when the file is damaged or holds other tensors.
    """
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{source!r} must hold a readable {WEIGHTS_NAME}, but the file is damaged or cut short "
            f"({str(error).strip().rstrip('.')}): save the composition again or fetch it anew."
        ) from error
    strange = next((name for name, tensor in tensors.items() if tensor.dtype not in WEIGHT_DTYPES), None)
    if strange is not None:
        raise CheckpointError(
            f"{source!r} must hold weights in a floating-point format, but {strange!r} is {tensors[strange].dtype}: it "
            f"belongs to something else."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in expected}
    for name, tensor in tensors.items():
        if not tensor.ndim and shapes.get(name) == (1,):  # as they were before
            tensors[name] = tensor.reshape(1)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != found:
        wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        name = wrong[0]
        raise CheckpointError(
            f"{source!r} must hold exactly the {len(shapes)} tensors of this composition, but {len(wrong)} differ, for "
            f"example {name!r} (expected {shapes.get(name, 'none')}, got {found.get(name, 'none')}): "
            f"it belongs to another composition."
        )
    return tensors


def relative_source(source: str, folder: Path) -> str:
    """How a composition saved in ``folder`` names the base model ``source``.

    A folder (or GGUF file) that stands beside ``folder`` or below it is named relative to it, so that both can move
    together; any other by its absolute path; a hub id as it is.
    """
    if not os.path.isabs(source) or not os.path.exists(source):
        return source
    base, folder = Path(source).resolve(), folder.resolve()
    if folder == base or folder.parent not in base.parents:
        return str(base)
    relative = Path(os.path.relpath(base, folder)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"  # or it would be taken for a hub id


def resolve_source(source: str, folder: Path | None) -> str:
    """The inverse of ``relative_source``: a name that can be loaded from here."""
    if folder is not None and source.startswith("."):
        return str((folder / source).resolve())
    return source


def portable_config(config: CalmConfig, folder: Path) -> CalmConfig:
    """A copy of ``config`` for ``folder``: complete, and with the bases named so that they are found from there."""
    config = copy.deepcopy(config)
    config.architectures = ["CalmForCausalLM"]
    config.name_or_path = config.text_config.name_or_path = ""
    config.order = list(config.augmenting)
    for entry in (config.anchor, *config.augmenting.values()):
        entry["id"] = relative_source(entry.get("id") or "", folder)
    return config
