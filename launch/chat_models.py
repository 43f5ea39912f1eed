"""Who answers in a chat: a model of a server that speaks OpenAI's protocol, or one that is loaded in this process.

Owns how an answer is asked for, read as it comes, and stopped. Knows nothing of terminals.
"""

from __future__ import annotations

import http.client
import json
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from types import FrameType

    from launch.inference import LoadedModel
    from launch.options import ChatOptions, GenerateOptions

Message = dict[str, str]

LIST_S = 30.0  # that a server has to list its models


class ChatModel(Protocol):
    """What a chat needs of who answers."""

    name: str  # of the model that is asked

    def names(self) -> list[str]:
        """Return the models that may be asked. Raises OSError where they cannot be known."""

    def answer(self, messages: Sequence[Message]) -> Generator[str]:
        """Yield pieces of an answer as they come; whoever stops reading ends it.

        Raises ValueError or OSError, with words for a person, and KeyboardInterrupt after Ctrl-C.
        """


class ServedModel:
    """A model of a server. Raises OSError where there is no server, ValueError where it has no such model."""

    def __init__(self, options: ChatOptions) -> None:
        self._url, self._key = options.model.rstrip("/").removesuffix("/v1"), options.api_key
        self._fields = dict(options.sampling.given)
        if options.max_tokens is not None:
            self._fields["max_tokens"] = options.max_tokens
        if options.stop:
            self._fields["stop"] = list(options.stop)
        names = self.names()
        if not names:
            raise ValueError(f"the server at {self._url} has no models")
        if options.name is not None and options.name not in names:
            raise ValueError(f"the server at {self._url} has no model {options.name!r}, only {', '.join(names)}")
        self.name = options.name or names[0]

    def names(self) -> list[str]:
        """Return the models that the server lists."""
        with self._open("/v1/models", timeout_s=LIST_S) as response:
            try:
                return [str(model["id"]) for model in json.load(response)["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise OSError(f"{self._url} lists no models as OpenAI's protocol has them: {error!r}") from error

    def answer(self, messages: Sequence[Message]) -> Generator[str]:
        """Yield pieces of an answer; the connection is closed where it is stopped, which ends it there, too."""
        body = {**self._fields, "model": self.name, "messages": list(messages), "stream": True}
        with self._open("/v1/chat/completions", body) as response:
            try:
                for line in response:
                    if line.startswith(b"data:") and (event := line[5:].strip()) != b"[DONE]":
                        yield _text_of(json.loads(event))
            except (http.client.HTTPException, json.JSONDecodeError) as error:
                raise OSError(f"the answer breaks off: {error!r}") from error

    @contextmanager
    def _open(self, path: str, body: Any = None, timeout_s: float | None = None) -> Iterator[Any]:
        """The answer to a request. Raises OSError with what the server says against it."""
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, sent, {"content-type": "application/json"})
        if self._key is not None:  # which is for this server only
            request.add_unredirected_header("authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                yield response
        except urllib.error.HTTPError as error:
            raise OSError(f"the server says {error.code}: {_words_of(error)}") from None
        except urllib.error.URLError as error:
            raise OSError(f"there is no server at {self._url}: {error.reason}") from None
        except http.client.HTTPException as error:
            raise OSError(f"there is no HTTP server at {self._url}: {error!r}") from None


def _text_of(event: Any) -> str:
    """Return what an event of a stream adds to the text. Raises OSError for the error that it may be."""
    if not isinstance(event, dict):
        raise OSError(f"the server says {event!r}")
    if "error" in event:
        error = event["error"]
        raise OSError(f"the server says: {error.get('message', error) if isinstance(error, dict) else error}")
    try:
        return str(((event.get("choices") or [{}])[0].get("delta") or {}).get("content") or "")
    except (AttributeError, LookupError, TypeError) as error:
        raise OSError(f"the server says {event!r}") from error


def _words_of(error: urllib.error.HTTPError) -> str:
    raw = error.read(2**16)
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return raw.decode("utf-8", "replace")[:300] or str(error.reason)


class LoadedChatModel:
    """A model in this process; its engine keeps the pages of what was said before."""

    def __init__(self, model: LoadedModel, options: GenerateOptions) -> None:
        self._model, self._options = model, options
        self.name = model.model.name

    def names(self) -> list[str]:
        """Return the only one."""
        return [self.name]

    def answer(self, messages: Sequence[Message]) -> Generator[str]:
        """Yield pieces of an answer. Ctrl-C stops it between two steps, since a step must come to its end."""
        from launch.generate import answer

        prompt = self._model.codec.encode_chat(messages)
        pieces = answer(self._model, prompt, self._options)
        with interrupts_noted() as is_interrupted:
            try:
                for piece in pieces:
                    yield piece
                    if is_interrupted():
                        raise KeyboardInterrupt
            finally:
                pieces.close()


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Note SIGINT instead of raising KeyboardInterrupt anywhere; yields whether one has come."""
    noted = threading.Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        noted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)
