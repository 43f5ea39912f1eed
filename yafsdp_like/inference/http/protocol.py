"""What may be asked over HTTP, in the words of OpenAI's clients: bodies to requests, and errors.

Owns the fields of bodies, and what may stand in them; what they may cost is body_limits.py's. Knows nothing of routes,
sockets or event loops. Needs pydantic and starlette, which come with FastAPI.

[Note: fields]
A field is honoured, harmless, or refused. Harmless fields say nothing about the text; whatever would change it and is
not there is refused by name, and so is a name that nobody knows: a request is never answered as if it had asked for
less.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from yafsdp_like.inference.engine.request import PLAIN, Request
from yafsdp_like.inference.http.body_limits import BodyLimits
from yafsdp_like.inference.http.errors import (
    UNSUPPORTED,
    ApiError,
    invalid,
    invalid_body,
    shorten,
    too_long,
    too_many_choices,
)
from yafsdp_like.inference.http.options import HttpOptions
from yafsdp_like.inference.http.responses import ChatFormat, Choice, CompletionFormat, ParsedRequest, ResponseFormat
from yafsdp_like.inference.text.codec import Codec, Transcript
from yafsdp_like.kernels.sampling_params import MAX_LOGPROBS, SamplingParams

T = TypeVar("T")

MAX_STOP_STRINGS, MAX_STOP_STRING_LENGTH = 16, 256
DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI's
MIN_BODY_NBYTES, TOKEN_NBYTES = 2**20, 32  # of the limit; of a token, in whatever way it is written
MAX_ECHOED_CHARACTERS = 2**22  # characters of prompts that are said again, of all choices
PROBED, SPARED_TOKENS = 8, 64  # characters for each token that fits; tokens by which a cut may change their number
SAMPLED = {item.name for item in fields(SamplingParams)} - {"seed"}


@dataclass(frozen=True, kw_only=True)
class ServerOptions(HttpOptions):
    """Options of the HTTP interface, and what it must know of the model."""

    model_name: str
    vocab_size: int  # token ids from there on are refused
    max_seq_len: int  # tokens of a prompt and its answer together
    aliases: tuple[str, ...] = ()  # other names that requests may call the model
    sampling: SamplingParams = PLAIN  # where a request gives no value
    admin_key: str | None = None  # bearer token under /admin, for a pool of models; null: nothing is there

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.admin_key is not None and self.admin_key == self.api_key:
            raise ValueError("the admin key is the users' key, so that every user could unload models: choose another")

    @property
    def body_limit_nbytes(self) -> int:
        """A body may have this many bytes for each token that could be served in answer to it."""
        return min(self.max_body_nbytes, max(MIN_BODY_NBYTES, TOKEN_NBYTES * self.max_choices * self.max_seq_len))


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


# --- bodies to jobs ---


class RequestParser:
    """Bodies to jobs, from any thread; a long text takes more time than an event loop has."""

    def __init__(self, codec: Codec, options: ServerOptions) -> None:
        self._codec, self._options = codec, options
        max_characters = codec.max_characters(options.max_seq_len)
        self.limits = BodyLimits(options.max_seq_len, options.max_choices, max_characters)

    @property
    def options(self) -> ServerOptions:
        """The options that requests are read by."""
        return self._options

    def read(
        self, kind: type[CompletionBody] | type[ChatBody], raw: bytes, arrival: float | None = None
    ) -> ParsedRequest:
        """Parse a JSON body that arrived at ``arrival``, in seconds of time.monotonic().

        Raises ApiError for what is not served; what would take long to parse is refused before it is.
        """
        return self.read_sent(kind, self.limits.parse(raw), arrival)

    def read_sent(
        self, kind: type[CompletionBody] | type[ChatBody], sent: Any, arrival: float | None = None
    ) -> ParsedRequest:
        """Read what ``BodyLimits.parse`` gave of a body; see ``read``."""
        self.limits.check(sent)
        try:
            body = kind.model_validate(sent)
        except ValidationError as error:
            raise invalid_body(error.errors(include_url=False, include_context=False)[0]) from None
        return self.completion(body, arrival) if isinstance(body, CompletionBody) else self.chat(body, arrival)

    def completion(self, body: CompletionBody, arrival: float | None = None) -> ParsedRequest:
        """Raises ApiError for what is not served."""
        self._check(body, len(body.prompt))
        prompts = [self._prompt(prompt) for prompt in body.prompt]
        max_tokens = [self._max_tokens("prompt", prompt, body.max_tokens, DEFAULT_MAX_TOKENS) for prompt in prompts]
        format = CompletionFormat(self._codec, self._echoes(body), body.logprobs is not None)
        return self._parse(body, format, prompts, max_tokens, body.logprobs, arrival)

    def chat(self, body: ChatBody, arrival: float | None = None) -> ParsedRequest:
        """Raises ApiError for what is not served."""
        self._check(body, 1)
        for message in body.messages:
            self._probe("messages", message.content)
        # Templates know the older of the two names.
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in body.messages
        ]
        prompt = self._ids("messages", self._codec.encode_chat, messages)
        asked = body.max_completion_tokens or body.max_tokens
        max_tokens = self._max_tokens("messages", prompt, asked, self._options.max_seq_len)
        format = ChatFormat(self._codec, bool(body.logprobs))
        return self._parse(
            body, format, [prompt], [max_tokens], (body.top_logprobs or 0) if body.logprobs else None, arrival
        )

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model."""
        return self._options.model_name, *self._options.aliases

    def check_model(self, name: str) -> None:
        """Raises ApiError unless it is the one that is served."""
        if name not in self.names:
            message = f"model: there is no {shorten(name)} here, only {self._options.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check(self, body: AnyBody, num_prompts: int) -> None:
        body.check()
        self.check_model(body.model)
        if (num_choices := num_prompts * body.num_each) > self._options.max_choices:
            raise too_many_choices(num_choices, self._options.max_choices)

    def _prompt(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            self._probe("prompt", prompt)
            return self._ids("prompt", self._codec.encode, prompt)
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < self._options.vocab_size:
                most = self._options.vocab_size - 1
                raise invalid("prompt", f"token ids must be from 0 to {most}, found {shorten(token)}")
        return tuple(prompt)

    def _probe(self, param: str, text: str) -> None:
        """Raises ApiError for a text whose beginning alone is too long, before all of it is cut into tokens."""
        room = self._options.max_seq_len
        if len(text) > 2 * PROBED * room:
            num_tokens = len(self._ids(param, self._codec.encode, text[: PROBED * room]))
            if num_tokens > room + SPARED_TOKENS:
                raise too_long(param, f"{num_tokens} tokens, of the first {PROBED * room} characters alone", room)

    def _ids(self, param: str, encode: Callable[[T], tuple[int, ...]], text: T) -> tuple[int, ...]:
        try:
            ids = encode(text)
        except ValueError as error:
            raise invalid(param, str(error)) from error
        if not ids:
            raise invalid(param, "must give at least one token, found none")
        return ids

    def _echoes(self, body: CompletionBody) -> tuple[str, ...]:
        """Of each choice."""
        if not body.echo:
            return ("",) * (len(body.prompt) * body.num_each)
        said = [prompt if isinstance(prompt, str) else self._codec.decode(prompt) for prompt in body.prompt]
        if (length := sum(map(len, said)) * body.num_each) > MAX_ECHOED_CHARACTERS:
            raise invalid("echo", f"at most {MAX_ECHOED_CHARACTERS} characters are said again, found {length}; lower n")
        return tuple(text for text in said for _ in range(body.num_each))

    def _max_tokens(self, param: str, prompt: Sequence[int], asked: int | None, default: int) -> int:
        """Tokens to generate after a prompt: what was asked for, which must fit, or as much of the default as fits."""
        room = self._options.max_seq_len - len(prompt)
        if room < (asked or 1):
            words = f"{len(prompt)} tokens, and {shorten(asked or 1)} to generate"
            raise too_long(param, words, self._options.max_seq_len)
        return asked or min(default, room)

    def _parse(
        self,
        body: AnyBody,
        format: ResponseFormat,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: Sequence[int],  # of each prompt
        num_logprobs: int | None,
        arrival: float | None,
    ) -> ParsedRequest:
        response_id = f"{format.prefix}-{secrets.token_hex(12)}"
        arrival = time.monotonic() if arrival is None else arrival
        deadline = None if self._options.timeout_s is None else arrival + self._options.timeout_s
        choices = []
        for index in range(len(prompts) * body.num_each):
            number, draw = divmod(index, body.num_each)
            request = Request(
                id=f"{response_id}-{index}",
                prompt=prompts[number],
                sampling=body.sampling(draw, self._options.sampling),
                max_tokens=max_tokens[number],
                stop_tokens=frozenset() if body.ignore_eos else self._codec.stop_tokens,
                num_logprobs=num_logprobs,
                deadline=deadline,
                salt=body.cache_salt,
                model=self._options.model_name,
            )
            choices.append(Choice(index, request, Transcript(self._codec, request.prompt, body.stop)))
        return ParsedRequest(
            id=response_id,
            model=self._options.model_name,
            format=format,
            choices=tuple(choices),
            num_prompt_tokens=sum(len(prompt) for prompt in prompts),
            wants_stream=bool(body.stream),
            wants_usage=bool(body.stream_options and body.stream_options.include_usage),
            arrival=arrival,
        )
