"""``calmlm ui``: load a composition and serve its page."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calmlm.answering import TextModel
from calmlm.data.extras import require
from calmlm.serving.last_words import end_quietly
from calmlm.serving.launch import listen_at, opened

__all__ = ["make_page_app", "show_page"]

PATIENCE = 3  # seconds that browsers have once the page ends


def show_page(folder: str, host: str, port: int, report: Callable[[str], None], **options: Any) -> None:
    """Serve the page of a saved composition until a signal comes.

    Args:
        folder: of the composition, or its id.
        host, port: where to listen; port 0 takes a free one.
        report: takes the page's address.
        options: of ``calmlm.answering.TextModel.load``.

    Raises:
        CalmError: there is no such composition or place, or Gradio is not installed.
    """
    require("gradio", "ui", "calmlm ui")
    import uvicorn

    with listen_at(host, port) as listener:
        name = Path(os.path.abspath(folder)).name if Path(folder).exists() else folder
        app = make_page_app(TextModel.load(folder, **options), name)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=PATIENCE
        )
        end_quietly()
        report(f"Open {opened(listener)}")
        uvicorn.Server(config).run(sockets=[listener])


def make_page_app(text: TextModel, name: str) -> Any:
    """The page as an ASGI application.

    Args:
        text: the composition with its tokenizer.
        name: what to call it.

    Raises:
        ConfigError: one cannot look into the composition.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr
    from fastapi import FastAPI

    from calmlm.ui.panels import CSS
    from calmlm.ui.side_by_side import Page

    # Fonts of the machine: a page that is looked at without a network waits for others.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks = Page(text, name).blocks()
    return gr.mount_gradio_app(FastAPI(), blocks, path="/", theme=theme, css=CSS, footer_links=[], ssr_mode=False)
