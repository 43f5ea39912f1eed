"""What is answered over HTTP: choices that grow piece by piece, and their JSON as OpenAI's clients read it.

Owns the fields of answers. Knows nothing of what was asked for, of how answers are sent, or of event loops.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from yafsdp_like.inference.engine.request import FinishReason, Request, Token
from yafsdp_like.inference.text.codec import Codec, Piece, PlacedToken, Transcript
from yafsdp_like.inference.text.tool_calls import CallPart, ParsedCall, ToolCallParser, calls_of

MIN_LOGPROB = -9999.0  # JSON has no infinity
FINISH = {None: None, FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass
class Choice:
    """One answer in the making."""

    index: int
    request: Request
    transcript: Transcript
    text: str = ""
    tokens: list[PlacedToken] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # all that were drawn
    prompt: tuple[Token, ...] = ()  # where its log-probabilities are told
    hidden: tuple[float, ...] = ()  # of the prompt's last token, where it is asked for
    tools: ToolCallParser | None = None  # where the model was told of tools
    num_cached_tokens: int = 0

    def add(self, piece: Piece) -> None:
        """Append a piece of text and its tokens."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.ids += piece.ids
        self.prompt = self.prompt or piece.prompt

    def whole_piece(self) -> Piece:
        """Return all pieces as one."""
        return Piece(self.text, tuple(self.tokens), self.transcript.finish, tuple(self.ids), self.prompt)


class ResponseFormat(Protocol):
    """How an answer is written in JSON."""

    prefix: ClassVar[str]  # of ids

    @property
    def codec(self) -> Codec:
        """Names tokens."""

    @property
    def has_ids(self) -> bool:
        """Whether ids of tokens are said, of the prompt and of the answer."""

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether the field ``prompt_logprobs`` is said."""

    def body(self, parsed: ParsedRequest) -> dict[str, Any]:
        """An answer in one piece, all of whose choices have ended."""

    def opening_events(self, parsed: ParsedRequest) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""

    def part_events(self, parsed: ParsedRequest, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece adds; `piece.finish` makes it the choice's last."""

    def says_text_alone(self, choice: Choice) -> bool:
        """Whether `part_events` of pieces in the middle differ by their text and by nothing else."""

    def closing_events(self, parsed: ParsedRequest) -> Iterator[dict[str, Any]]:
        """What a stream ends with."""


class ChoiceFormat(ABC):
    """An answer, and each part of a stream, is an object around choices."""

    whole_object: ClassVar[str]  # what `object` says of an answer in one piece
    part_object: ClassVar[str]  # and of a chunk
    has_logprobs: bool
    has_ids: bool

    @abstractmethod
    def whole(self, choice: Choice) -> dict[str, Any]:
        """Return a choice that has ended."""

    @abstractmethod
    def part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """Return a choice of a chunk: what a piece adds."""

    @abstractmethod
    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Return a choice of a chunk before its first piece, if there is one."""

    def body(self, parsed: ParsedRequest) -> dict[str, Any]:
        """Return an answer in one piece."""
        choices = [self.whole(choice) for choice in parsed.choices]
        return parsed.envelope(self.whole_object, choices, usage=parsed.usage())

    def opening_events(self, parsed: ParsedRequest) -> Iterator[dict[str, Any]]:
        """Yield chunks before the first pieces."""
        for choice in parsed.choices:
            if (opening := self.opening(choice)) is not None:
                yield self._chunk(parsed, opening)

    def part_events(self, parsed: ParsedRequest, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the chunk of a piece."""
        yield self._chunk(parsed, self.part(choice, piece))

    def says_text_alone(self, choice: Choice) -> bool:
        """Return whether chunks say neither ids nor log-probabilities, and no calls are looked for in the text."""
        return not (self.has_logprobs or self.has_ids) and choice.tools is None

    def closing_events(self, parsed: ParsedRequest) -> Iterator[dict[str, Any]]:
        """Yield the chunk that counts tokens, if it is wanted."""
        if parsed.wants_usage:
            yield parsed.envelope(self.part_object, [], usage=parsed.usage())

    def _chunk(self, parsed: ParsedRequest, choice: dict[str, Any]) -> dict[str, Any]:
        more = {"usage": None} if parsed.wants_usage else {}
        return parsed.envelope(self.part_object, [choice], **more)


