"""Conversations to ids: a chat template is rendered, and only what the template itself says may become a control token.

Owns which tokens are control tokens, and how what users wrote is kept from becoming one. Knows nothing of HTTP.

[Note: whose tokens]
A template writes contents between control tokens, as text, and a tokenizer cannot tell a control token of the
template's from the same characters in a content. So where contents have characters that control tokens begin or end
with, the template is rendered once more with other characters in their place, which no text here has: what is found
as control tokens then is the template's own. Characters are put back one for one, so places are the same in the text
that is to be cut into tokens; what looks like a control token anywhere else is cut as the text that it is, by a copy
of the tokenizer that knows control tokens by other names.

A template may look at contents, and write something else when characters are replaced. Then they are replaced in the
contents' control tokens only, if the template then writes the same control tokens, and else everywhere.

Without such characters in its contents, or where all that is found is the template's own, a conversation is cut as it
always was.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

FIRST_PRIVATE, NUM_PRIVATE = 0xF0000, 0xFFFD  # characters of a plane for private use: hardly any text has them
PROBE = "x"  # a content without anything particular
PARTS = "text", "image"  # types of a content's parts

Message = Mapping[str, Any]  # strings, and what JSON has of them
Places = list[tuple[int, int]]  # from character, to character


# What a template may not be given beside its messages: they would change what is done with its text.
RESERVED = frozenset(
    [
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)


@dataclass(frozen=True)
class Conversation:
    """What a chat template makes a text of. Raises ValueError for what it may not be given."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    more: Mapping[str, Any] = field(default_factory=dict)  # variables that the template may look at
    ends_with_prompt: bool = True  # what begins the model's answer
    is_continued: bool = False  # the last message goes on

    def __post_init__(self) -> None:
        if names := RESERVED & self.more.keys():
            raise ValueError(f"chat_template_kwargs: {min(names)!r} is not for templates")

    @property
    def texts(self) -> Iterator[str]:
        """All that somebody wrote."""
        for message in self.messages:
            yield from _texts([value for name, value in message.items() if name != "role"])
        yield from _texts([*self.tools, self.more])

    def in_parts(self) -> Conversation:
        """Return the same with a list of one part in place of each content that is a string."""
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
            for message in self.messages
        ]
        return replace(self, messages=messages)

    def map(self, change: Callable[[str], str]) -> Conversation:
        """Return the same with other texts; roles stay."""
        messages = [
            {name: value if name == "role" else _map_content(value, change) for name, value in message.items()}
            for message in self.messages
        ]
        more = {name: _map(value, change) for name, value in self.more.items()}
        return replace(self, messages=messages, tools=_map(self.tools, change), more=more)


def _texts(value: Any) -> Iterator[str]:
    """Strings in a value of JSON, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): _map(each, change) for name, each in value.items()}
    return [_map(each, change) for each in value] if isinstance(value, list | tuple) else value


def _map_content(value: Any, change: Callable[[str], str]) -> Any:
    """As ``_map``, but of a content's parts only the texts: their types are for the template to know."""
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") in PARTS for part in value):
        return [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in value]
    return _map(value, change)


def tokenize(model: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    """Ids of a text, as it is unless the model expects something around it. Raises ValueError for what is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be Unicode, found half a surrogate pair at character {error.start}") from None
    with translate_panics(ValueError, "the tokenizer fails on this text"):  # `encode` lets no other thread run
        (encoded,) = model.encode_batch([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoded.ids
    return ids


@contextmanager
def translate_panics(kind: type[Exception], message: str) -> Iterator[None]:
    """Raise an error of this `kind` where `tokenizers` panics: a panic is a BaseException, and would end the thread."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message}: {error}") from error


