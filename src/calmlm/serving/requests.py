"""From a request to texts that the engine writes: prompts in tokens, limits, and how tokens are taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calmlm.data.labels import encode_prompt
from calmlm.errors import CalmError, first_line
from calmlm.serving.batching import Text
from calmlm.serving.catalogue import Catalogue, Served
from calmlm.serving.grammar import ANY_OBJECT, JsonGrammar
from calmlm.serving.next_token import Chooser, Sampling
from calmlm.serving.protocol import Asked, ChatRequest, CompletionRequest, Message, TokenizeRequest
from calmlm.serving.refusals import RefusalError, no_model
from calmlm.serving.writing import Piece, Writing
from calmlm.tokens.chat import in_parts, takes_parts
from calmlm.tokens.transcript import Transcript

DEFAULT_TOKENS = 16  # of a completion that says nothing of its length, as OpenAI's


@dataclass(frozen=True)
class Job:
    """All texts of one request.

    Attributes:
        served: the model.
        prompts: tokens of each prompt.
        writings: one for each choice, those of the first prompt first.
    """

    served: Served
    prompts: list[list[int]]
    writings: list[Writing]


def find(catalogue: Catalogue, name: str) -> Served:
    """The model of a name.

    Raises:
        RefusalError: there is none.
    """
    served = catalogue.models.get(name)
    if served is None:
        raise no_model(name)
    return served


def make_job(
    catalogue: Catalogue, asked: CompletionRequest | ChatRequest, deliver: Callable[[int, Piece], None], most: int
) -> Job:
    """The texts of a request.

    Args:
        catalogue: what is served.
        asked: the request.
        deliver: takes the place of a choice, and each of its pieces, in the thread of the engine.
        most: texts that the engine can take on.

    Raises:
        RefusalError: the request cannot be answered.
    """
    served = find(catalogue, asked.model)
    chat = isinstance(asked, ChatRequest)
    prompts = [_conversation(asked.messages, served)] if isinstance(asked, ChatRequest) else _prompts(asked, served)
    sampling, vocabulary = _sampling(asked), served.lane.known_ids
    if any(token >= vocabulary for token in sampling.bias):
        raise RefusalError(400, f"logit_bias must name tokens below {vocabulary}: use this model's.", "logit_bias")
    if len(prompts) * asked.n > most:
        raise RefusalError(400, f"The request must ask for at most {most} texts: lower n, or send fewer prompts.", "n")
    if sampling.logprobs is not None:
        _ = served.bytes_of  # made here, where it keeps nobody waiting
    writings: list[Writing] = []
    for ids in prompts:
        _check(served, ids, "messages" if chat else "prompt")
        room = _room(asked, served, len(ids))
        beside = served.beside_for(ids, room)
        for _ in range(asked.n):
            place = len(writings)
            own = sampling if sampling.seed is None else Sampling(**{**vars(sampling), "seed": sampling.seed + place})
            writings.append(
                Writing(
                    Text(list(ids), len(ids)),
                    served.lane,
                    Chooser(served.lane.model, ids, own, _grammar(asked, served), served.lane.device),
                    Transcript(served.tokenizer, ids, [*asked.stops, *served.stops]),
                    served.ends,
                    room,
                    lambda piece, place=place: deliver(place, piece),  # type: ignore[misc]
                    served.name,
                    beside,
                    served.context(len(ids)),
                )
            )
    return Job(served, prompts, writings)


def tokens_of(catalogue: Catalogue, asked: TokenizeRequest) -> list[int]:
    """The tokens of a text or a conversation.

    Raises:
        RefusalError: there is neither or both, or no such model.
    """
    served = find(catalogue, asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise RefusalError(400, "The request must hold one of prompt and messages: send one of them.", "prompt")
    if asked.messages is not None:
        return _conversation(asked.messages, served)
    text = _text(asked.prompt or "", "prompt")
    if asked.add_special_tokens:
        return encode_prompt(text, served.tokenizer)
    return list(served.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check(served: Served, ids: list[int], param: str) -> None:
    try:
        served.check(ids)
    except CalmError as error:
        long = "context_length_exceeded" if "shorten" in str(error) else None
        raise RefusalError(400, str(error), param, long) from error


def _prompts(asked: CompletionRequest, served: Served) -> list[list[int]]:
    if asked.best_of is not None and asked.best_of != asked.n:
        raise RefusalError(400, "best_of must be n, since all choices are returned: leave it out.", "best_of")
    given: Any = asked.prompt
    prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    return [
        encode_prompt(_text(prompt, "prompt"), served.tokenizer) if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]


def _text(text: str, param: str) -> str:
    """A text that tokenizers can read.

    Raises:
        RefusalError: it holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefusalError(
            400, f"{param} must be text in Unicode, but holds half a character: repair it.", param
        ) from None
    return text


