"""The command line: parse, one library call, done. Whatever needs torch is imported inside a command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import calmlm
from calmlm.errors import CalmError, ConfigError, DataError, is_full
from calmlm.files.paths import expanded

FAULT = 2  # exit status of a wrong setting, model or file, as of a wrong option
INTERRUPTED = 130

app = typer.Typer(
    help="Compose two frozen language models through trained cross-attentions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
repro = typer.Typer(help="Reproduce an experiment of the paper.", no_args_is_help=True)
app.add_typer(repro, name="repro")

Folder = Annotated[
    str, typer.Argument(help="A saved composition: a folder or an id.", show_default=False, callback=expanded)
]
TokenizerId = Annotated[
    str | None, typer.Option(help="Its id or folder, where the composition has none.", callback=expanded)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with a model run.")]


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
        say("error: Expected room for what is written, but the disk is full: free some, then go on with --resume.")
        return FAULT
    if status is None:
        raise error
    if show is not None:
        show()
    return int(status)


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


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


class _WithSchema(typer.core.TyperCommand):
    """A command whose help ends with the keys of the file that it reads."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.console import Console

        from calmlm.training.schema_page import show_schema

        super().format_help(ctx, formatter)
        show_schema(Console())


@app.command(cls=_WithSchema)
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


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="The text to go on from; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most, within the context.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Makes sampling repeatable.")] = None,
    anchor_only: Annotated[bool, typer.Option("--anchor-only", help="Switch the composition off.")] = False,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="The prompt is what a user says: put it into the template.")
    ] = False,
    draft: Annotated[bool, typer.Option("--draft", help="The augmenting model drafts; the text is the same.")] = False,
    tokenizer: TokenizerId = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Write text with a saved composition, as it comes."""
    from transformers.utils import logging

    from calmlm.answering import TextModel

    logging.disable_progress_bar()
    model = TextModel.load(folder, tokenizer=tokenizer, device=device, trust_remote_code=trust_remote_code)
    model.write(
        _standard_input() if prompt == "-" else prompt,
        lambda piece: print(piece, end="", flush=True),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        anchor_only=anchor_only,
        drafting=draft,
        apply_chat_template=apply_chat_template,
    )
    print()


def _standard_input() -> str:
    """What arrives there, with the ends of lines that Python's own reading gives.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        if not hasattr(sys.stdin, "buffer"):
            return sys.stdin.read()
        return sys.stdin.buffer.read().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"Expected UTF-8 text on standard input, but byte {error.start} is none; convert it.") from None


@app.command()
def inspect(
    folder: Folder,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A JSONL file of prompts and completions: what there is to communicate.",
            show_default=False,
            callback=expanded,
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows of that file to look at.")] = 200,
    output: Annotated[
        Path | None, typer.Option(help="A JSON file for the figures of --text.", show_default=False, callback=expanded)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A text to answer: what happens at each token.", show_default=False)
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="Its answer, instead of the composition's own.", show_default=False)
    ] = None,
    other_prompt: Annotated[
        str | None,
        typer.Option(help="Read by the augmenting models in its place, to compare with.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 64,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts are what a user says: put them into the template.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="A JSON file for what --prompt shows.", show_default=False, callback=expanded),
    ] = None,
    png_file: Annotated[
        Path | None,
        typer.Option("--png", help="A picture of what --prompt shows.", show_default=False, callback=expanded),
    ] = None,
    tokenizer: TokenizerId = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32, for the base models.", show_default=False)
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show what a saved composition is made of; with --text, what its models understand of some rows; with --prompt,
    what happens inside while it answers.
    """
    from calmlm.files.inspection import describe
    from calmlm.files.storage import check_writable

    only = {"--answer": answer, "--other-prompt": other_prompt, "--json": json_file, "--png": png_file}
    lonely = [name for name, value in only.items() if value is not None]
    if prompt is None and lonely:
        raise ConfigError(f"{lonely[0]} must come with --prompt, but there is none: write --prompt TEXT.")
    for path in (json_file, png_file):
        if path is not None:
            check_writable(path)
    if png_file is not None:
        from calmlm.communication.trace_picture import check_pictures

        check_pictures()
    _show(describe(folder))
    if prompt is not None:
        from transformers.utils import logging as progress

        from calmlm.communication.looking import look_to_files

        progress.disable_progress_bar()
        look_to_files(
            folder,
            _standard_input() if prompt == "-" else prompt,
            json_file,
            png_file,
            answer=answer,
            other=other_prompt,
            max_new_tokens=max_new_tokens,
            apply_chat_template=apply_chat_template,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    if text is None:
        return
    from calmlm.communication import listen_to_file
    from calmlm.experiments.record import origin
    from calmlm.files.results import to_json, write_result

    if output is not None:
        check_writable(output)
    found = listen_to_file(
        folder,
        text,
        rows,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    _show(found.lines())
    for warning in found.warnings():
        say(f"warning: {warning}")
    if output is not None:
        write_result(output, to_json({"results": found.to_json(), **origin(None)}, indent=1) + "\n")


def _show(lines: list[tuple[str, str]]) -> None:
    width = max(len(title) for title, _ in lines) + 2
    for title, value in lines:
        print(f"{title:{width}}{value}")


@app.command()
def evaluate(
    folder: Folder,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness and calmlm's own, with commas.")],
    output: Annotated[
        Path | None, typer.Option(help="A JSON file for the results.", show_default=False, callback=expanded)
    ] = None,
    anchor_only: Annotated[bool, typer.Option("--anchor-only", help="Switch the composition off.")] = False,
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
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32, for the base models.", show_default=False)
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the tokenizer's chat template.")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a saved composition on benchmarks."""
    from calmlm.evaluation.harness import evaluate
    from calmlm.experiments.record import origin
    from calmlm.files.results import to_json, write_result
    from calmlm.files.storage import check_writable

    names = [expanded(task.strip()) for task in tasks.split(",") if task.strip()]
    if output is not None:
        check_writable(output)
    found = evaluate(
        folder,
        names,
        anchor_only=anchor_only,
        swapped=swapped,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        include=include,
        data=data,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        apply_chat_template=apply_chat_template,
        trust_remote_code=trust_remote_code,
    )
    for task, metrics in found.items():
        for name, value in metrics.items():
            print(f"{task:32}{name:32}{value}")
    if output is not None:
        write_result(output, to_json({"results": found, **origin(None)}, indent=1) + "\n")


@app.command()
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


@app.command()
def serve(
    folders: Annotated[
        list[str],
        typer.Argument(help="Saved compositions over one anchor: folders, ids, or NAME=FOLDER.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every address of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="What clients have to bring; CALMLM_API_KEY by default, or nothing.", show_default=False),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts that are written at a time.")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that may wait besides; others get status 429.")] = 256,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Of a prompt and its answer together; the models' context.", show_default=False),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request.")] = 2**20,
    tokenizer: TokenizerId = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32, for the base models.", show_default=False)
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that each load all of it, on a Ray cluster.", show_default=False),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="The cluster, such as auto or HOST:6379; one on this machine.", show_default=False),
    ] = None,
) -> None:
    """Serve saved compositions, their anchor and their augmenting models behind OpenAI's API."""
    from transformers.utils import logging

    from calmlm.serving.launch import Options, serve

    logging.disable_progress_bar()
    serve(
        folders,
        Options(
            host,
            port,
            api_key,
            max_batch,
            max_queue,
            max_tokens,
            max_body,
            tokenizer,
            device,
            dtype,
            replicas,
            ray_address,
        ),
        say,
    )