class ChatTemplate:
    """The chat template of a fast tokenizer of `transformers`; safe to use from several threads."""

    def __init__(self, tokenizer: Any, stop_tokens: frozenset[int]) -> None:
        self._tokenizer, self._stop_tokens = tokenizer, stop_tokens
        self._model = tokenizer.backend_tokenizer

    def encode(self, conversation: Conversation) -> tuple[int, ...]:
        """Ids of a conversation up to where the model answers. Raises ValueError if the template refuses it."""
        if any(self._places(message.get("role", "")) for message in conversation.messages):
            raise ValueError("a role must not have a control token of the model in its name")
        plain = self.render(conversation)
        text, places = self._find_own_tokens(plain, conversation)
        if places == self._places(text):
            ids = tokenize(self._model, text)
            if not self._is_normalized or self._are_at(places, text, ids):
                return tuple(ids)
        return self._encode_owned(text, places)

    def render(self, conversation: Conversation) -> str:
        """What the template makes of a conversation. Raises ValueError if it refuses it, or is none."""
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in conversation.messages],
                tools=list(conversation.tools) or None,
                tokenize=False,
                add_generation_prompt=conversation.ends_with_prompt,
                continue_final_message=conversation.is_continued,
                **conversation.more,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        if not isinstance(text, str):
            raise ValueError(f"the model's chat template makes {type(text).__name__} of these messages, expected text")
        return text

    # --- whose tokens ---

    @cached_property
    def _control(self) -> dict[str, int]:
        """Control tokens by name: special ones, what ends a text, and marks that the template writes by itself."""
        added = {token.content: (number, token.special) for number, token in self._added.items()}
        written = "".join(self._probes())
        return {
            name: number
            for name, (number, special) in added.items()
            if special or number in self._stop_tokens or (_is_mark(name) and name in written)
        }

    @cached_property
    def _added(self) -> dict[int, Any]:
        """Tokens that are found in a text before anything else is, by number."""
        return {number: token for number, token in self._model.get_added_tokens_decoder().items() if token.content}

    def _probes(self) -> Iterator[str]:
        for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
            try:
                yield self.render(Conversation([{"role": role, "content": PROBE} for role in roles]))
            except ValueError:
                continue

    @cached_property
    def _edges(self) -> tuple[str, ...]:
        """Characters that control tokens begin or end with."""
        return tuple(sorted({edge for name in self._control for edge in (name[0], name[-1])}))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(_any_of(sorted(self._control)) if self._control else r"(?!)")

    @cached_property
    def _is_normalized(self) -> bool:
        """Whether other characters may become a control token's before it is looked for."""
        return self._model.normalizer is not None and any(token.normalized for token in self._added.values())

    def _places(self, text: str) -> Places:
        """Where control tokens are in a text."""
        return [found.span() for found in self._pattern.finditer(text)]

    def _find_own_tokens(self, plain: str, conversation: Conversation) -> tuple[str, Places]:
        """The conversation's text, and where in it the template's own control tokens are: [Note: whose tokens]."""
        contents = "".join(conversation.texts)
        if not any(edge in contents for edge in self._edges):
            return plain, self._places(plain)
        there = dict(zip(self._edges, _find_absent(plain + contents), strict=False))
        back = {private: edge for edge, private in there.items()}
        chosen = self.render(conversation.map(lambda content: _replace(content, there)))
        if _replace(chosen, back) != plain:
            partly = self.render(conversation.map(lambda content: self._break_control_tokens(content, there)))
            if self._pattern.findall(partly) == self._pattern.findall(chosen):
                chosen = partly
        return _replace(chosen, back), self._places(chosen)

    def _break_control_tokens(self, content: str, there: Mapping[str, str]) -> str:
        """A content without control tokens, and other characters as they are."""
        while True:  # tokens may overlap
            broken = self._pattern.sub(lambda found: _replace(found[0], there), content)
            if broken == content:
                return content
            content = broken

    # --- tokens ---

    def _are_at(self, places: Places, text: str, ids: Sequence[int]) -> bool:
        """Whether the control tokens among these ids are those at these places."""
        known = frozenset(self._control.values()) - {self._tokenizer.unk_token_id}  # which any odd character becomes
        expected = [self._control[text[start:stop]] for start, stop in places]
        return [number for number in ids if number in known] == [number for number in expected if number in known]

    def _encode_owned(self, text: str, places: Places) -> tuple[int, ...]:
        """Ids of a text in which control tokens are at these places only."""
        try:
            renamed = self._renamed
        except Exception as error:  # of a kind that cannot be written down
            raise ValueError(
                f"a content names a control token, and this tokenizer has no other way: {error}"
            ) from error
        parts, end = [], 0
        for start, stop in places:
            parts += [text[end:start], renamed.names[text[start:stop]]]
            end = stop
        ids = [renamed.numbers.get(number, number) for number in tokenize(renamed.model, "".join([*parts, text[end:]]))]
        if not self._are_at(places, text, ids):
            raise ValueError("a content has the name of a control token, which this tokenizer cannot take as text")
        return tuple(ids)

    @cached_property
    def _renamed(self) -> Renamed:
        return rename_control_tokens(self._model, self._control)


@dataclass(frozen=True)
class Renamed:
    """A tokenizer to which the names of control tokens are text; their new ones are known to this process only."""

    model: Any
    names: Mapping[str, str]  # new by old
    numbers: Mapping[int, int]  # old by new, where they differ


def rename_control_tokens(model: Any, control: Mapping[str, int]) -> Renamed:
    """The same tokenizer with other names for some of its added tokens."""
    secret = secrets.token_hex(16)
    names = {name: f"{secret}n{index}n" for index, name in enumerate(control)}
    content = json.loads(model.to_str())
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    content["post_processor"] = content["truncation"] = content["padding"] = None
    _rename_vocabulary(content["model"], names)
    made = type(model).from_str(json.dumps(content))
    numbers = {made.token_to_id(names[name]): number for name, number in control.items()}
    return Renamed(made, names, {new: old for new, old in numbers.items() if new != old})


def _rename_vocabulary(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """A text is not to become a control token as a word of the vocabulary either, where merges do not make it one."""
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", ())}
    names = {old: new for old, new in names.items() if old not in merged}
    vocab = model["vocab"]
    if isinstance(vocab, list):  # of pieces and their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


def _any_of(names: Sequence[str]) -> str:
    """Return a pattern that matches the longest of these sorted names: a trie, so that many names cost no more."""
    pairs = enumerate(zip(names[0], names[-1], strict=False))
    prefix = names[0][: next((index for index, (first, last) in pairs if first != last), len(names[0]))]
    groups: dict[str, list[str]] = {}
    for name in names:
        if rest := name[len(prefix) :]:
            groups.setdefault(rest[0], []).append(rest)
    if not groups:
        return re.escape(prefix)
    ends = "?" if prefix in names else ""
    return f"{re.escape(prefix)}(?:{'|'.join(_any_of(group) for group in groups.values())}){ends}"


def _is_mark(name: str) -> bool:
    """Whether it looks like <this>, [this], or the like: not a word, and not white space."""
    return not (name[0].isalnum() or name[-1].isalnum()) and any(character.isalnum() for character in name)


def _find_absent(text: str) -> Iterator[str]:
    """Characters that are not in a text."""
    return (
        character for character in map(chr, range(FIRST_PRIVATE, FIRST_PRIVATE + NUM_PRIVATE)) if character not in text
    )


def _replace(text: str, others: Mapping[str, str]) -> str:
    for character, other in others.items():
        text = text.replace(character, other)
    return text
