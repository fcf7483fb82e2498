"""``calmlm train`` and ``calmlm plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from calmlm.commands.options import say
from calmlm.errors import ConfigError
from calmlm.files.paths import expanded

__all__ = ["WithSchema", "plan", "train"]


class WithSchema(typer.core.TyperCommand):
    """A command whose help ends with the keys of the file that it reads."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.console import Console

        from calmlm.training.schema_page import show_schema

        super().format_help(ctx, formatter)
        show_schema(Console())


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; see configs/.", show_default=False, callback=expanded)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file, as key=value.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="The run's folder instead of the file's.", callback=expanded)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Train a composition; the two models do not change."""
    from calmlm.training.pipeline import train
    from calmlm.training.schema import load_config

    settings = load_config(config, overrides or [], output)
    print(train(settings, resume=resume, overwrite=overwrite, report=say).composition)


def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file as for `calmlm train`.", callback=expanded)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as key=value.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 512,
    labelled: Annotated[int, typer.Option(min=1, help="How many of these are learned.")] = 128,
    rows: Annotated[int | None, typer.Option(min=1, help="Examples of a step on a device.", show_default=False)] = None,
    ratio: Annotated[float, typer.Option(min=0.01, help="The small model's tokens for one of the anchor's.")] = 1.0,
    devices: Annotated[int, typer.Option(min=1, help="Over how many devices the models are spread (FSDP).")] = 1,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, l40s or 4090.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a training will take, from configurations alone: parameters, operations, memory, cache and time."""
    import json

    from rich.console import Console

    from calmlm.training.plan import GPUS, Texts, make_plan
    from calmlm.training.plan_page import as_dict, show
    from calmlm.training.schema import load_config

    if gpu not in GPUS:
        raise ConfigError(f"--gpu must be one of {', '.join(GPUS)}, but got '{gpu}': choose one of these.")
    if labelled > length:
        raise ConfigError(f"--labelled must be at most --length, {length}, but got {labelled}: lower it.")
    settings = load_config(config, overrides or [])
    found = rows or int(settings.trainer.get("per_device_train_batch_size", 8))
    made = make_plan(settings, Texts(length, labelled, found, ratio), devices)
    if as_json:
        typer.echo(json.dumps(as_dict(made, gpu), indent=2))
    else:
        show(made, gpu, Console())
