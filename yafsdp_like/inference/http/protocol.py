"""What may be asked over HTTP, in the words of OpenAI's clients: bodies to requests, and errors.

Owns how bodies become requests; what may stand in them is bodies.py's, what they may cost body_limits.py's. Knows
nothing of routes, sockets or event loops. Needs pydantic and starlette, which come with FastAPI.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from yafsdp_like.inference.engine.request import PLAIN, Request
from yafsdp_like.inference.http.bodies import AnyBody, ChatBody, CompletionBody
from yafsdp_like.inference.http.body_limits import BodyLimits
from yafsdp_like.inference.http.errors import (
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
from yafsdp_like.kernels.sampling_params import SamplingParams

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI's
MIN_BODY_NBYTES, TOKEN_NBYTES = 2**20, 32  # of the limit; of a token, in whatever way it is written
MAX_ECHOED_CHARACTERS = 2**22  # characters of prompts that are said again, of all choices
PROBED, SPARED_TOKENS = 8, 64  # characters for each token that fits; tokens by which a cut may change their number


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
