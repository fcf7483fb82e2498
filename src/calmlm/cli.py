"""The command line: what its commands have in common."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import calmlm
from calmlm.commands.measuring_commands import compare, evaluate
from calmlm.commands.model_commands import demo, export, generate, inspect
from calmlm.commands.options import say
from calmlm.commands.repro_commands import repro
from calmlm.commands.serving_commands import serve, ui
from calmlm.commands.training_commands import WithSchema, plan, train
from calmlm.errors import CalmError, is_full

FAULT = 2  # exit status of a wrong setting, model or file, as of a wrong option
INTERRUPTED = 130

app = typer.Typer(
    help="Compose two frozen language models through trained cross-attentions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(repro, name="repro")
app.command(cls=WithSchema)(train)
for command in (generate, inspect, evaluate, compare, serve, export, ui, plan, demo):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; every deliberate error is one line on stderr."""
    # transformers imports torchao where it is installed, which reports each kernel that this machine cannot load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal cannot show must not end an answer
            stream.reconfigure(errors="replace")
    try:
        result = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        if result == INTERRUPTED:  # the parser makes a status of it, without a word
            say("Interrupted.")
        return result if isinstance(result, int) else 0
    except CalmError as error:
        say(f"error: {error}")
        return FAULT
    except KeyboardInterrupt:
        say("Interrupted.")
        return INTERRUPTED
    except Exception as error:
        return _click_status(error)


def _click_status(error: Exception) -> int:
    """The exit status of an error that the parser raised; anything else is a fault of ours and keeps its traceback."""
    if isinstance(error, typer.Abort):
        say("Interrupted.")
        return INTERRUPTED
    show, status = getattr(error, "show", None), getattr(error, "exit_code", None)
    if status is None and is_full(error):
        say("error: Expected room for what is written, but the disk is full: free some, and run it again.")
        return FAULT
    if status is None:
        raise error
    if show is not None:
        show()
    return int(status)


def _version(wanted: bool) -> None:
    if wanted:
        print(calmlm.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
