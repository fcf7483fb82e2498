"""What requests look like: the fields of OpenAI's API that change an answer, with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MOST_STOPS, MOST_CHOICES, MOST_TOP, MOST_PROMPTS = 4, 128, 20, 128
LONGEST_STOP = 1024
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
Count = Annotated[int, Field(ge=1, strict=True)]
Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]


def _or_null(schema: dict[str, Any]) -> None:
    """A null stands for the default, and the schema says so."""
    kept = {key: schema.pop(key) for key in list(schema) if key not in ("title", "default")}
    schema["anyOf"] = [kept, {"type": "null"}]


NULLABLE = Field(json_schema_extra=_or_null)


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
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES, strict=True), NULLABLE] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
    max_tokens: Count | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2), NULLABLE] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2), NULLABLE] = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    stream: Annotated[bool, NULLABLE] = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """A null is the default, as clients send it for what they leave out."""
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given

    @field_validator("stop", mode="before")
    @classmethod
    def _of_stops(cls, given: Any) -> Any:
        stops = given if isinstance(given, list) else [given]
        if len(stops) > MOST_STOPS:
            raise ValueError(f"at most {MOST_STOPS} strings are taken, but got {len(stops)}; leave some out")
        if not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
            raise ValueError(f"expected one string or several, each of 1 to {LONGEST_STOP} characters")
        return given

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
    suffix: Literal[""] | None = None
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
    logprobs: Annotated[bool, NULLABLE] = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP, strict=True)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None

    @field_validator("tools", "functions", mode="before")
    @classmethod
    def _none_is_called(cls, given: Any) -> Any:
        if given:
            raise ValueError("no tools are called here; leave them out")
        return given


class TokenizeRequest(BaseModel):
    """A text, or a conversation, whose tokens are asked for."""

    model: Name
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
