"""What several commands take, and where they speak."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from calmlm.errors import ConfigError, DataError
from calmlm.files.paths import expanded

__all__ = ["Device", "Dtype", "Folder", "Host", "TokenizerId", "Trust", "say", "seeds_of", "standard_input"]

Folder = Annotated[
    str, typer.Argument(help="A saved composition: a folder or an id.", show_default=False, callback=expanded)
]
TokenizerId = Annotated[
    str | None, typer.Option(help="Its id or folder, where the composition has none.", callback=expanded)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16, float16 or float32, for the base models.", show_default=False)
]
Merge = Annotated[
    bool, typer.Option("--merge-adapters", help="Adapters inside the anchor's weights: faster, and more memory.")
]
Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every address of this machine.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with a model run.")]


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


def standard_input() -> str:
    """What arrives there, with the ends of lines that Python's own reading gives, and no mark of byte order before it.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        if not hasattr(sys.stdin, "buffer"):
            return sys.stdin.read()
        text = sys.stdin.buffer.read().decode("utf-8").removeprefix("\ufeff")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"Expected UTF-8 text on standard input, but byte {error.start} is none; convert it.") from None


def seeds_of(text: str) -> list[int]:
    """Seeds that are written with commas.

    Raises:
        ConfigError: something else is written.
    """
    try:
        seeds = [int(seed) for seed in text.split(",")]
        if not all(0 <= seed < 2**32 for seed in seeds):
            raise ValueError
        return seeds
    except ValueError:
        raise ConfigError(
            f"Expected seeds as whole numbers from 0 with commas, but got '{text}'; write 0,1,2."
        ) from None