@dataclass(frozen=True)
class CompletionFormat(ChoiceFormat):
    """`text_completion`."""

    codec: Codec
    echoes: tuple[str, ...]  # of each choice, said before its text; "" for none
    has_logprobs: bool
    has_ids: bool = False
    has_echo: bool = False
    has_prompt_logprobs: bool = False
    prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    part_object: ClassVar[str] = "text_completion"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""
        piece = choice.whole_piece()
        if not self._is_echoed_with(piece):
            piece = replace(piece, text=self.echoes[choice.index] + piece.text)
        return {**self.part(choice, piece), **_prompt_ids(self, choice)}

    def part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """Return a choice of a chunk that holds one piece."""
        logprobs, text = None, piece.text
        if self._is_echoed_with(piece):
            text = self.echoes[choice.index] + text
        if self.has_logprobs and (piece.tokens or piece.finish or self._is_echoed_with(piece)):
            logprobs = self._logprobs(choice, piece)
        part = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": FINISH[piece.finish]}
        return {**part, **_ids(self, piece.ids), **_prompt_logprobs(self, piece.prompt)}

    def _is_echoed_with(self, piece: Piece) -> bool:
        """Whether the prompt is said again with this piece, since its log-probabilities come with it."""
        return self.has_echo and self.has_logprobs and bool(piece.prompt)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Return the chunk of the echoed prompt, if it is asked for."""
        echo = "" if self.has_echo and self.has_logprobs else self.echoes[choice.index]
        return {**self.part(choice, Piece(echo)), **_prompt_ids(self, choice)} if echo or self.has_ids else None

    def _logprobs(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        name, echo = self.codec.name_of, self.echoes[choice.index]
        placed = [PlacedToken(item.token, item.text_offset + len(echo)) for item in piece.tokens]
        if self._is_echoed_with(piece):
            offsets = self.codec.offsets_of([token.id for token in piece.prompt], echo)
            placed = [*map(PlacedToken, piece.prompt, offsets), *placed]
        tops = [None if item.token.logprob is None else self._top(item.token.top) for item in placed]
        return {
            "tokens": [name(item.token.id) for item in placed],
            "token_logprobs": [_finite(item.token.logprob) for item in placed],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": [item.text_offset for item in placed],
        }

    def _top(self, top: Sequence[tuple[int, float]]) -> dict[str, float | None]:
        """By text, as the format has it; of tokens with one text, all but the most probable are called by their ids."""
        found: dict[str, float | None] = {}
        for token, logprob in top:
            text = self.codec.name_of(token)
            found[f"token_id:{token}" if text in found else text] = _finite(logprob)
        return found


@dataclass(frozen=True)
class ChatFormat(ChoiceFormat):
    """`chat.completion` and its chunks."""

    codec: Codec
    has_logprobs: bool
    has_ids: bool = False
    has_prompt_logprobs: bool = False
    prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    part_object: ClassVar[str] = "chat.completion.chunk"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""
        assert choice.transcript.finish is not None
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tools is not None:
            content, parts = choice.tools.push(choice.text, is_last=True)
            message["content"] = content or None
            message |= {"tool_calls": [_call(call) for call in calls_of(parts)]} if parts else {}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": _finish(choice, choice.transcript.finish),
            **_ids(self, choice.ids),
            **_prompt_ids(self, choice),
            **_prompt_logprobs(self, choice.prompt),
        }

    def part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """Return a choice of a chunk that holds one piece."""
        text, parts = piece.text, list[CallPart]()
        if choice.tools is not None:
            text, parts = choice.tools.push(text, piece.finish is not None)
        delta: dict[str, Any] = {"content": text} if text or (piece.finish is None and not parts) else {}
        if parts:
            delta["tool_calls"] = [_call_part(part) for part in parts]
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        finish = _finish(choice, piece.finish)
        part = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**part, **_ids(self, piece.ids), **_prompt_logprobs(self, piece.prompt)}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Return the chunk that names the role."""
        delta = {"role": "assistant", "content": ""}
        opening = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**opening, **_prompt_ids(self, choice)}

    def _logprobs(self, placed: Sequence[PlacedToken]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        content = [
            self._logprob(item.token.id, item.token.logprob)
            | {"top_logprobs": [self._logprob(token, logprob) for token, logprob in item.token.top]}
            for item in placed
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, logprob: float | None) -> dict[str, Any]:
        name, raw = self.codec.name_of(token), self.codec.bytes_of(token)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(raw)}


def _call(call: ParsedCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_part(part: CallPart) -> dict[str, Any]:
    """Return the delta of one call; what it is named is said once."""
    function = {"arguments": part.arguments}
    if part.name is None:
        return {"index": part.index, "function": function}
    return {"index": part.index, "id": part.id, "type": "function", "function": {"name": part.name, **function}}


def _finish(choice: Choice, finish: FinishReason | None) -> str | None:
    has_called = choice.tools is not None and choice.tools.num_calls > 0
    return "tool_calls" if finish is FinishReason.STOP and has_called else FINISH[finish]


def _ids(format: ResponseFormat, ids: Sequence[int]) -> dict[str, Any]:
    return {"token_ids": list(ids)} if format.has_ids else {}


def _prompt_ids(format: ResponseFormat, choice: Choice) -> dict[str, Any]:
    return {"prompt_token_ids": list(choice.request.prompt)} if format.has_ids else {}


def _prompt_logprobs(format: ResponseFormat, prompt: Sequence[Token]) -> dict[str, Any]:
    """Return vLLM's field: of each token of the prompt but the first, what is known of it and of the most probable."""
    if not format.has_prompt_logprobs or not prompt:
        return {}
    told: list[dict[str, Any] | None] = [None]
    for token in prompt[1:]:
        ranked: dict[int, tuple[float, int | None]] = {}
        for rank, (each, logprob) in enumerate(token.top, 1):
            ranked[each] = logprob, rank
        ranked.setdefault(token.id, (token.logprob or 0.0, None))
        told.append(
            {
                str(each): {"logprob": _finite(logprob), "rank": rank, "decoded_token": format.codec.name_of(each)}
                for each, (logprob, rank) in ranked.items()
            }
        )
    return {"prompt_logprobs": told}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MIN_LOGPROB)


@dataclass(frozen=True)
class ParsedRequest:
    """A body that was understood: the requests that answer it, and how the answer is written."""

    id: str
    model: str
    format: ResponseFormat
    choices: tuple[Choice, ...]
    num_prompt_tokens: int  # each prompt once, however many choices continue it
    wants_stream: bool
    wants_usage: bool  # at the end of a stream
    ignored: tuple[str, ...] = ()  # fields of the body that were not understood
    arrival: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def deadline(self) -> float | None:
        """Of all of its requests, in seconds of time.monotonic()."""
        return self.choices[0].request.deadline

    def envelope(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return the JSON object around choices; ``kind`` is its `object`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def usage(self) -> dict[str, Any]:
        """Return the number of tokens of prompts and answers."""
        num_generated = sum(choice.transcript.num_tokens for choice in self.choices)
        num_cached = min(sum(choice.num_cached_tokens for choice in self.choices), self.num_prompt_tokens)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self.num_prompt_tokens + num_generated,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }
