"""``calmlm repro``: the experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calmlm.commands.options import say, seeds_of
from calmlm.files.paths import expanded

__all__ = ["repro"]

DataFile = Annotated[
    Path | None,
    typer.Option(help="The data as JSON lines, instead of their id.", show_default=False, callback=expanded),
]
Models = Annotated[Path, typer.Option(help="Where scripts/models put the models.", callback=expanded)]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch.", show_default=False)]

repro = typer.Typer(help="Reproduce an experiment of the paper.", no_args_is_help=True)


@repro.command("kv-arithmetic")
def kv_arithmetic(
    preset: Annotated[str, typer.Option(help="tiny (minutes), small (under an hour for each seed), paper (a GPU).")],
    seeds: Annotated[str, typer.Option(help="One run for each, separated by commas.")] = "0",
    output: Annotated[Path, typer.Option(help="Where the results go.", callback=expanded)] = Path(
        "experiments/kv_arithmetic/results"
    ),
    cache: Annotated[Path, typer.Option(help="Where finished stages are kept.", callback=expanded)] = Path(
        "runs/kv_arithmetic"
    ),
    also: Annotated[
        str, typer.Option(help="Further compositions, with commas: connectors, tokenizers, halves.", show_default=False)
    ] = "",
    stored_only: Annotated[
        bool, typer.Option("--stored-only", help="Report on what is stored; train no others.")
    ] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Cuts each training, for a trial.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Items for each column, for a trial.")] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Also put the first seed's models there, for `calmlm demo`.", show_default=False, callback=expanded
        ),
    ] = None,
) -> None:
    """Key-value arithmetic: one model knows the keys, the other calculates."""
    from calmlm.experiments.kv_arithmetic.run import run

    numbers = seeds_of(seeds)
    groups = [group.strip() for group in also.split(",") if group.strip()]
    run(
        preset,
        numbers,
        output,
        cache,
        max_steps=max_steps,
        items=items,
        also=groups,
        stored_only=stored_only,
        report=say,
    )
    if export is not None:
        from calmlm.demo.bundle import pack

        pack(preset, numbers[0], cache, export, max_steps=max_steps, items=items)


@repro.command("visual-arithmetic")
def visual_arithmetic(
    preset: Annotated[str, typer.Option(help="tiny (a minute or two) or small (some minutes for each seed).")],
    seeds: Annotated[str, typer.Option(help="One run for each, separated by commas.")] = "0",
    output: Annotated[Path, typer.Option(help="Where the results go.", callback=expanded)] = Path(
        "experiments/visual_arithmetic/results"
    ),
    cache: Annotated[Path, typer.Option(help="Where finished stages are kept.", callback=expanded)] = Path(
        "runs/visual_arithmetic"
    ),
    max_steps: Annotated[int | None, typer.Option(min=1, help="Cuts each training, for a trial.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Items for each column, for a trial.")] = None,
) -> None:
    """Visual arithmetic: one model recognises handwritten digits, the other calculates."""
    from calmlm.experiments.visual_arithmetic.run import run

    run(preset, seeds_of(seeds), output, cache, max_steps=max_steps, items=items, report=say)


@repro.command("several")
def several(
    composition: Annotated[
        Path | None,
        typer.Option(help="One that translates; the demonstration's.", show_default=False, callback=expanded),
    ] = None,
    data: DataFile = None,
    models: Models = Path("models"),
    output: Annotated[Path, typer.Option(help="Where the report goes.", callback=expanded)] = Path(
        "experiments/several/results"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of facts, weights and D_C.")] = 0,
    threads: Threads = None,
) -> None:
    """Several augmenting models at once: one that translates, one that knows facts, joined without training."""
    from transformers.utils import logging

    from calmlm.demo import TRANSLATION
    from calmlm.experiments.several.run import run

    logging.disable_progress_bar()
    run(
        composition or TRANSLATION / "composition",
        output,
        models,
        data=data,
        seed=seed,
        threads=threads,
        report=say,
    )


def _with_real_models(name: str, config_file: str, folder: str, about: str) -> None:
    """Add an experiment with two real models, whose file and folder are these by default."""

    @repro.command(name, help=about)
    def command(
        config: Annotated[
            Path, typer.Option(help="A YAML file of models, data and rows.", show_default=True, callback=expanded)
        ] = Path(config_file),
        seeds: Annotated[str, typer.Option(help="A cell for each, separated by commas.")] = "0,1,2",
        rows: Annotated[
            str | None, typer.Option(help="Rows of the file, separated by commas; all by default.", show_default=False)
        ] = None,
        data: DataFile = None,
        models: Models = Path("models"),
        anchor: Annotated[
            str | None, typer.Option(help="Another m_B, by id or folder.", show_default=False, callback=expanded)
        ] = None,
        augmenting: Annotated[
            str | None, typer.Option(help="Another m_A, by id or folder.", show_default=False, callback=expanded)
        ] = None,
        output: Annotated[Path, typer.Option(help="Where cells and report go.", callback=expanded)] = Path(folder),
        steps: Annotated[int | None, typer.Option(min=1, help="Cuts each training, for a trial.")] = None,
        items: Annotated[int | None, typer.Option(min=2, help="Cuts each measure, for a trial.")] = None,
        threads: Threads = None,
        dtype: Annotated[
            str | None,
            typer.Option(help="bfloat16 or float32; what is faster on this machine.", show_default=False),
        ] = None,
        stored_only: Annotated[
            bool, typer.Option("--stored-only", help="Report on what is stored; make nothing.")
        ] = False,
        keep: Annotated[
            Path | None,
            typer.Option(help="Where trained compositions and LoRA are saved.", show_default=False, callback=expanded),
        ] = None,
    ) -> None:
        from transformers.utils import logging

        from calmlm.experiments.real.run import run

        logging.disable_progress_bar()
        run(
            config,
            seeds_of(seeds),
            None if rows is None else [row.strip() for row in rows.split(",") if row.strip()],
            output,
            models,
            data=data,
            anchor=anchor,
            augmenting=augmenting,
            steps=steps,
            items=items,
            threads=threads,
            dtype=dtype,
            stored_only=stored_only,
            keep=keep,
            report=say,
        )


_with_real_models(
    "real",
    "configs/real/translation.yaml",
    "experiments/real/results",
    "Two real models: one reads varieties of Arabic and Hindi that the other does not. Finished cells stay.",
)
_with_real_models(
    "translation",
    "configs/real/varieties.yaml",
    "experiments/translation/results",
    "Translation from 40 language varieties with two real models, beside every rival. Finished cells stay.",
)
