"""What may stand in bodies, in the words of OpenAI's clients.

Owns the fields of bodies and their values. What a body may cost is body_limits.py's, what becomes of it protocol.py's.
Needs pydantic, which comes with FastAPI.

[Note: fields]
A field is honoured, harmless, or refused. Harmless fields say nothing about the text; whatever would change it and is
not there is refused by name, and so is a name that nobody knows: a request is never answered as if it had asked for
less.
"""

from __future__ import annotations

import secrets
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from yafsdp_like.inference.http.errors import UNSUPPORTED, invalid, shorten
from yafsdp_like.kernels.sampling_params import MAX_LOGPROBS, SamplingParams

MAX_STOP_STRINGS, MAX_STOP_STRING_LENGTH = 16, 256
SAMPLED = {item.name for item in fields(SamplingParams)} - {"seed"}


# --- values of fields ---


def _unsupported(instead: str, *harmless: Any) -> AfterValidator:
    """[Note: fields] What is not honoured: what to do instead, and the values that say what is done anyway."""

    def check(value: Any) -> Any:
        if value is not None and value not in harmless:
            raise PydanticCustomError(UNSUPPORTED, "{instead}", {"instead": instead})
        return value

    return AfterValidator(check)


def _as_prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(_are_ids(item) for item in value):
            return value
    raise ValueError("expected a string, a list of strings, a list of token ids or a list of such lists, none empty")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int}


def _as_stops(value: Any) -> list[str]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if (
        isinstance(strings, list)
        and len(strings) <= MAX_STOP_STRINGS
        and all(isinstance(string, str) and 0 < len(string) <= MAX_STOP_STRING_LENGTH for string in strings)
    ):
        return strings
    raise ValueError(
        f"expected a string or at most {MAX_STOP_STRINGS} strings, of 1 to {MAX_STOP_STRING_LENGTH} characters each"
    )


def _as_text(value: Any) -> str:
    """A message's content: a string, or parts of which all are text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise ValueError(f"only parts of type 'text' are understood, not {shorten(kind)[:40]}")
            if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
                raise ValueError('a part must be {"type": "text", "text": "..."}')
        return "\n".join(part["text"] for part in value)
    raise ValueError("expected a string, or a list of parts of type 'text'")


# --- bodies ---


class Body(BaseModel):
    """JSON is taken at its word: "1" is no number, and no field is too much."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Any = None  # harmless: there is none


class AnyBody(Body):
    """What completions and chats have in common. None is what a field is that was not sent."""

    model: str
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[list[str], BeforeValidator(_as_stops)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    # Beyond OpenAI's.
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)  # prefixes are shared with those who know it
    # [Note: fields] Harmless.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    # [Note: fields] Refused.
    logit_bias: Annotated[Any, _unsupported("biases of single tokens are not supported; leave it out", {})] = None

    @property
    def num_each(self) -> int:
        """Choices of one prompt."""
        return self.n or 1

    def check(self) -> None:
        """What no single field can tell. Raises ApiError for a combination that is not served."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "is only for stream: true")

    def sampling(self, choice: int, defaults: SamplingParams) -> SamplingParams:
        """How the choice of this index is drawn: with `seed` the same each time, and unlike its neighbours."""
        seed = secrets.randbits(63) if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63
        return replace(defaults, **self.model_dump(include=SAMPLED, exclude_none=True), seed=seed)


class CompletionBody(AnyBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: Annotated[Any, _unsupported("the model only continues a prompt; leave it out", "")] = None
    best_of: Any = None  # harmless where it is n

    def check(self) -> None:
        """Raise ApiError for a combination that is not served."""
        super().check()
        if self.best_of is not None and self.best_of != self.num_each:
            raise invalid("best_of", "answers are not ranked; leave it out, or say what n says", UNSUPPORTED)
        if self.echo and self.logprobs is not None:
            raise invalid("echo", "log-probabilities of the prompt are not computed: set echo or logprobs, not both")


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None  # harmless: templates do not show it
    # What assistants said, as clients send it back.
    refusal: None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


NO_TOOLS = "tools and functions are not supported; leave them out"
TEXT_ONLY = "only text is written; leave it out"


class ChatBody(AnyBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    parallel_tool_calls: Any = None
    # [Note: fields] Refused.
    tools: Annotated[Any, _unsupported(NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, _unsupported(NO_TOOLS, "none", "auto")] = None
    functions: Annotated[Any, _unsupported(NO_TOOLS, [])] = None
    function_call: Annotated[Any, _unsupported(NO_TOOLS, "none", "auto")] = None
    response_format: Annotated[Any, _unsupported("only {'type': 'text'} is supported", {"type": "text"})] = None
    modalities: Annotated[Any, _unsupported(TEXT_ONLY, ["text"])] = None
    audio: Annotated[Any, _unsupported(TEXT_ONLY)] = None
    prediction: Annotated[Any, _unsupported("nothing is predicted; leave it out")] = None
    reasoning_effort: Annotated[Any, _unsupported("there is no effort to choose; leave it out", "none")] = None
    verbosity: Annotated[Any, _unsupported("there is none to choose; leave it out", "medium")] = None
    web_search_options: Annotated[Any, _unsupported("nothing is searched; leave it out")] = None

    def check(self) -> None:
        """Raise ApiError for a combination that is not served."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid("max_tokens", "differs from max_completion_tokens, which replaces it: set only that one")
