"""What requests look like: the fields of OpenAI's API that change an answer, with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Count = Annotated[int, Field(ge=1, strict=True)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
MOST_STOPS, MOST_CHOICES, MOST_TOP, MOST_PROMPTS = 4, 128, 20, 128
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema that an answer follows."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = "answer"
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Asked(BaseModel):
    """What both kinds of completions have in common. What is not named here changes nothing, and is ignored."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES, strict=True)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
    max_tokens: Count | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the tokens that it took."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Asked):
    """A text, or tokens, to go on from."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[list[Token]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP, strict=True)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Count | None = None


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Asked):
    """A conversation to go on from."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP, strict=True)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None


class TokenizeRequest(BaseModel):
    """A text, or a conversation, whose tokens are asked for."""

    model: Name
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
