"""From pieces of text to answers in the forms of OpenAI's API, whole or as events of a stream."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from calmlm.serving.desk import Part, Start, Word

DONE = "data: [DONE]\n\n"


@dataclass
class Choice:
    """One choice as far as it has come."""

    text: str = ""
    parts: list[Part] = field(default_factory=list)
    finish: str | None = None


class Answer:
    """The answer to one request.

    Args:
        start: what is known of it.
        chat: whether it is a conversation.
        tells: whether it tells probabilities.
    """

    def __init__(self, start: Start, *, chat: bool, tells: bool) -> None:
        self.start, self.chat, self.tells = start, chat, tells
        self.choices = [Choice() for _ in range(start.choices)]
        self._kinds = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion",) * 2
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": start.model}

    @property
    def ended(self) -> bool:
        """Whether all choices are there."""
        return all(choice.finish is not None for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that were read and written."""
        read = sum(self.start.prompts)
        written = sum(len(choice.parts) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def add(self, part: Part) -> None:
        """One more part of a choice."""
        choice = self.choices[part.choice]
        choice.text += part.text
        choice.parts.append(part)
        choice.finish = part.finish

    def whole(self) -> dict[str, Any]:
        """The answer."""
        choices: list[dict[str, Any]] = []
        for index, choice in enumerate(self.choices):
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self.chat
                else {"text": choice.text}
            )
            told = self._told(choice.parts)
            choices.append({"index": index, **said, "logprobs": told, "finish_reason": choice.finish})
        return {**self._head, "object": self._kinds[0], "choices": choices, "usage": self.usage}

    def opening(self, usage: bool) -> list[str]:
        """The events before any text."""
        if not self.chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._event(index, said, None, None, usage) for index in range(len(self.choices))]

    def event(self, parts: list[Part], usage: bool) -> str:
        """The event of the latest parts of a choice; the last of them settles text or ends it."""
        text = "".join(part.text for part in parts)
        said: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._event(parts[-1].choice, said, self._told(parts), parts[-1].finish, usage)

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

    def _told(self, parts: list[Part]) -> dict[str, Any] | None:
        """What is told of probabilities, but for a token that only ends the text."""
        if not self.tells:
            return None
        shown = [(part, part.word) for part in parts if part.word is not None]
        if self.chat:
            entries = [{**_named(word), "top_logprobs": [_named(top) for top in part.top]} for part, word in shown]
            return {"content": entries, "refusal": None}
        return {
            "tokens": [word.text for _, word in shown],
            "token_logprobs": [word.logprob for _, word in shown],
            "top_logprobs": [{top.text: top.logprob for top in part.top} for part, _ in shown],
            "text_offset": [part.place for part, _ in shown],
        }


def _named(word: Word) -> dict[str, Any]:
    return {"token": word.text, "logprob": word.logprob, "bytes": list(word.raw)}


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, separators=(',', ':'))}\n\n"