@app.command()
def export(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False, callback=expanded)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a composition and all of its models to one folder, which loads anywhere without a hub."""
    from transformers.utils import logging

    from calmlm.exporting import export

    logging.disable_progress_bar()
    print(export(folder, target, overwrite=overwrite, trust_remote_code=trust_remote_code, report=say))


@app.command()
def ui(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every address of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    tokenizer: TokenizerId = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32, for the base models.", show_default=False)
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Open a page on which a composition and its models answer side by side, and one looks inside."""
    from transformers.utils import logging

    from calmlm.ui.hosting import show_page

    logging.disable_progress_bar()
    show_page(
        folder,
        host,
        port,
        say,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


@app.command()
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


@app.command()
def demo(
    what: Annotated[
        str, typer.Argument(help="keys, with models that come with calmlm, or translation, with two real models.")
    ] = "keys",
    models: Annotated[
        Path, typer.Option(help="Where scripts/models put the two models of `translation`.", callback=expanded)
    ] = Path("models"),
) -> None:
    """Two models that cannot, and their composition that can: it calculates with keys, or translates."""
    from transformers.utils import logging

    from calmlm.demo import show, translating

    logging.disable_progress_bar()
    if what not in ("keys", "translation"):
        raise ConfigError(f"Expected keys or translation, but got '{what}': write `calmlm demo translation`.")
    if what == "keys":
        show.show()
    else:
        translating.show(models)


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

    numbers = _seeds(seeds)
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

    run(preset, _seeds(seeds), output, cache, max_steps=max_steps, items=items, report=say)


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
        data: Annotated[
            Path | None,
            typer.Option(help="The data as JSON lines, instead of their id.", show_default=False, callback=expanded),
        ] = None,
        models: Annotated[Path, typer.Option(help="Where scripts/models put the models.", callback=expanded)] = Path(
            "models"
        ),
        anchor: Annotated[
            str | None, typer.Option(help="Another m_B, by id or folder.", show_default=False, callback=expanded)
        ] = None,
        augmenting: Annotated[
            str | None, typer.Option(help="Another m_A, by id or folder.", show_default=False, callback=expanded)
        ] = None,
        output: Annotated[Path, typer.Option(help="Where cells and report go.", callback=expanded)] = Path(folder),
        steps: Annotated[int | None, typer.Option(min=1, help="Cuts each training, for a trial.")] = None,
        items: Annotated[int | None, typer.Option(min=2, help="Cuts each measure, for a trial.")] = None,
        threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.", show_default=False)] = None,
        dtype: Annotated[
            str | None,
            typer.Option(help="bfloat16 or float32; what is faster on this machine.", show_default=False),
        ] = None,
        stored_only: Annotated[
            bool, typer.Option("--stored-only", help="Report on what is stored; make nothing.")
        ] = False,
        keep: Annotated[
            Path | None,
            typer.Option(help="Where trained compositions are saved.", show_default=False, callback=expanded),
        ] = None,
    ) -> None:
        from transformers.utils import logging

        from calmlm.experiments.real.run import run

        logging.disable_progress_bar()
        run(
            config,
            _seeds(seeds),
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


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
        if not all(0 <= seed < 2**32 for seed in seeds):
            raise ValueError
        return seeds
    except ValueError:
        raise ConfigError(
            f"Expected seeds as whole numbers from 0 with commas, but got '{text}'; write 0,1,2."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
