"""``calmlm generate``, ``inspect``, ``export`` and ``demo``: what one does with a composition at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calmlm.commands.options import Device, Dtype, Folder, Merge, TokenizerId, Trust, say, standard_input
from calmlm.errors import ConfigError
from calmlm.files.paths import expanded

__all__ = ["demo", "export", "generate", "inspect"]


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
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Above 1: further from what follows without the prompt.", show_default=False),
    ] = None,
    merge_adapters: Merge = False,
    tokenizer: TokenizerId = None,
    device: Device = "auto",
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write text with a saved composition, as it comes."""
    from transformers.utils import logging

    from calmlm.answering import TextModel

    logging.disable_progress_bar()
    model = TextModel.load(
        folder,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        merge_adapters=merge_adapters,
    )
    model.write(
        standard_input() if prompt == "-" else prompt,
        lambda piece: print(piece, end="", flush=True),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        anchor_only=anchor_only,
        drafting=draft,
        guidance_scale=guidance_scale,
        apply_chat_template=apply_chat_template,
    )
    print()


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
    dtype: Dtype = None,
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
    if text is None and output is not None:
        raise ConfigError(
            "--output must come with --text, but there is none: write --text FILE, or --json FILE beside --prompt."
        )
    for path in (json_file, png_file, output):
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
            standard_input() if prompt == "-" else prompt,
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

    found = listen_to_file(
        folder,
        text,
        rows,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    try:  # the file comes first: who reads what is printed may go away
        if output is not None:
            write_result(output, to_json({"results": found.to_json(), **origin(None)}, indent=1) + "\n")
    finally:
        _show(found.lines())
        for warning in found.warnings():
            say(f"warning: {warning}")


def _show(lines: list[tuple[str, str]]) -> None:
    width = max(len(title) for title, _ in lines) + 2
    for title, value in lines:
        print(f"{title:{width}}{value}")


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
