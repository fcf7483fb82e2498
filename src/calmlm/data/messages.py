"""Messages, tools and template settings as records hold them, in the one form that a chat template takes.

TRL's habits hold: what is missing is null, and tools may be JSON in a string. Data sets store nested values so, because
their columns have one type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from calmlm.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Under which names an assistant's reasoning stands; transformers hands any of them to the template."""
TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(messages: Any, place: str, field: str = "messages", *, answered: bool = True) -> list[dict[str, Any]]:
    """Check messages; return them without nulls, with content as text and calls as a list.

    Args:
        messages: what stands in the record.
        place: where, for messages.
        field: under which key.
        answered: whether an assistant has to speak in them.

    Raises:
        DataError: a message is none, has no known role, or says nothing.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{place}: expected a list of messages in '{field}', but got {short(messages)}; write for example "
            f'[{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}].'
        )
    found = [_message(message, number, place) for number, message in enumerate(messages, start=1)]
    if answered and not any(message["role"] == "assistant" for message in found):
        where = "" if field == "messages" else f" in '{field}'"
        raise DataError(
            f"{place}: expected a message of the role assistant{where}, but there is none, so there is nothing to "
            f"learn from it; add the answer or remove the record."
        )
    return found


def read_tools(tools: Any, place: str) -> list[dict[str, Any]] | None:
    """The descriptions of tools, from a list or JSON; None for none.

    Raises:
        DataError: they are no JSON schemas.
    """
    found = _objects(tools)
    if found is None:
        raise DataError(
            f"{place}: expected a list of tool descriptions in 'tools', but got {short(tools)}; write them as JSON "
            f"schemas, or leave the field out."
        )
    check_texts(found, place)
    return found or None  # some templates write their part about tools for an empty list as well


def read_settings(settings: Any, place: str) -> dict[str, Any]:
    """The template's settings (``chat_template_kwargs``), from a mapping or JSON.

    Raises:
        DataError: they are no mapping.
    """
    found = _parsed(settings)
    if not isinstance(found, dict):
        raise DataError(
            f"{place}: expected a mapping in 'chat_template_kwargs', but got {short(settings)}; write for example "
            f'{{"enable_thinking": false}}.'
        )
    check_texts(found, place)
    return found


def check_texts(value: Any, place: str) -> None:
    """``check_text`` for every text within a value.

    Raises:
        DataError: for one that cannot be written down.
    """
    for text in _texts(value):
        check_text(text, place)


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


def without_nulls(value: Any) -> Any:
    """A value without the keys that hold null; in Arrow every row, message and call has the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def short(value: object) -> str:
    """A value as it arrived, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(message: Any, number: int, place: str) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if isinstance(given.get("content"), list):
        given["content"] = _joined(given["content"], number, place)
    calls = given.pop("tool_calls", [])
    if (found := _objects(calls)) is None:
        raise DataError(
            f"{place}: expected a list of calls in 'tool_calls' of message {number}, but got {short(calls)}; write for "
            f'example [{{"type": "function", "function": {{"name": "...", "arguments": {{}}}}}}].'
        )
    if found:
        given["tool_calls"] = found
    content, role = given.get("content"), given.get("role")
    # An assistant may call or think instead of speaking, and what a tool gives back may be nothing.
    silent = role == "tool" or (role == "assistant" and any(given.get(key) for key in ("tool_calls", *REASONING)))
    if not given or not (isinstance(content, str) or (content is None and silent)):
        raise DataError(
            f"{place}: expected 'role' and 'content' as strings in message {number}, but got {short(message)}; write "
            f"both."
        )
    if role not in ROLES:
        raise DataError(
            f"{place}: expected the role of message {number} to be one of {', '.join(ROLES)}, but got {role!r}; rename "
            f"it."
        )
    check_texts(given, place)
    return given


def _joined(parts: list[Any], number: int, place: str) -> str:
    """The text of content in parts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise DataError(
                f"{place}: expected parts of text in the content of message {number}, but got one of the kind "
                f"{kind!r}; leave it out, since calmlm trains on text."
            )
        texts.append(text)
    return "".join(texts)


def _objects(value: Any) -> list[dict[str, Any]] | None:
    """A list of JSON objects, where the value is one, or JSON for one; else None."""
    found = _parsed(value)
    found = [_parsed(part) for part in found] if isinstance(found, list) else None
    return found if found is not None and all(isinstance(part, dict) for part in found) else None


def _parsed(value: Any) -> Any:
    """What a string of JSON stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
