"""From pieces of text to answers in the forms of OpenAI's API, whole or as events of a stream."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from calmlm.serving.engine import Piece
from calmlm.serving.next_token import Drawn
from calmlm.serving.requests import Job

DONE = "data: [DONE]\n\n"


@dataclass
class Choice:
    """One choice as far as it has come."""

    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    finish: str | None = None


class Answer:
    """The answer to one request.

    Args:
        job: its texts.
        chat: whether it is a conversation.
        tells: whether it tells probabilities.
    """

    def __init__(self, job: Job, *, chat: bool, tells: bool) -> None:
        self.job, self.chat, self.tells = job, chat, tells
        self.choices = [Choice() for _ in job.writings]
        self._kinds = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion",) * 2
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": job.served.name}

    @property
    def ended(self) -> bool:
        """Whether all choices are there."""
        return all(choice.finish is not None for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that were read and written."""
        read = sum(len(prompt) for prompt in self.job.prompts)
        written = sum(len(choice.pieces) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def add(self, place: int, piece: Piece) -> None:
        """One more piece of a choice."""
        choice = self.choices[place]
        choice.text += piece.text
        choice.pieces.append(piece)
        choice.finish = piece.finish

    def whole(self) -> dict[str, Any]:
        """The answer."""
        choices: list[dict[str, Any]] = []
        for index, choice in enumerate(self.choices):
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self.chat
                else {"text": choice.text}
            )
            told = self._told(choice.pieces)
            choices.append({"index": index, **said, "logprobs": told, "finish_reason": choice.finish})
        return {**self._head, "object": self._kinds[0], "choices": choices, "usage": self.usage}

    def opening(self, usage: bool) -> list[str]:
        """The events before any text."""
        if not self.chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._event(index, said, None, None, usage) for index in range(len(self.choices))]

    def event(self, place: int, pieces: list[Piece], usage: bool) -> str:
        """The event of the latest pieces of a choice; the last of them settles text or ends it."""
        text = "".join(piece.text for piece in pieces)
        said: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._event(place, said, self._told(pieces), pieces[-1].finish, usage)

    def closing(self, usage: bool) -> list[str]:
        """The events behind all text."""
        told = {**self._head, "object": self._kinds[1], "choices": [], "usage": self.usage}
        return [*([_line(told)] if usage else []), DONE]

    @staticmethod
    def failed(error: dict[str, Any]) -> str:
        """The event of a text that failed."""
        return _line(error)

    def _event(self, index: int, said: dict[str, Any], told: Any, finish: str | None, usage: bool) -> str:
        choice = {"index": index, **said, "logprobs": told, "finish_reason": finish}
        last: dict[str, Any] = {"usage": None} if usage else {}
        return _line({**self._head, "object": self._kinds[1], "choices": [choice], **last})

    def _told(self, pieces: list[Piece]) -> dict[str, Any] | None:
        """What is told of probabilities, but for a token that only ends the text."""
        if not self.tells:
            return None
        ends = self.job.served.ends
        shown = [(piece, piece.drawn) for piece in pieces if piece.drawn is not None and piece.drawn.token not in ends]
        if self.chat:
            return {"content": [self._entry(drawn) for _, drawn in shown], "refusal": None}
        return {
            "tokens": [self._word(drawn.token)[0] for _, drawn in shown],
            "token_logprobs": [drawn.logprob for _, drawn in shown],
            "top_logprobs": [{self._word(token)[0]: value for token, value in drawn.top} for _, drawn in shown],
            "text_offset": [piece.place for piece, _ in shown],
        }

    def _entry(self, drawn: Drawn) -> dict[str, Any]:
        return {
            **self._named(drawn.token, drawn.logprob or 0.0),
            "top_logprobs": [self._named(token, value) for token, value in drawn.top],
        }

    def _named(self, token: int, value: float) -> dict[str, Any]:
        text, raw = self._word(token)
        return {"token": text, "logprob": value, "bytes": list(raw)}

    def _word(self, token: int) -> tuple[str, bytes]:
        """A token as text and as bytes."""
        served = self.job.served
        raw = served.bytes_of[token] if token < len(served.bytes_of) else None
        if raw is not None:
            return raw.decode(errors="replace"), raw
        text = served.tokenizer.decode([token], skip_special_tokens=False)
        return text, text.encode()


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, separators=(',', ':'))}\n\n"
