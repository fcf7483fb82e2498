"""Writing messages in a chat template, whichever way it takes their content: as text, or as a list of parts."""

from __future__ import annotations

from typing import Any

_PROBE = "qxprobe"


def takes_parts(tokenizer: Any) -> bool:
    """Whether the template reads content in parts alone, as those of some models with pictures do.

    It would leave out what comes as text.
    """

    def shows(content: Any) -> bool:
        try:
            return _PROBE in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # a template is a program of its own, in Jinja, and raises what it likes
            return False

    return not shows(_PROBE) and shows(_parts(_PROBE))


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is text, with that content as a part."""
    return [
        message if (said := message.get("content")) is None else {**message, "content": _parts(said)}
        for message in messages
    ]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
