"""``calmlm serve`` and ``calmlm ui``."""

from __future__ import annotations

from typing import Annotated

import typer

from calmlm.commands.options import Device, Dtype, Folder, Host, Merge, TokenizerId, Trust, say

__all__ = ["serve", "ui"]


def serve(
    folders: Annotated[
        list[str],
        typer.Argument(help="Saved compositions over one anchor: folders, ids, or NAME=FOLDER.", show_default=False),
    ],
    host: Host = "127.0.0.1",
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
    dtype: Dtype = None,
    merge_adapters: Merge = False,
    drafts: Annotated[int, typer.Option(min=0, help="Tokens that are drafted at a time for a text alone.")] = 8,
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
    options = Options(
        host, port, api_key, max_batch, max_queue, max_tokens, max_body, tokenizer, device, dtype, drafts, replicas,
        ray_address, merge_adapters,
    )  # fmt: skip
    serve(folders, options, say)


def ui(
    folder: Folder,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    tokenizer: TokenizerId = None,
    device: Device = "auto",
    dtype: Dtype = None,
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
