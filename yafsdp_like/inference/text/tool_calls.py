"""Calls of tools in answers, as chat templates have models write them.

Owns the formats of the served families. A text comes piece by piece; what may be a call is held back until it has begun
as one.

| format | what a model writes | families |
|---|---|---|
| hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several | Qwen, Hermes, SmolLM |
| mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` at the end | Mistral, Mixtral |
| llama | the whole answer is `{"name": ..., "parameters": {...}}`, several with `;` between | Llama 3 |
| json | the whole answer is one call, since a grammar has bound it | all |
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

ToolFormat = Literal["hermes", "mistral", "llama", "json"]
OPENING = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}
CLOSING = "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
SEPARATORS = {"hermes": " \t\r\n;,[]", "mistral": " \t\r\n;,[]", "llama": " \t\r\n;", "json": " \t\r\n"}  # of calls
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{', re.DOTALL)
_OUTSIDE, _IN_STRING = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')  # what matters outside of strings, and in one


def tool_format_of(template: str | None) -> ToolFormat | None:
    """Return the format that a chat template teaches; None where it knows of no tools."""
    if not template or "tools" not in template:
        return None
    if OPENING["hermes"] in template:
        return "hermes"
    if OPENING["mistral"] in template:
        return "mistral"
    return "llama" if '"parameters"' in template else None


@dataclass(frozen=True)
class ParsedCall:
    """A call: a tool's name, its arguments as JSON, and a name of its own that templates take."""

    name: str
    arguments: str
    id: str


@dataclass(frozen=True)
class CallPart:
    """What a piece of text says of a call: its name and id in its first part, and the next of its arguments."""

    index: int
    arguments: str
    name: str | None = None
    id: str | None = None


class ToolCallParser:
    """One answer's text in, content and calls out: the same ones, however the text is cut into pieces.

    Arguments are told as they come, as the model writes them, once a call has begun with its name and an object of
    arguments; then an answer that is cut off has arguments that are. Any other call is told when it has ended.
    """

    def __init__(self, format: ToolFormat) -> None:
        self._marker, self._separators = OPENING.get(format), SEPARATORS[format]
        self._tag = {"hermes": CLOSING, "llama": PYTHON_TAG}.get(format, "")  # that may stand between calls
        self._held = ""  # what is not decided yet
        self._opening: str | None = (
            None if self._marker else ""
        )  # before calls, content if none comes; None: in content
        self._object: _CallObject | None = None  # that may be a call
        self._space = ""  # at the end of the content so far, which is none beside a call
        self._is_behind_call = False  # with no content since
        self._has_called = False  # since the last marker
        self.num_calls = 0

    def push(self, text: str, is_last: bool) -> tuple[str, list[CallPart]]:
        """Return what of the text so far is content, and what is new of calls, in order, one part a call."""
        self._held += text
        self._content, self._parts = list[str](), list[CallPart]()
        while self._held and self._read(is_last):
            pass
        if is_last:
            self._end()
        return "".join(self._content), _joined(self._parts)

    def _read(self, is_last: bool) -> bool:
        """Take what can be decided next; False where that needs more text."""
        if self._object is not None:
            return self._read_object(self._object)
        return self._read_content(is_last) if self._opening is None else self._read_between(self._opening, is_last)

    def _read_content(self, is_last: bool) -> bool:
        before, marker, rest = self._held.partition(self._marker) if self._marker else (self._held, "", "")
        if marker:
            self._say(before)
            self._opening, self._held, self._has_called = marker, rest, False
            return True
        shown = len(before) - (_num_begun(before, self._marker) if self._marker and not is_last else 0)
        self._say(before[:shown])
        self._held = before[shown:]
        return False

    def _read_between(self, opening: str, is_last: bool) -> bool:
        """Read what may stand before a call, or behind one: white space, brackets of a list, a tag."""
        rest = self._held.lstrip(self._separators)
        self._opening, self._held = opening + self._held[: len(self._held) - len(rest)], rest
        if rest.startswith("{"):
            self._object = _CallObject()
            return True
        tag = "" if self._tag == CLOSING and not self._has_called else self._tag
        if tag and rest.startswith(tag):
            self._held = rest[len(tag) :]
            self._opening = None if tag == CLOSING else self._opening + tag
            return True
        if not rest or (tag.startswith(rest) and not is_last):
            return False
        self._give_up("")
        return True

    def _read_object(self, it: _CallObject) -> bool:
        at, told = it.read(self._held)
        self._held = self._held[at:]
        if told and not it.is_begun:
            assert it.name is not None
            it.is_begun = True
            self._begin(it.name, told)
        elif told:
            self._parts.append(CallPart(self.num_calls - 1, told))
        if not it.has_ended:
            return False
        self._object = None
        calls = [] if it.is_begun else _calls_in(it.text)
        for name, arguments in calls:
            self._begin(name, arguments)
        if calls or it.is_begun:
            self._opening = ""
        else:
            self._give_up(it.text)
        return True

    def _begin(self, name: str, arguments: str) -> None:
        self._space, self._is_behind_call, self._has_called = "", True, True
        self._parts.append(CallPart(self.num_calls, arguments, name, secrets.token_hex(5)[:9]))
        self.num_calls += 1

    def _give_up(self, text: str) -> None:
        """Have what is no call be content, with the opening before it, and all that follows up to the next marker."""
        opening, self._opening = self._opening or "", None
        self._say(text if self._has_called else opening + text)

    def _end(self) -> None:
        if self._object is not None and not self._object.is_begun:
            self._give_up(self._object.text)
        elif self._object is None and self._opening is not None:
            self._give_up("")
        if not self._is_behind_call:
            self._content.append(self._space)

    def _say(self, text: str) -> None:
        """Add to the content, less white space beside calls."""
        text = text.lstrip() if self._is_behind_call else self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._content.append(shown)
            self._is_behind_call = False


