"""``calmlm evaluate`` and ``calmlm compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from calmlm.commands.options import Device, Dtype, Folder, TokenizerId, Trust, say
from calmlm.errors import CalmError, ConfigError
from calmlm.files.paths import expanded

__all__ = ["compare", "evaluate"]


def evaluate(
    folder: Folder,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness and calmlm's own, with commas.")],
    output: Annotated[
        Path | None, typer.Option(help="A JSON file for the results.", show_default=False, callback=expanded)
    ] = None,
    anchor_only: Annotated[bool, typer.Option("--anchor-only", help="Switch the composition off.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what --output holds of these tasks; measure what is still to come.")
    ] = False,
    swapped: Annotated[
        bool, typer.Option("--swapped", help="Augmenting models read another document's context: a control.")
    ] = False,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt; the task's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, for a trial.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    include: Annotated[
        Path | None, typer.Option(help="A folder of further tasks.", show_default=False, callback=expanded)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Local slices for calmlm's own tasks.", show_default=False, callback=expanded)
    ] = None,
    tokenizer: TokenizerId = None,
    device: Device = "auto",
    dtype: Dtype = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the tokenizer's chat template.")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a saved composition on benchmarks."""
    from contextlib import suppress

    from calmlm.evaluation.harness import evaluate
    from calmlm.evaluation.unfinished import read_stored, settings_of, written
    from calmlm.experiments.record import origin
    from calmlm.files.results import write_result
    from calmlm.files.storage import check_writable, is_stream, write_text

    names = [expanded(task.strip()) for task in tasks.split(",") if task.strip()]
    if output is not None:
        check_writable(output)
    if resume and (output is None or is_stream(output)):
        raise ConfigError("Expected the file in which results lie, for --resume, but got none: name it with --output.")
    options: dict[str, Any] = {
        "anchor_only": anchor_only, "swapped": swapped, "num_fewshot": num_fewshot, "limit": limit, "include": include,
        "data": data, "tokenizer": tokenizer, "dtype": dtype, "apply_chat_template": apply_chat_template,
    }  # fmt: skip
    made = {} if output is None else {"settings": settings_of(folder, names, **options), **origin(None)}
    stored = read_stored(output, made) if resume and output is not None else None
    known, left = ({}, names) if stored is None else stored

    def keep(found: dict[str, dict[str, Any]], to_come: list[str]) -> None:
        """What was measured outlives an interruption; where it cannot be written, the end says so."""
        if output is not None and not is_stream(output):
            with suppress(OSError):
                write_text(output, written(known | found, to_come, made))

    found = known
    if left or stored is None:
        found = known | evaluate(
            folder,
            left,
            batch_size=batch_size,
            device=device,
            trust_remote_code=trust_remote_code,
            report=keep,
            **options,
        )
    try:  # the file comes first: who reads what is printed may go away
        if output is not None:
            write_result(output, written(found, [], made))
    finally:
        for task, metrics in found.items():
            for name, value in metrics.items():
                print(f"{task:32}{name:32}{value}")
    failed = [task for task, metrics in found.items() if "failed" in metrics]
    if failed:
        raise CalmError(
            f"Expected all tasks to be measured, but {', '.join(failed)} failed: the others have their figures, and "
            f"the reason stands among them."
        )


def compare(
    config: Annotated[
        Path, typer.Argument(help="A YAML file; see configs/compare/.", show_default=False, callback=expanded)
    ],
    preset: Annotated[
        str | None,
        typer.Option(help="Sizes of calmlm's own experiments: tiny (minutes) or small."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the report goes, instead of the file's.", callback=expanded)
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where finished cells are kept, instead of the file's.", callback=expanded)
    ] = None,
    bases: Annotated[
        Path | None, typer.Option(help="Where base models are kept, instead of the file's.", callback=expanded)
    ] = None,
    workers: Annotated[str | None, typer.Option(help="Processes, or ray, instead of the file's.")] = None,
    stored_only: Annotated[bool, typer.Option("--stored-only", help="Report on what is stored; make nothing.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep what the report that is there has more cells of, by experiment.")
    ] = False,
) -> None:
    """Train and evaluate every system on the same data; finished cells are never repeated."""
    import dataclasses

    from calmlm.comparison.selection import load_config
    from calmlm.comparison.workers import run

    settings = load_config(config, preset)
    given = {"output": output, "cache": cache, "bases": bases}
    changes: dict[str, Any] = {name: str(path) for name, path in given.items() if path is not None}
    if workers is not None:
        if workers != "ray" and not (workers.isdecimal() and int(workers)):
            raise ConfigError(f"--workers must be a number from 1, or ray, but got '{workers}': write one of these.")
        changes["workers"] = workers if workers == "ray" else int(workers)
    run(dataclasses.replace(settings, **changes), stored_only=stored_only, keep=keep, report=say)
