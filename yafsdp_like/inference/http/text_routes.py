"""Routes beside completions and chats: /tokenize, /detokenize, /v1/embeddings and /v1/responses.

Owns their bodies and answers. A text is read as that of a completion or of a chat, with the same limits.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from yafsdp_like.inference.http.bodies import ChatBody, CompletionBody
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.errors import UNSUPPORTED, ApiError, invalid, no_object
from yafsdp_like.inference.http.responses import ParsedRequest
from yafsdp_like.inference.http.responses_api import read_response

T = TypeVar("T")
ENCODINGS = "float", "base64"
ONE_TOKEN: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}  # which nobody is told
# Of a completion's fields those that mean something for embeddings.
_SHARED = {"model", "user", "cache_salt", "priority", "truncate_prompt_tokens", "add_special_tokens"}
COMPLETION_ONLY = frozenset(CompletionBody.model_fields) - _SHARED


class BodyHandler(Protocol):
    """What these routes need of who reads bodies and has them answered; `server.OpenAIHandler` says what each does."""

    catalog: Catalog

    async def read(self, http: HttpRequest, function: Callable[[bytes, float], T]) -> T:
        """Read a body off the event loop."""

    async def collect(self, parsed: ParsedRequest, http: HttpRequest) -> bool:
        """Have all choices answered."""

    async def write(self, parsed: ParsedRequest, make: Callable[[], dict[str, Any]]) -> Response:
        """Make the answer, which may be long."""

    async def respond(self, http: HttpRequest, function: Callable[[bytes, float], ParsedRequest]) -> Response:
        """Answer whole, or as a stream."""


def add_text_routes(app: FastAPI, handler: BodyHandler) -> None:
    """Add these routes, whose bodies are read off the event loop as all others are."""

    async def tokenize(http: HttpRequest) -> Response:
        return await handler.read(http, lambda raw, _: JSONResponse(_tokenize(handler.catalog, raw)))

    async def detokenize(http: HttpRequest) -> Response:
        return await handler.read(http, lambda raw, _: JSONResponse(_detokenize(handler.catalog, raw)))

    async def embeddings(http: HttpRequest) -> Response:
        parsed, encoding = await handler.read(http, lambda raw, arrival: _parse_inputs(handler.catalog, raw, arrival))
        if not await handler.collect(parsed, http):
            return Response(status_code=499)  # nobody reads it
        return await handler.write(parsed, lambda: _embeddings(parsed, encoding))

    async def responses(http: HttpRequest) -> Response:
        return await handler.respond(http, partial(read_response, handler.catalog))

    endpoints = {"/tokenize": tokenize, "/detokenize": detokenize, "/v1/embeddings": embeddings}
    for path, endpoint in {**endpoints, "/v1/responses": responses}.items():
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None)


def _with_model(catalog: Catalog, sent: Any) -> dict[str, Any]:
    """A body that names a model; without a name the only one is meant. Raises ApiError for what is no object."""
    if not isinstance(sent, dict):
        raise no_object()
    if sent.get("model") is None and len(catalog.parsers) == 1:
        return {**sent, "model": next(iter(catalog.parsers))}
    return sent


def _tokenize(catalog: Catalog, raw: bytes) -> dict[str, Any]:
    sent = _with_model(catalog, catalog.parse(raw))
    names_tokens = bool(sent.pop("return_token_strs", False))
    if sent.get("prompt") is not None and sent.get("messages") is not None:
        raise invalid("prompt", "and messages both say what to cut into tokens: send one")
    kind = ChatBody if "messages" in sent else CompletionBody
    parser = catalog.parser_of(sent)
    choices = parser.read_sent(kind, sent).choices
    if len(choices) > 1:
        raise invalid("prompt", f"expected one text to cut into tokens, found {len(choices)}")
    ids = choices[0].request.prompt
    told = {"count": len(ids), "max_model_len": parser.options.max_seq_len, "tokens": list(ids)}
    return {**told, "token_strs": list(map(parser.codec.name_of, ids)) if names_tokens else None}


def _detokenize(catalog: Catalog, raw: bytes) -> dict[str, Any]:
    sent = _with_model(catalog, catalog.parse(raw))
    parser, tokens = catalog.parser_of(sent), sent.get("tokens")
    if not isinstance(tokens, list) or set(map(type, tokens)) - {int}:
        raise invalid("tokens", "expected a list of token ids")
    parser.check_model(sent.get("model"))
    parser.check_ids("tokens", tokens)
    return {"prompt": parser.codec.decode(tokens, skip_special_tokens=False)}


def _parse_inputs(catalog: Catalog, raw: bytes, arrival: float) -> tuple[ParsedRequest, str]:
    """What is to be embedded, and how vectors are to be written."""
    sent = _with_model(catalog, catalog.parse(raw))
    encoding = sent.pop("encoding_format", None) or "float"
    if encoding not in ENCODINGS:
        raise invalid("encoding_format", f"must be one of {', '.join(ENCODINGS)}")
    if sent.pop("dimensions", None) is not None:
        raise invalid("dimensions", "vectors are as long as the model's hidden states; leave it out", UNSUPPORTED)
    for name, value in sent.items():
        if name in COMPLETION_ONLY and value is not None:
            raise invalid(name, "is a field of completions, not of embeddings; leave it out", UNSUPPORTED)
    as_completion = {name: value for name, value in sent.items() if name not in COMPLETION_ONLY}
    if "input" in as_completion:
        as_completion["prompt"] = as_completion.pop("input")
    try:
        parsed = catalog.parser_of(sent).read_sent(CompletionBody, {**as_completion, **ONE_TOKEN}, arrival)
    except ApiError as error:
        if error.param not in ("prompt", "n"):
            raise
        words = error.detail.removeprefix(f"{error.param}: ")
        raise ApiError(error.status_code, f"input: {words}", param="input", code=error.code) from error
    choices = [replace(each, request=replace(each.request, wants_hidden=True)) for each in parsed.choices]
    return replace(parsed, choices=tuple(choices)), encoding


def _embeddings(parsed: ParsedRequest, encoding: str) -> dict[str, Any]:
    """The last token's hidden state, of length 1, as causal models are commonly pooled."""
    vectors = [_unit(choice.hidden) for choice in parsed.choices]
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, encoding)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": parsed.num_prompt_tokens, "total_tokens": parsed.num_prompt_tokens}
    return {"object": "list", "data": data, "model": parsed.model, "usage": usage}


def _unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


def _written(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
