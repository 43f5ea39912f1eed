"""Calls of tools in answers, as chat templates have models write them.

Owns the formats of the served families. A text comes piece by piece; what may be a call is held back until it is one.

| format | what a model writes | families |
|---|---|---|
| hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several | Qwen, Hermes, SmolLM |
| mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` at the end | Mistral, Mixtral |
| llama | the whole answer is `{"name": ..., "parameters": {...}}`, several with `;` between | Llama 3 |
| json | the whole answer is one call, since a grammar has bound it | all |
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal

ToolFormat = Literal["hermes", "mistral", "llama", "json"]
OPENING = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}
CLOSING = "</tool_call>"
PYTHON_TAG = "<|python_tag|>"


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


class ToolCallParser:
    """One answer's text in, content and calls out."""

    def __init__(self, format: ToolFormat) -> None:
        self._format = format
        self._held = ""
        self._has_content = False  # of a llama, whose answer is a call from its beginning or none
        self.num_calls = 0

    def push(self, text: str, is_last: bool) -> tuple[str, list[ParsedCall]]:
        """Return what of the text so far is content, and the calls that have ended in it, each once."""
        self._held += text
        if self._format == "hermes":
            return self._push_marked(is_last)
        content = "" if self._format == "json" else self._before_call()
        if not is_last:
            return content, []
        held, self._held = self._held, ""
        calls = self._numbered(_calls_in(held.removeprefix(OPENING["mistral"]).replace(PYTHON_TAG, "")))
        return (content, calls) if calls else (content + held, [])

    def _push_marked(self, is_last: bool) -> tuple[str, list[ParsedCall]]:
        content, calls = "", list[ParsedCall]()
        while True:
            before, opening, rest = self._held.partition(OPENING["hermes"])
            if not opening:
                shown = len(before) - (0 if is_last else _num_begun(before, OPENING["hermes"]))
                content, self._held = content + before[:shown], before[shown:]
                break
            content, self._held = content + before, opening + rest
            written, closing, after = rest.partition(CLOSING)
            if not closing and not is_last:
                break
            found = self._numbered(_calls_in(written))
            calls += found
            content += "" if found else opening + written + closing
            self._held = after
        return (content.strip() if self.num_calls else content), calls

    def _before_call(self) -> str:
        """Take what is certainly before a call."""
        if self._format == "llama":
            is_call = self._held.lstrip()[:1] in ("", "{", PYTHON_TAG[0])
            shown = 0 if is_call and not self._has_content else len(self._held)
            self._has_content = self._has_content or shown > 0
        else:
            at = self._held.find(OPENING["mistral"])
            shown = len(self._held) - _num_begun(self._held, OPENING["mistral"]) if at < 0 else at
        content, self._held = self._held[:shown], self._held[shown:]
        return content

    def _numbered(self, found: list[tuple[str, str]]) -> list[ParsedCall]:
        self.num_calls += len(found)
        return [ParsedCall(name, arguments, secrets.token_hex(5)[:9]) for name, arguments in found]


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