def _conversation(messages: list[Message], served: Served) -> list[int]:
    """The tokens of a conversation in the chat template.

    Raises:
        RefusalError: there is no template, it refuses the conversation, or a message holds something other than text.
    """
    tokenizer = served.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise RefusalError(
            400,
            f"The model {served.name!r} must have a chat template for messages, but its tokenizer has none: use "
            f"/v1/completions.",
            "messages",
        )
    said: Any = [
        {**message.model_dump(exclude_none=True), "content": _content(message)} if message.content is not None
        else message.model_dump(exclude_none=True)
        for message in messages
    ]  # fmt: skip
    try:
        written = in_parts(said) if takes_parts(tokenizer) else said
        rendered = tokenizer.apply_chat_template(written, tokenize=True, return_dict=True, add_generation_prompt=True)
        return list(rendered["input_ids"])
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise RefusalError(
            400,
            f"messages must suit the chat template, but it refuses them ({first_line(error)}): change them.",
            "messages",
        ) from error


def _content(message: Message) -> str:
    if isinstance(message.content, str):
        return _text(message.content, "messages")
    parts = message.content or []
    if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        raise RefusalError(
            400, "The content of messages must be text, but holds other parts: leave them out.", "messages"
        )
    return _text("".join(part["text"] for part in parts), "messages")


def _room(asked: CompletionRequest | ChatRequest, served: Served, given: int) -> int:
    """How many tokens may be written behind a prompt.

    Raises:
        RefusalError: more are asked for than fit.
    """
    left = served.limit - given
    wanted, param = asked.max_tokens, "max_tokens"
    if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
        wanted, param = asked.max_completion_tokens, "max_completion_tokens"
    if wanted is None:
        return left if isinstance(asked, ChatRequest) else min(left, DEFAULT_TOKENS)
    if wanted > left:
        raise RefusalError(
            400,
            f"{param} must be at most {left} behind a prompt of {given} tokens, since {served.name!r} takes "
            f"{served.limit} in all, but got {wanted}: lower it, or shorten the prompt.",
            param,
            "context_length_exceeded",
        )
    return wanted


def _sampling(asked: CompletionRequest | ChatRequest) -> Sampling:
    logprobs: int | None
    if isinstance(asked, ChatRequest):
        if asked.top_logprobs is not None and not asked.logprobs:
            raise RefusalError(400, "top_logprobs must come with logprobs: set it to true.", "top_logprobs")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    else:
        logprobs = asked.logprobs
    if asked.stream_options is not None and not asked.stream:
        raise RefusalError(400, "stream_options must come with stream: leave it out.", "stream_options")
    try:
        bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
        if any(token < 0 for token in bias):
            raise ValueError
    except ValueError:
        raise RefusalError(
            400, "logit_bias must name tokens by their ids: send a map from ids.", "logit_bias"
        ) from None
    return Sampling(
        asked.temperature, asked.top_p, asked.seed, asked.presence_penalty, asked.frequency_penalty, bias, logprobs
    )


def _grammar(asked: Asked, served: Served) -> JsonGrammar | None:
    form = asked.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and form.json_schema is None:
        raise RefusalError(400, "response_format must hold a json_schema: send one.", "response_format")
    schema = ANY_OBJECT if form.json_schema is None else form.json_schema.schema_
    try:
        json.dumps(schema).encode()
        return served.schema_writer().grammar(schema)
    except (CalmError, ValueError, RecursionError) as error:
        raise RefusalError(400, str(error) or "response_format is too deep.", "response_format") from error
