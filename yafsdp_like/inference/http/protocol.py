"""What may be asked over HTTP, in the words of OpenAI's clients: bodies to requests, and errors.

Owns how bodies become requests; what may stand in them is bodies.py's, what they may cost body_limits.py's. Knows
nothing of routes, sockets or event loops. Needs pydantic and starlette, which come with FastAPI.

[Note: long texts]
Cutting a text into tokens takes seconds for a few megabytes, and as long if it is then refused. So of a text with many
characters for each token that fits, words are counted first, each of which is a token at least where no token of the
vocabulary spans two. What is left, long runs of one character say, is cut a part at a time, until there are too many.
Both happen in threads that let others run, in calls of a few milliseconds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from yafsdp_like.inference.engine.image_tokens import Image, PlacedImage, place_images
from yafsdp_like.inference.engine.request import PLAIN, Grammar, Request, TokenLimits
from yafsdp_like.inference.http.bodies import AnyBody, ChatBody, ChatMessage, CompletionBody, StreamOptions
from yafsdp_like.inference.http.body_limits import BodyLimits
from yafsdp_like.inference.http.content_parts import FETCH_S, image_bytes
from yafsdp_like.inference.http.errors import (
    UNSUPPORTED,
    ApiError,
    invalid,
    invalid_body,
    shorten,
    too_long,
    too_many_choices,
)
from yafsdp_like.inference.http.foreign_fields import leave_out
from yafsdp_like.inference.http.options import HttpOptions
from yafsdp_like.inference.http.responses import ChatFormat, Choice, CompletionFormat, ParsedRequest, ResponseFormat
from yafsdp_like.inference.text.chat import Conversation
from yafsdp_like.inference.text.codec import Codec, Transcript, Wording
from yafsdp_like.inference.text.image_reader import ImageReader
from yafsdp_like.inference.text.tool_calls import OPENING, ToolCallParser, ToolFormat
from yafsdp_like.kernels.sampling_params import SamplingParams

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI's
MIN_BODY_NBYTES, TOKEN_NBYTES = 2**20, 32  # of the limit; of a token, in whatever way it is written
MAX_PROMPT_LOGPROBS = 2**20  # log-probabilities of prompts, of all choices
MAX_ECHOED_CHARACTERS = 2**22  # characters of prompts that are said again, of all choices
PROBED = 16  # characters for each token that fits, from which on a text is looked at before
PART_LENGTH, SPARED_TOKENS = 2**14, 64  # characters looked at at a time; tokens by which a cut may change their number


@dataclass(frozen=True, kw_only=True)
class ServerOptions(HttpOptions):
    """Options of the HTTP interface, and what it must know of the model."""

    model_name: str
    vocab_size: int  # token ids from there on are refused
    max_seq_len: int  # tokens of a prompt and its answer together
    aliases: tuple[str, ...] = ()  # other names that requests may call the model
    sampling: SamplingParams = PLAIN  # where a request gives no value
    has_grammars: bool = True  # whether a text may be bound to one: tensor parallel ranks cannot share its state
    admin_key: str | None = None  # bearer token of those who load models and adapters; null: nobody may
    takes_images: bool = False  # whether bodies may be as long as images make them
    adapter_of: str | None = None  # name of the model that this one is a LoRA adapter of; null: it is a model

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.admin_key is not None and self.admin_key == self.api_key:
            raise ValueError("the admin key is the users' key, so that every user could unload models: choose another")

    @property
    def body_limit_nbytes(self) -> int:
        """A body may have this many bytes for each token that could be served in answer to it."""
        if self.takes_images:
            return self.max_body_nbytes
        return min(self.max_body_nbytes, max(MIN_BODY_NBYTES, TOKEN_NBYTES * self.max_choices * self.max_seq_len))


# --- bodies to jobs ---


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts of a body as ids, and what is asked about each."""

    prompts: Sequence[tuple[int, ...]]
    max_tokens: Sequence[int]
    num_logprobs: int | None
    num_prompt_logprobs: int | None
    images: tuple[PlacedImage, ...] = ()  # of the only prompt

    def check(self, num_each: int) -> None:
        """Raises ApiError where an answer would be too long."""
        if self.num_prompt_logprobs is not None:
            count = sum(map(len, self.prompts)) * num_each * (1 + self.num_prompt_logprobs)
            if count > MAX_PROMPT_LOGPROBS:
                message = f"at most {MAX_PROMPT_LOGPROBS} in all, found {count}; ask about fewer prompts at once"
                raise invalid("prompt_logprobs", message)


