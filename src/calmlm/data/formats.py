"""The forms of an example: prompt and completion, messages, both of these at once, text. The first record decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from calmlm.data.jsonl import Record
from calmlm.data.messages import check_text, read_messages, read_settings, read_tools
from calmlm.errors import DataError

Format = Literal["prompt-completion", "messages", "exchange", "text"]
"""An exchange is a prompt and a completion, each a list of messages: of the conversation, the completion is learned."""

FIELDS: dict[Format, tuple[str, ...]] = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
CONVERSATIONS = ("messages", "exchange")
"""The formats that a chat template writes; they may come with tools that an assistant may call, and its settings."""


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
        read = _conversation if found in CONVERSATIONS else _texts
        examples.append(Example(found, read(record, found), record.place))
    return examples


def detect_format(record: Record) -> Format:
    """The format whose fields a record has; what is null is missing.

    Raises:
        DataError: there is none, or more than one.
    """
    given = {key for key, value in record.fields.items() if value is not None}
    # Where nothing else is there, a null stands in the place of a text, and is spoken of as such.
    matches = _matching(given) or _matching(set(record.fields))
    if len(matches) == 1:
        pair = matches[0] == "prompt-completion"
        lists = pair and any(isinstance(record.fields[key], list) for key in FIELDS["prompt-completion"])
        return "exchange" if lists else matches[0]
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


def _matching(keys: set[str]) -> list[Format]:
    return [name for name, wanted in FIELDS.items() if keys.issuperset(wanted)]


def _fields(name: Format) -> str:
    if name == "exchange":
        return "'prompt' and 'completion' as messages"
    return " and ".join(repr(key) for key in FIELDS[name])


def _conversation(record: Record, found: Format) -> dict[str, Any]:
    given, place = record.fields, record.place
    if found == "messages":
        fields: dict[str, Any] = {"messages": read_messages(given["messages"], place)}
    else:
        asked = read_messages(given["prompt"], place, "prompt", answered=False)
        fields = {"prompt": asked, "completion": read_messages(given["completion"], place, "completion")}
    if given.get("tools") is not None and (tools := read_tools(given["tools"], place)) is not None:
        fields["tools"] = tools
    if given.get("chat_template_kwargs") is not None:
        fields["chat_template_kwargs"] = read_settings(given["chat_template_kwargs"], place)
    return fields


def _texts(record: Record, found: Format) -> dict[str, Any]:
    fields = {key: record.fields[key] for key in FIELDS[found]}
    for key, value in fields.items():
        if value is None:
            raise DataError(
                f"{record.place}: expected a string in '{key}', but it is null, as None, NA and nothing are read in a "
                f"CSV; fill it in or remove the record."
            )
        if not isinstance(value, str):
            raise DataError(
                f"{record.place}: expected a string in '{key}', but got {type(value).__name__}; put the text in quotes."
            )
        check_text(value, record.place)
        if key != "prompt" and not value:
            raise DataError(
                f"{record.place}: expected text in '{key}', but it is empty, so there is nothing to learn from it; "
                f"fill it in or remove the record."
            )
    return fields
