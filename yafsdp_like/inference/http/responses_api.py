"""/v1/responses: OpenAI's newer words for a chat that answers with text, whole or as events.

Owns how its bodies become chats, and its answers. Nothing is stored: a conversation is sent whole each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from yafsdp_like.inference.engine.request import FinishReason
from yafsdp_like.inference.http.bodies import ChatBody
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.errors import UNSUPPORTED, ApiError, invalid, no_object, shorten
from yafsdp_like.inference.http.responses import Choice, ParsedRequest
from yafsdp_like.inference.text.codec import Codec, Piece

TEXTS = "input_text", "output_text", "text"
NOT_STORED = "nothing is stored here; send the whole conversation as input"
RENAMED = {"max_output_tokens": "max_completion_tokens"}
OWN_NAMES = {"messages": "input", "response_format": "text.format", **{chat: own for own, chat in RENAMED.items()}}
# What a chat has not: with these values nothing is asked for.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "include": (None, []),
    "max_tool_calls": (None,),
    "n": (None, 1),
    "previous_response_id": (None,),
    "prompt": (None,),
    "tool_choice": (None, "auto", "none"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
}
WORDS = {"previous_response_id": NOT_STORED, "conversation": NOT_STORED, "prompt": NOT_STORED}
MAX_METADATA = 16
TOLD = "instructions", "max_output_tokens", "temperature", "top_p", "user"
# Of a chat's fields those that mean something here: others have another name, or no place in the answer.
_SHARED = {
    *("model", "stream", "stream_options", "temperature", "top_p", "user", "metadata", "store", "service_tier"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    # Beyond OpenAI's.
    *("seed", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stop"),
    *("ignore_eos", "stop_token_ids", "skip_special_tokens", "include_stop_str_in_output", "min_tokens", "bad_words"),
    *("allowed_token_ids", "truncate_prompt_tokens", "cache_salt", "priority", "chat_template_kwargs"),
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
}
CHAT_ONLY = frozenset(ChatBody.model_fields) - _SHARED


def read_response(catalog: Catalog, raw: bytes, arrival: float) -> ParsedRequest:
    """Parse a body as the chat that it stands for. Raises ApiError for what is not served."""
    sent = catalog.parse(raw)
    if not isinstance(sent, dict):
        raise no_object()
    _check_told(sent)
    parser, chat = catalog.parser_of(sent), _as_chat(sent)
    try:
        parsed = parser.read_sent(ChatBody, chat, arrival)
    except ApiError as error:
        raise _in_own_words(error) from error
    told = {name: sent.get(name) for name in TOLD}
    format = ResponsesFormat(parsed.format.codec, {**told, "metadata": sent.get("metadata") or {}})
    return replace(parsed, id=f"resp_{parsed.id.removeprefix('chatcmpl-')}", format=format)


def _check_told(sent: dict[str, Any]) -> None:
    """Raises ApiError for what cannot be said again in the answer; what else it must be a chat's fields say."""
    if not isinstance(user := sent.get("user"), str | None):
        raise invalid("user", f"expected a string, found {shorten(user)}")
    metadata = sent.get("metadata")
    is_dict = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not (is_dict and len(metadata) <= MAX_METADATA):
        raise invalid("metadata", f"expected at most {MAX_METADATA} strings by name, found {shorten(metadata)}")
    for name in ("instructions", "user", "metadata"):
        try:
            json.dumps(sent.get(name), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise invalid(name, "must be Unicode, found half a surrogate pair") from None


def _in_own_words(error: ApiError) -> ApiError:
    """The error of a chat's field, with the name that the field has here."""
    name = OWN_NAMES.get(error.param or "")
    if name is None:
        return error
    words = error.detail.removeprefix(f"{error.param}: ")
    return ApiError(error.status_code, f"{name}: {words}", param=name, code=error.code, headers=error.headers)


def _as_chat(sent: dict[str, Any]) -> dict[str, Any]:
    """The body of the same chat."""
    for name, values in NEUTRAL.items():
        if name in sent and sent[name] not in values:
            raise invalid(name, WORDS.get(name, "is not supported; leave it out"), UNSUPPORTED)
    if "messages" in sent:
        raise invalid("messages", "is called input here")
    for name, value in sent.items():
        if name in CHAT_ONLY and name not in NEUTRAL and value is not None:
            raise invalid(name, "is a field of chats, not of responses; leave it out", UNSUPPORTED)
    chat = {RENAMED.get(name, name): value for name, value in sent.items() if name not in NEUTRAL}
    given, instructions, text = chat.pop("input", None), chat.pop("instructions", None), chat.pop("text", None)
    if not isinstance(given, str | list) or not given:
        raise invalid("input", "expected a string, or a list of messages, not empty")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else [*map(_message, given)]
    if instructions is not None:
        messages = [{"role": "system", "content": instructions}, *messages]
    kind = text.get("format") if isinstance(text, dict) else None
    if kind is not None:
        chat["response_format"] = kind
    return {**chat, "messages": messages}


def _message(item: Any) -> Any:
    """One item of the input as a message of a chat."""
    if not isinstance(item, dict):
        raise invalid("input", f"expected messages, found {shorten(item)}")
    kind = item.get("type", "message")
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": function}]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if kind != "message":
        raise invalid("input", f"only messages and calls of functions are understood, not {shorten(kind)}")
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    return {"role": item.get("role"), "content": content}


def _part(part: Any) -> Any:
    is_text = isinstance(part, dict) and part.get("type") in TEXTS
    return {"type": "text", "text": part.get("text")} if is_text else part


@dataclass(frozen=True)
class ResponsesFormat:
    """`response`, and the events of its stream."""

    codec: Codec
    told: dict[str, Any]  # fields of the body that are said again
    has_ids: bool = False
    has_prompt_logprobs: bool = False
    numbers: list[int] = field(default_factory=lambda: [0])  # of events so far
    prefix: ClassVar[str] = "resp"

    def body(self, parsed: ParsedRequest) -> dict[str, Any]:
        """Return the whole response."""
        (choice,) = parsed.choices
        return self._response(parsed, [self._item(parsed, choice.text, _status(choice))], choice)

    def opening_events(self, parsed: ParsedRequest) -> Iterator[dict[str, Any]]:
        """Yield what comes before any text."""
        response = self._response(parsed, [])
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        item = {**self._item(parsed, "", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._of_part(parsed, "response.content_part.added", part=_text_part(""))

    def says_text_alone(self, choice: Choice) -> bool:
        """Return False: events are numbered."""
        return False

    def part_events(self, parsed: ParsedRequest, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield a piece of text."""
        choice.add(piece)
        if piece.text:
            yield self._of_part(parsed, "response.output_text.delta", delta=piece.text, logprobs=[])

    def closing_events(self, parsed: ParsedRequest) -> Iterator[dict[str, Any]]:
        """Yield all of the text again, and the whole response."""
        (choice,) = parsed.choices
        item = self._item(parsed, choice.text, _status(choice))
        yield self._of_part(parsed, "response.output_text.done", text=choice.text, logprobs=[])
        yield self._of_part(parsed, "response.content_part.done", part=_text_part(choice.text))
        yield self._event("response.output_item.done", output_index=0, item=item)
        response = self._response(parsed, [item], choice)
        yield self._event(f"response.{response['status']}", response=response)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self.numbers[0] += 1
        return {"type": kind, "sequence_number": self.numbers[0] - 1, **more}

    def _of_part(self, parsed: ParsedRequest, kind: str, **more: Any) -> dict[str, Any]:
        place = {"item_id": _item_id(parsed), "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **more)

    def _item(self, parsed: ParsedRequest, text: str, status: str) -> dict[str, Any]:
        message = {"type": "message", "id": _item_id(parsed), "status": status, "role": "assistant"}
        return {**message, "content": [_text_part(text)]}

    def _response(
        self, parsed: ParsedRequest, output: list[dict[str, Any]], ended: Choice | None = None
    ) -> dict[str, Any]:
        status = "in_progress" if ended is None else _status(ended)
        return {
            "id": parsed.id,
            "object": "response",
            "created_at": parsed.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": parsed.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "usage": None if ended is None else _usage(parsed),
            **self.told,
        }


def _status(ended: Choice) -> str:
    return "incomplete" if ended.transcript.finish is FinishReason.LENGTH else "completed"


def _item_id(parsed: ParsedRequest) -> str:
    return f"msg_{parsed.id.removeprefix('resp_')}"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(parsed: ParsedRequest) -> dict[str, Any]:
    found = parsed.usage()
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": found["prompt_tokens_details"],
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found["total_tokens"],
    }
