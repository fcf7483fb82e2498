"""The three forms of an example: prompt and completion, messages, text. The first record decides for all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from calmlm.data.jsonl import Record
from calmlm.errors import DataError

Format = Literal["prompt-completion", "messages", "text"]

FIELDS: dict[Format, tuple[str, ...]] = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {"messages": ("tools",)}
"""What a record may hold besides: the tools that an assistant may call, as a chat template takes them."""
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """One example: `fields` holds the keys of its format, checked; other keys of the record are dropped."""

    format: Format
    fields: dict[str, Any]
    place: str


def read_examples(records: Iterable[Record]) -> list[Example]:
    """Check every record against the format of the first.

    Raises:
        DataError: a record has no known format, a field is missing, empty or of the wrong type, or formats are mixed.
    """
    examples: list[Example] = []
    for record in records:
        found = detect_format(record)
        if examples and found != examples[0].format:
            raise DataError(
                f"{record.place}: expected {_fields(examples[0].format)} as in {examples[0].place}, but got "
                f"{_fields(found)}; keep one format in all data of a run."
            )
        fields = {key: record.fields[key] for key in FIELDS[found]}
        for key in OPTIONAL.get(found, ()):
            if record.fields.get(key) is not None:
                fields[key] = _tools(record.fields[key], record.place)
        _check_messages(fields["messages"], record.place) if found == "messages" else _check_texts(fields, record.place)
        examples.append(Example(found, fields, record.place))
    return examples


def detect_format(record: Record) -> Format:
    """The format whose fields a record has.

    Raises:
        DataError: there is none, or more than one.
    """
    matches: list[Format] = [name for name, keys in FIELDS.items() if all(key in record.fields for key in keys)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise DataError(
            f"{record.place}: expected one format, but got the fields of {' and of '.join(map(_fields, matches))}; "
            f"remove those that are not meant."
        )
    found = ", ".join(repr(key) for key in record.fields) or "none"
    raise DataError(
        f"{record.place}: expected the fields 'prompt' and 'completion', or 'messages', or 'text', but got {found}; "
        f"rename or add them."
    )


def _fields(name: Format) -> str:
    return " and ".join(repr(key) for key in FIELDS[name])


def _check_texts(fields: dict[str, Any], place: str) -> None:
    for key, value in fields.items():
        if not isinstance(value, str):
            raise DataError(
                f"{place}: expected a string in '{key}', but got {type(value).__name__}; put the text in quotes."
            )
        check_text(value, place)
        if key != "prompt" and not value:
            raise DataError(
                f"{place}: expected text in '{key}', but it is empty, so there is nothing to learn from it; "
                f"fill it in or remove the record."
            )


def check_text(text: str, place: str) -> None:
    """Raise unless a text can be written down: halves of characters come from cut escapes and wrong encodings.

    Raises:
        DataError: otherwise.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: expected text in Unicode, but got half of a character ({text[error.start]!r}) at position "
            f"{error.start + 1}; save the text as UTF-8."
        ) from None


def _check_messages(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{place}: expected a list of messages in 'messages', but got {_short(messages)}; write for example "
            f'[{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}].'
        )
    for number, message in enumerate(messages, start=1):
        calls = isinstance(message, dict) and message.get("role") == "assistant" and message.get("tool_calls")
        said = isinstance(message, dict) and (
            isinstance(message.get("content"), str) or (calls and message.get("content") is None)
        )
        if not said:
            raise DataError(
                f"{place}: expected 'role' and 'content' as strings in message {number}, but got {_short(message)}; "
                f"write both."
            )
        check_text(message["content"] or "", place)
        if message.get("role") not in ROLES:
            raise DataError(
                f"{place}: expected the role of message {number} to be one of {', '.join(ROLES)}, but got "
                f"{message.get('role')!r}; rename it."
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{place}: expected a message of the role assistant, but there is none, so there is nothing to learn from "
            f"it; add the answer or remove the record."
        )


def _tools(tools: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{place}: expected a list of tool descriptions in 'tools', but got {_short(tools)}; write them as JSON "
            f"schemas, or leave the field out."
        )
    return tools


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
