"""The page itself: what is asked, who answers, and what happens inside the composition meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from calmlm.answering import TextModel
from calmlm.communication.looking import check_looked_into, look_into
from calmlm.communication.token_texts import texts_of_augmenting
from calmlm.communication.trace import Trace, connection_label
from calmlm.errors import CalmError
from calmlm.ui.panels import connection_table, heat_map, note, token_table
from calmlm.ui.relay import Relay
from calmlm.ui.voices import AugmentingVoice, Voice, augmenting_voices

__all__ = ["Page"]

MEAN = "mean of all heads"
LONGEST = 20_000  # characters of a prompt
MOST = 512  # tokens of an answer
ONCE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models", "api_visibility": "private"}


class Page:
    """A page for one composition.

    Args:
        text: the composition with its tokenizer.
        name: what to call it.

    Raises:
        ConfigError: one cannot look into it.
    """

    def __init__(self, text: TextModel, name: str) -> None:
        check_looked_into(text.model)
        self.text, self.name = text, name
        self.texts = texts_of_augmenting(text.model, text.tokenizer)
        small = augmenting_voices(text)
        self.voices: list[tuple[str, Voice | AugmentingVoice]] = [
            ("m_A, the augmenting model" if len(small) == 1 else f"m_A, {voice.name}", voice) for voice in small
        ]
        self.voices.append(("m_B, the anchor", Voice(text, anchor_only=True)))
        self.composition = Voice(text)
        self.lock = threading.Lock()  # the models answer one by one
        self.heads = _heads(text.model)

    def blocks(self) -> gr.Blocks:
        """What Gradio serves."""
        labels = list(self.heads)
        with gr.Blocks(title=f"calmlm: {self.name}", analytics_enabled=False) as blocks:
            gr.Markdown(f"## {self.name}\nTwo frozen language models and their composition answer side by side.")
            prompt = gr.Textbox(
                label="Prompt", info="Enter asks, Shift and Enter begin a line.", lines=1, max_lines=12,
                max_length=LONGEST, elem_id="prompt", autofocus=True,
            )  # fmt: skip
            scale = gr.Slider(
                0, 1, 1, step=0.05, label="Scale of the composition", elem_id="scale",
                info="0 is the anchor, 1 the composition as it was trained.",
            )  # fmt: skip
            with gr.Accordion("More", open=False):
                other = gr.Textbox(
                    label="Another prompt, which the augmenting models read in its place to compare with",
                    max_length=LONGEST, elem_id="other",
                )  # fmt: skip
                most = gr.Slider(1, MOST, 64, step=1, label="Tokens of an answer at most", elem_id="most")
                templated = gr.Checkbox(
                    False, label="The prompt is what a user says: put it into the chat template",
                    visible=bool(getattr(self.text.tokenizer, "chat_template", None)),
                )  # fmt: skip
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Row():
                boxes = [
                    gr.Textbox(label=label, lines=3, min_width=220, interactive=False, elem_id=f"answer-{index}")
                    for index, (label, _) in enumerate(self.voices)
                ]
                composed = gr.Textbox(
                    label="Composition", lines=3, min_width=220, interactive=False, elem_id="answer-composition"
                )
            gr.Markdown("### What was attended to")
            with gr.Row(visible=bool(labels)):
                connection = gr.Dropdown(
                    labels, value=labels[0] if labels else None, label="Connection", min_width=220, elem_id="connection"
                )
                head = gr.Dropdown(
                    self._choices(labels[0] if labels else None),
                    value=MEAN,
                    label="Head",
                    min_width=220,
                    elem_id="head",
                )
            heat = gr.HTML(self._empty(), elem_id="heat")
            gr.Markdown(
                "### Each token of the answer\nLog-probabilities in nats. *Silenced*: by how much an augmenting model "
                "raises that of the token. *Swapped*: against the same model behind another prompt."
            )
            tokens = gr.HTML(elem_id="tokens")
            gr.Markdown("### What each connection adds\nThe norm of what is added, over that of what it is added to.")
            added = gr.HTML(elem_id="added")
            trace, asked = gr.State(None), gr.State(None)

            given = [prompt, other, most, templated, scale, connection, head]
            inside = [composed, heat, tokens, added, trace]
            gr.on([ask.click, prompt.submit], self.ask, given, [*boxes, *inside, asked], show_progress="hidden", **ONCE)
            scale.input(
                self.scaled, [asked, scale, connection, head], inside, show_progress="hidden",
                trigger_mode="always_last", **ONCE,
            )  # fmt: skip
            redraw: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            connection.input(self.chosen, [trace, connection, head], [heat, head], **redraw)
            head.input(self.drawn, [trace, connection, head], heat, **redraw)
        return blocks

    # Events

    def ask(
        self,
        prompt: str | None,
        other: str | None,
        most: float,
        templated: bool,
        scale: float,
        connection: str | None,
        head: str,
    ) -> Iterator[list[Any]]:
        """All voices answer one after another; then one looks inside."""
        asked = (prompt or "", (other or "").strip(), int(most), bool(templated))  # boxes not yet seen hold None
        heard = [""] * len(self.voices)
        clear = ["", self._empty(), "", "", None]
        with self.lock, _told():
            self.text.read(asked[0], apply_chat_template=asked[3])
        for index, (_, voice) in enumerate(self.voices):
            try:
                for heard[index] in self._relay(voice, asked):
                    yield [*heard, *clear, asked]
            except CalmError as error:  # of this one alone: its context is shorter, say
                heard[index] = f"({error})"
        yield [*heard, *clear, asked]
        for inside in self.scaled(asked, scale, connection, head):
            yield [*heard, *inside, asked]

    def scaled(
        self, asked: tuple[str, str, int, bool] | None, scale: float, connection: str | None, head: str
    ) -> Iterator[list[Any]]:
        """The composition answers at a scale; then one looks inside."""
        if asked is None:
            return
        relay = self._relay(self.composition, asked, scale=scale)
        text = ""
        with _told():
            for text in relay:
                yield [text, gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        if not scale:
            silent = note("At 0 the anchor answers alone: nothing is attended to.")
            yield [text, silent, "", "", None]
            return
        found = self._look(asked, relay.result or [], scale)
        if found is None:
            yield [text, self._empty(), "", "", None]
            return
        yield [text, self.drawn(found, connection, head), token_table(found), connection_table(found), found]

    def chosen(self, trace: Trace | None, connection: str, head: str) -> list[Any]:
        """Another connection: its heat map, and the heads that it has."""
        heads = self._choices(connection)
        head = head if head in heads else MEAN
        return [self.drawn(trace, connection, head), gr.update(choices=heads, value=head)]

    def drawn(self, trace: Trace | None, connection: str | None, head: str) -> str:
        """The heat map of a connection and a head."""
        if trace is None or connection is None:
            return self._empty()
        return heat_map(trace, connection, None if head == MEAN else int(head))

    # Models

    def _relay(
        self, voice: Voice | AugmentingVoice, asked: tuple[str, str, int, bool], **options: Any
    ) -> Relay[list[int]]:
        prompt, _, most, templated = asked

        def write(emit: Any) -> list[int]:
            with self.lock:
                return voice.write(prompt, emit, max_new_tokens=most, templated=templated, **options)

        return Relay(write)

    def _look(self, asked: tuple[str, str, int, bool], new: list[int], scale: float) -> Trace | None:
        prompt, other, _, templated = asked
        if not new:
            return None
        with self.lock, _told(), self.text.model.composition_scale(scale):
            ids = self.text.read(prompt, apply_chat_template=templated)
            others = self.text.read(other, apply_chat_template=templated) if other else None
            return look_into(self.text.model, self.text.tokenizer, ids, new, others, prompt=prompt, texts=self.texts)

    def _choices(self, connection: str | None) -> list[str]:
        """The heads of a connection, as they are called."""
        return [MEAN, *map(str, range(self.heads.get(connection or "", 0)))]

    def _empty(self) -> str:
        if not self.heads:
            return note("No connection of this composition attends: its models speak through words or grafts.")
        return note("Ask something: then it stands here which tokens of the augmenting model were attended to.")


@contextmanager
def _told() -> Iterator[None]:
    """Within this context an error of calmlm is one that the page shows."""
    try:
        yield
    except CalmError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _heads(model: Any) -> dict[str, int]:
    """How many heads each connection that attends has, by its label."""
    return {
        connection_label(name, tuple(pair)): connector.attention.num_heads
        for name, entry in model.config.augmenting.items()
        for pair, connector in zip(entry["connections"], model.model.connectors[name], strict=False)
        if hasattr(connector.attention, "num_heads")
    }