class _CallObject:
    """A JSON object that comes in pieces, and may be a call."""

    def __init__(self) -> None:
        self.text = ""  # up to its arguments, or to its end where these are not told as they come
        self.name: str | None = None  # where they are
        self.is_begun = self.has_ended = False
        self._depth, self._is_in_string, self._is_escaped = 0, False, False
        self._is_known = self._is_in_arguments = False  # whether they are told as they come is known; they are

    def read(self, text: str) -> tuple[int, str]:
        """Read on, to the end of the text or of the object; return where that is, and the arguments in between."""
        at, told = 0, list[str]()
        while at < len(text) and not self.has_ended:
            before = self._depth
            end = self._next_bracket(text, at)
            piece, at = text[at:end], end
            if self.name is None:
                self.text += piece
                if self._depth == 2 and not self._is_known:
                    self._is_known, self.name = True, _name_in(self.text)
                    self._is_in_arguments = self.name is not None
                    told += ["{"] if self._is_in_arguments else []
            elif self._is_in_arguments:
                told.append(piece)
                self._is_in_arguments = self._depth > 1
            self.has_ended = before > 0 and self._depth == 0
        return at, "".join(told)

    def _next_bracket(self, text: str, at: int) -> int:
        """Return where the next bracket ends, or the text, and count brackets that are in no string."""
        while at < len(text):
            if self._is_escaped:
                self._is_escaped, at = False, at + 1
                continue
            found = (_IN_STRING if self._is_in_string else _OUTSIDE).search(text, at)
            if found is None:
                return len(text)
            at = found.end()
            if found[0] == "\\":
                self._is_escaped = True
            elif found[0] == '"':
                self._is_in_string = not self._is_in_string
            else:
                self._depth += 1 if found[0] in "{[" else -1
                return at
        return at


def calls_of(parts: Sequence[CallPart]) -> list[ParsedCall]:
    """Return whole calls of their parts, from the first ones on."""
    return [ParsedCall(part.name or "", part.arguments, part.id or "") for part in _joined(parts)]


def _joined(parts: Sequence[CallPart]) -> list[CallPart]:
    """Join the parts of each call, which come in order."""
    arguments: dict[int, list[str]] = {}
    firsts: dict[int, CallPart] = {}
    for part in parts:
        firsts.setdefault(part.index, part)
        arguments.setdefault(part.index, []).append(part.arguments)
    return [replace(first, arguments="".join(arguments[index])) for index, first in firsts.items()]


def _name_in(text: str) -> str | None:
    """Return the tool's name in a call up to the bracket that begins its arguments; None where these come otherwise."""
    found = _HEAD.fullmatch(text)
    try:
        return None if found is None else json.loads(found[1])
    except ValueError:
        return None


def _calls_in(text: str) -> list[tuple[str, str]]:
    """Names and arguments of the objects in a text, one after the other or in a list; [] if it is anything else."""
    decoder, found, at = json.JSONDecoder(), list[Any](), 0
    while at < len(text):
        if text[at] in " \t\r\n;":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        found += value if isinstance(value, list) else [value]
    calls = []
    for call in found:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        calls.append((call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)))
    return calls


def _num_begun(text: str, marker: str) -> int:
    """How many characters at the end may be a beginning of the marker."""
    return next((count for count in range(len(marker) - 1, 0, -1) if text.endswith(marker[:count])), 0)
