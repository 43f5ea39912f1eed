"""What a body may cost, before anything is done that costs it.

Owns limits of size and number; what stands where is protocol.py's. Knows nothing of models but how much fits.

[Note: cost]
Others wait while one call of C has the interpreter, on whatever thread: reading a million small values of JSON takes as
long as many steps of an engine. So values are counted in the raw text first, and everything in it is bounded by what
could ever be served: as many prompts as choices, as many ids as tokens fit, as many characters as the longest token has
for each of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from yafsdp_like.inference.http.errors import ApiError, invalid, too_long, too_many_choices

MAX_FIELDS = 100  # of a body, or of a message
MAX_MESSAGES = 2048
MAX_PARTS = 4096  # of all messages
MAX_CONTAINERS = 16384  # lists and objects
MIN_VALUES, MAX_VALUES = 2**16, 2**18  # of the limit on single values; two whole prompts are always fewer


@dataclass(frozen=True)
class BodyLimits:
    """Of bodies to one model."""

    max_seq_len: int
    max_choices: int
    max_characters: int  # that `max_seq_len` tokens can stand for

    @property
    def max_values(self) -> int:
        """Numbers, strings and all else between commas."""
        most = max(MAX_VALUES, MIN_VALUES + 2 * self.max_seq_len)
        return min(most, MIN_VALUES + self.max_choices * self.max_seq_len)

    def parse(self, raw: bytes) -> Any:
        """What the body says. Raises ApiError for what is no JSON, or too much of it: [Note: cost]."""
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ApiError(400, f"the body is no JSON: no UTF-8 at byte {error.start}") from None
        if text and not text.isspace():
            self._check_values(text)
        else:
            return None  # which is no object
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ApiError(400, f"the body is no JSON: {error.msg} at character {error.pos}") from None
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON that is read here: {error}") from None

    def check(self, body: Any) -> None:
        """Raises ApiError for a body whose parts are too many or too long."""
        if not isinstance(body, dict):
            return
        if len(body) > MAX_FIELDS:
            raise ApiError(400, f"the body: at most {MAX_FIELDS} fields, found {len(body)}")
        self._check_prompts(body.get("prompt"), is_cut=body.get("truncate_prompt_tokens") is not None)
        self._check_messages(body.get("messages"))

    def _check_values(self, text: str) -> None:
        if text.count(",") > self.max_values or text.count("[") + text.count("{") > MAX_CONTAINERS:
            text = self._outside_strings(text)
        self._expect("values", text.count(","), self.max_values)
        self._expect("lists and objects", text.count("[") + text.count("{"), MAX_CONTAINERS)

    def _outside_strings(self, text: str) -> str:
        """What is not in quotes; right as far as the text is JSON."""
        text = text.replace("\\\\", "").replace('\\"', "")
        self._expect("strings", text.count('"') // 2, self.max_values)
        return "".join(text.split('"')[::2])

    def _expect(self, what: str, found: int, most: int) -> None:
        if found > most:
            raise ApiError(400, f"the body: at most {most} {what} in all, found {found}", code="body_too_large")

    def _check_prompts(self, prompts: Any, is_cut: bool) -> None:
        """``is_cut``: of too many ids the last ones count."""
        if isinstance(prompts, str):
            self._check_length("prompt", len(prompts))
        if not isinstance(prompts, list) or not prompts:
            return
        if type(prompts[0]) is int:
            self._check_ids(prompts, is_cut)
        elif len(prompts) > self.max_choices:
            raise too_many_choices(len(prompts), self.max_choices)
        else:
            for prompt in prompts:
                if isinstance(prompt, str):
                    self._check_length("prompt", len(prompt))
                elif isinstance(prompt, list):
                    self._check_ids(prompt, is_cut)

    def _check_ids(self, ids: list[Any], is_cut: bool) -> None:
        if len(ids) >= self.max_seq_len and not is_cut:
            raise too_long("prompt", f"{len(ids)} tokens, and 1 to generate", self.max_seq_len)

    def _check_messages(self, messages: Any) -> None:
        if not isinstance(messages, list):
            return
        if len(messages) > MAX_MESSAGES:
            raise invalid("messages", f"at most {MAX_MESSAGES}, found {len(messages)}")
        if len(messages) > self.max_seq_len:  # before they are validated, rendered and cut into tokens
            raise too_long("messages", f"{len(messages)} messages, of a token each at least", self.max_seq_len)
        num_parts = num_characters = 0
        for index, message in enumerate(messages):
            if not isinstance(message, dict):
                continue
            if len(message) > MAX_FIELDS:
                raise invalid(f"messages[{index}]", f"at most {MAX_FIELDS} fields, found {len(message)}")
            content = message.get("content")
            num_parts += len(content) if isinstance(content, list) else 0
            num_characters += sum(map(len, _texts(content)))
        if num_parts > MAX_PARTS:
            raise invalid("messages", f"at most {MAX_PARTS} parts in all, found {num_parts}")
        self._check_length("messages", num_characters)

    def _check_length(self, param: str, num_characters: int) -> None:
        if num_characters > self.max_characters:
            words = f"{num_characters} characters, where tokens can stand for {self.max_characters} at most"
            raise too_long(param, words, self.max_seq_len)


def _texts(content: Any) -> Iterator[str]:
    """Of a message's content: a text, or parts with texts."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                yield text