def known_fields(kind: type[AnyBody], sent: Any, options: HttpOptions) -> tuple[Any, list[str]]:
    """Return a body without fields that are not known here, and the names of those that ask for something.

    Raises ApiError for the latter where the server is strict.
    """
    if not isinstance(sent, dict):
        return sent, []
    known, is_strict = set(kind.model_fields), options.strict
    if not options.priorities:
        known.discard("priority")
    kept, ignored = leave_out(sent, known, is_strict=is_strict)
    if isinstance(of_stream := kept.get("stream_options"), dict):
        kept["stream_options"], more = leave_out(of_stream, StreamOptions.model_fields, "stream_options.", is_strict)
        ignored += more
    if isinstance(messages := kept.get("messages"), list):
        kept["messages"] = [*messages]
        for index, message in enumerate(messages):
            if isinstance(message, dict):
                path = f"messages[{index}]."
                kept["messages"][index], more = leave_out(message, ChatMessage.model_fields, path, is_strict)
                ignored += more
    return kept, ignored


def _parts(texts: Iterable[str]) -> Iterator[str]:
    return (text[start : start + PART_LENGTH] for text in texts for start in range(0, len(text), PART_LENGTH))


class RequestParser:
    """Bodies to jobs, from any thread; a long text takes more time than an event loop has."""

    def __init__(self, codec: Codec, options: ServerOptions, images: ImageReader | None = None) -> None:
        """``images``: None where the model sees none."""
        self._codec, self._options, self._images = codec, options, images
        max_characters = codec.max_characters(options.max_seq_len)
        self.limits = BodyLimits(options.max_seq_len, options.max_choices, max_characters)

    def of_adapter(self, name: str) -> RequestParser:
        """Return the parser of a LoRA adapter of this model."""
        told = replace(self._options, model_name=name, aliases=(), adapter_of=self._options.model_name)
        return RequestParser(self._codec, told, self._images)

    @property
    def codec(self) -> Codec:
        """The tokenizer of the model."""
        return self._codec

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
        kept, ignored = known_fields(kind, sent, self._options)
        try:
            body = kind.model_validate(kept)
        except ValidationError as error:
            raise invalid_body(error.errors(include_url=False, include_context=False)[0]) from None
        parsed = self.completion(body, arrival) if isinstance(body, CompletionBody) else self.chat(body, arrival)
        return replace(parsed, ignored=tuple(ignored))

    def completion(self, body: CompletionBody, arrival: float | None = None) -> ParsedRequest:
        """Raises ApiError for what is not served."""
        self._check(body, len(body.prompt))
        asked = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        prompts = [self._cut(body, self._prompt(body, prompt), asked) for prompt in body.prompt]
        max_tokens = [self._max_tokens("prompt", prompt, asked) for prompt in prompts]
        format = CompletionFormat(
            self._codec,
            self._echoes(body, prompts),
            has_logprobs=body.logprobs is not None,
            has_ids=bool(body.return_token_ids),
            has_echo=bool(body.echo),
            has_prompt_logprobs=body.prompt_logprobs is not None,
        )
        encoded = EncodedPrompts(prompts, max_tokens, body.logprobs, body.num_prompt_logprobs)
        return self._parse(body, format, encoded, arrival)

    def chat(self, body: ChatBody, arrival: float | None = None) -> ParsedRequest:
        """Raises ApiError for what is not served."""
        self._check(body, 1)
        if body.images and self._images is None:  # before the chat template, which may fail on anything but strings
            raise invalid("messages", "the model takes no images; send text alone", UNSUPPORTED)
        tool_format, conversation = self._tool_format(body), self._conversation(body)
        self._probe("messages", *conversation.texts)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        prompt, images = self._see(body, self._ids("messages", self._codec.encode_chat, conversation), asked or 1)
        max_tokens = self._max_tokens("messages", prompt, self._options.max_seq_len if asked is None else asked)
        has_prompt_logprobs = body.prompt_logprobs is not None
        format = ChatFormat(self._codec, bool(body.logprobs), bool(body.return_token_ids), has_prompt_logprobs)
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        encoded = EncodedPrompts([prompt], [max_tokens], num_logprobs, body.prompt_logprobs, images)
        parsed = self._parse(body, format, encoded, arrival)
        if tool_format is not None:
            for choice in parsed.choices:
                choice.tools = ToolCallParser(tool_format)
        return parsed

    def _see(
        self, body: ChatBody, prompt: tuple[int, ...], max_tokens: int
    ) -> tuple[tuple[int, ...], tuple[PlacedImage, ...]]:
        """A chat's prompt with a token for each row of its images, and these, where it has any."""
        urls = body.images
        if not urls:
            return self._cut(body, prompt, max_tokens), ()
        assert self._images is not None  # `chat` has refused them
        if body.truncate_prompt_tokens is not None:
            raise invalid("truncate_prompt_tokens", "could cut an image; leave it out", UNSUPPORTED)
        if len(urls) > (most := self._options.max_images):
            raise invalid("messages", f"at most {most} images in all, found {len(urls)}")
        num_tokens = len(prompt) + len(urls) * (self._images.config.num_rows - 1)
        if num_tokens >= self._options.max_seq_len:  # before anything is decoded
            raise too_long("messages", f"{num_tokens} tokens, and 1 to generate", self._options.max_seq_len)
        until = time.monotonic() + FETCH_S
        images = [self._image(self._images, number, url, until) for number, url in enumerate(urls, 1)]
        try:
            return place_images(prompt, images, self._images.config)
        except ValueError as error:
            raise invalid("messages", f"the model's chat template has no place for each image: {error}") from error

    def _image(self, reader: ImageReader, number: int, url: str, until: float) -> Image:
        try:
            return reader.read(image_bytes(url, self._options.max_image_nbytes, self._options.image_hosts, until))
        except ValueError as error:
            raise invalid("messages", f"image {number}: {error}") from error

    def _tool_format(self, body: AnyBody) -> ToolFormat | None:
        """How calls of tools are written in the answer; None where there are none."""
        if not isinstance(body, ChatBody) or not body.given_tools:
            return None
        if body.forced_tools:
            return "json"
        found = self._codec.tool_format
        if found is None:
            message = "the model's chat template knows of none, or of no format that is read here; leave them out"
            raise invalid("tools", message, UNSUPPORTED)
        return found

    def _conversation(self, body: ChatBody) -> Conversation:
        try:
            return Conversation(
                [message.for_template() for message in body.messages],
                tools=body.given_tools,
                more=body.chat_template_kwargs or {},
                ends_with_prompt=not body.continue_final_message and body.add_generation_prompt is not False,
                is_continued=bool(body.continue_final_message),
            )
        except ValueError as error:
            raise invalid("chat_template_kwargs", str(error)) from error

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model."""
        return self._options.model_name, *self._options.aliases

    def check_model(self, name: Any) -> None:
        """Raises ApiError unless it is the one that is served."""
        if name not in self.names:
            message = f"model: there is no {shorten(name)} here, only {self._options.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check(self, body: AnyBody, num_prompts: int) -> None:
        body.check()
        self.check_model(body.model)
        if (num_choices := num_prompts * body.num_each) > self._options.max_choices:
            raise too_many_choices(num_choices, self._options.max_choices)

    def _prompt(self, body: CompletionBody, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            self._probe("prompt", prompt)
            encode = self._codec.encode
            if body.add_special_tokens is False:
                encode = partial(encode, add_special_tokens=False)
            return self._ids("prompt", encode, prompt)
        self.check_ids("prompt", prompt)
        return tuple(prompt)

    def check_ids(self, param: str, ids: Collection[int]) -> None:
        """Raises ApiError for tokens that are not in the vocabulary."""
        for token in (min(ids), max(ids)) if ids else ():
            if not 0 <= token < self._options.vocab_size:
                most = self._options.vocab_size - 1
                raise invalid(param, f"token ids must be from 0 to {most}, found {shorten(token)}")

    def _limits(self, body: AnyBody) -> TokenLimits | None:
        """What may be drawn; None for everything, as most requests have it."""
        for param in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            self.check_ids(param, getattr(body, param) or ())
        allowed = None if body.allowed_token_ids is None else tuple(body.allowed_token_ids)
        encode = partial(self._codec.encode, add_special_tokens=False)
        words = dict.fromkeys(
            self._ids("bad_words", encode, text)  # at a text's beginning, or behind another word
            for word in body.bad_words or ()
            for text in (word, " " + word.lstrip())
        )
        biases, grammar = tuple(body.logit_bias.items()), self._grammar(body)
        limits = TokenLimits(biases, allowed, tuple(words), body.min_tokens or 0, grammar)
        return None if limits == TokenLimits() else limits

    def _grammar(self, body: AnyBody) -> Grammar | None:
        """What the text must be, if the body says so."""
        wanted = body.wanted_text()
        if wanted is None:
            return None
        param, kind, value = wanted
        if not self._options.has_grammars:
            raise invalid(param, "is not served by tensor parallel ranks; leave it out", UNSUPPORTED)
        grammars = self._codec.grammars(self._options.vocab_size)
        make: dict[str, Callable[[Any], Grammar]] = {
            "json": grammars.of_schema,
            "regex": grammars.of_regex,
            "choice": grammars.of_choice,
            "grammar": grammars.of_grammar,
        }
        expected = {"json": (dict, str), "choice": (list,)}.get(kind, (str,))
        if not isinstance(value, expected) or (kind == "choice" and not all(isinstance(each, str) for each in value)):
            raise invalid(param, f"{kind}: expected {' or '.join(each.__name__ for each in expected)}")
        try:
            return make[kind](value)
        except ValueError as error:
            raise invalid(param, str(error)) from error

    def _cut(self, body: AnyBody, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """Leave only the last tokens of a prompt, as many as ``truncate_prompt_tokens`` says; -1: beside an answer."""
        most = body.truncate_prompt_tokens
        if most == -1:
            most = max(1, self._options.max_seq_len - max(1, max_tokens))
        return prompt if most is None else prompt[-most:]

    def _probe(self, param: str, *texts: str) -> None:
        """Raises ApiError for texts that are too long together, before they are cut into tokens: [Note: long texts]."""
        room, length = self._options.max_seq_len, sum(map(len, texts))
        if length <= PROBED * room:
            return
        num_least = num_tokens = num_seen = 0
        for part in _parts(texts):
            num_least += self._codec.min_tokens(part) - 1  # a word may be cut in two
            if num_least > room:
                raise too_long(param, f"at least {num_least} tokens", room)
        for part in _parts(texts):
            num_tokens += max(0, len(self._ids(param, self._codec.encode, part)) - SPARED_TOKENS)
            num_seen += len(part)
            if num_tokens > room:
                raise too_long(param, f"{num_tokens} tokens, of the first {num_seen} characters alone", room)

    def _ids(self, param: str, encode: Callable[[T], tuple[int, ...]], text: T) -> tuple[int, ...]:
        try:
            ids = encode(text)
        except ValueError as error:
            raise invalid(param, str(error)) from error
        if not ids:
            raise invalid(param, "must give at least one token, found none")
        return ids

    def _echoes(self, body: CompletionBody, prompts: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
        """What is said again of each choice's prompt: its text, or that of its tokens if it is cut or was sent so."""
        if not body.echo:
            return ("",) * (len(body.prompt) * body.num_each)
        said = [
            sent if isinstance(sent, str) and body.truncate_prompt_tokens is None else self._codec.decode(prompt)
            for sent, prompt in zip(body.prompt, prompts, strict=True)
        ]
        if (length := sum(map(len, said)) * body.num_each) > MAX_ECHOED_CHARACTERS:
            raise invalid("echo", f"at most {MAX_ECHOED_CHARACTERS} characters are said again, found {length}; lower n")
        return tuple(text for text in said for _ in range(body.num_each))

    def _max_tokens(self, param: str, prompt: Sequence[int], asked: int) -> int:
        """Tokens to generate after a prompt: of what was asked for as much as fits."""
        room = self._options.max_seq_len - len(prompt)
        if room < 1:
            raise too_long(param, f"{len(prompt)} tokens, and 1 to generate", self._options.max_seq_len)
        return max(1, min(asked, room))

    def _parse(
        self,
        body: AnyBody,
        format: ResponseFormat,
        asked: EncodedPrompts,
        arrival: float | None,
    ) -> ParsedRequest:
        response_id = f"{format.prefix}-{secrets.token_hex(12)}"
        arrival = time.monotonic() if arrival is None else arrival
        deadline = None if self._options.timeout_s is None else arrival + self._options.timeout_s
        limits = self._limits(body)
        stop_tokens = frozenset() if body.ignore_eos else self._codec.stop_tokens
        wording = Wording(
            body.stop,
            shows_stop=bool(body.include_stop_str_in_output),
            skips_special_tokens=body.skip_special_tokens is not False and self._tool_format(body) not in OPENING,
            is_silent=0 in (body.max_tokens, getattr(body, "max_completion_tokens", None)),
        )
        asked.check(body.num_each)
        choices = []
        for index in range(len(asked.prompts) * body.num_each):
            number, draw = divmod(index, body.num_each)
            request = Request(
                id=f"{response_id}-{index}",
                prompt=asked.prompts[number],
                sampling=body.sampling(draw, self._options.sampling),
                max_tokens=asked.max_tokens[number],
                stop_tokens=stop_tokens.union(body.stop_token_ids or ()),
                num_logprobs=asked.num_logprobs,
                num_prompt_logprobs=asked.num_prompt_logprobs,
                limits=limits,
                images=asked.images,
                priority=-(body.priority or 0) if self._options.priorities else 0,
                deadline=deadline,
                salt=body.cache_salt,
                model=self._options.adapter_of or self._options.model_name,
                adapter=None if self._options.adapter_of is None else self._options.model_name,
            )
            choices.append(Choice(index, request, Transcript(self._codec, request.prompt, wording)))
        return ParsedRequest(
            id=response_id,
            model=self._options.model_name,
            format=format,
            choices=tuple(choices),
            num_prompt_tokens=sum(map(len, asked.prompts)),
            wants_stream=bool(body.stream),
            wants_usage=bool(body.stream_options and body.stream_options.include_usage),
            arrival=arrival,
        )
