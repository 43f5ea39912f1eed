"""Which models may be asked for over HTTP, and who reads what is asked of each.

Owns the choice of a model by a body's field `model`. Knows nothing of engines or event loops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yafsdp_like.inference.http.bodies import ChatBody, CompletionBody
from yafsdp_like.inference.http.body_limits import BodyLimits
from yafsdp_like.inference.http.errors import ApiError, not_begun, shorten
from yafsdp_like.inference.http.protocol import RequestParser, ServerOptions
from yafsdp_like.inference.http.responses import ParsedRequest


class Catalog:
    """One model, or those of a pool, by the names that requests call them; what it reads it reads from any thread."""

    def __init__(
        self, parsers: Sequence[RequestParser], errors: Mapping[str, str] | None = None, is_pool: bool = False
    ) -> None:
        """``errors``: why other models of the pool could not be opened, by name.

        Raises ValueError where two models have one name.
        """
        self.errors, self.is_pool = dict(errors or {}), is_pool
        self.parsers = {parser.options.model_name: parser for parser in parsers}
        self._by_name = {name: parser for parser in parsers for name in parser.names}
        self._claimed: set[str] = set()  # by adapters that are on their way
        if len(self._by_name) != sum(len(parser.names) for parser in parsers) or self.errors.keys() & self._by_name:
            raise ValueError(f"names of models must differ, found {[parser.names for parser in parsers]}")
        limits = [parser.limits for parser in parsers]
        self._limits = BodyLimits(
            *(max(getattr(each, name) for each in limits) for name in ("max_seq_len", "max_choices", "max_characters"))
        )

    @property
    def options(self) -> ServerOptions:
        """The options that all models have in common, and the largest limit of bodies."""
        return max((parser.options for parser in self.parsers.values()), key=lambda each: each.body_limit_nbytes)

    @property
    def takes_images(self) -> bool:
        """Whether any of the models sees images."""
        return any(parser.options.takes_images for parser in self.parsers.values())

    def read(
        self, kind: type[CompletionBody] | type[ChatBody], raw: bytes, arrival: float | None = None
    ) -> ParsedRequest:
        """Parse a body as the parser of its model does. Raises ApiError for what is not served."""
        sent = self.parse(raw)
        return self.parser_of(sent).read_sent(kind, sent, arrival)

    def parse(self, raw: bytes) -> Any:
        """Return what a body says. Raises ApiError for what is no JSON, or too much of it for any model."""
        return self._limits.parse(raw)

    def parser_of(self, sent: Any) -> RequestParser:
        """Return the parser of the model that a body names. Raises ApiError as ``find`` does."""
        name = sent.get("model") if isinstance(sent, dict) else None
        parser = next(
            iter(self.parsers.values())
        )  # of one model, it says 404 itself; without a name, that there is none
        if isinstance(name, str) and (len(self.parsers) > 1 or self.is_pool or name in self._by_name):
            parser = self.find(name)
        return parser

    def claim(self, name: str) -> None:
        """Keep a name for an adapter that is on its way, until ``add_adapter`` or ``give_up``.

        Raises ValueError for a name that something has already, or that is claimed.
        """
        if name in self._by_name or name in self.errors or name in self._claimed:
            raise ValueError(f"the name {shorten(name)} is taken: an adapter needs one of its own")
        self._claimed.add(name)

    def give_up(self, name: str) -> None:
        """Let a claimed name be another's."""
        self._claimed.discard(name)

    def add_adapter(self, name: str, model: str) -> None:
        """Have requests find an adapter of a model; on the event loop, or before there is one.

        Raises ValueError as ``claim`` does, unless the name was claimed.
        """
        if name not in self._claimed:
            self.claim(name)
        parser = self.parsers[model].of_adapter(name)
        self._claimed.discard(name)
        # Others may be reading: they keep the dictionaries that they have.
        self.parsers, self._by_name = {**self.parsers, name: parser}, {**self._by_name, name: parser}

    def remove_adapter(self, name: str) -> None:
        """Have no further request find an adapter."""
        self.parsers, self._by_name = (
            {known: parser for known, parser in found.items() if known != name}
            for found in (self.parsers, self._by_name)
        )

    def find(self, name: str) -> RequestParser:
        """Return the parser of a model. Raises ApiError, 404 for one that is unknown, 503 for one that has failed."""
        if name in self.errors:
            raise not_begun(self.errors[name], code="model_unavailable")
        if name not in self._by_name:
            known = ", ".join(repr(known) for known in (*self.parsers, *self.errors))
            message = f"model: there is no {shorten(name)} here, only {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._by_name[name]
