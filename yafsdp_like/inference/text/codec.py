"""Text in and out of a served model: ids of prompts and chats, and text that grows token by token.

Owns the tokenizer and the way from tokens to pieces of text: bytes that are no whole character yet and beginnings of
stop strings are held back. Conversations are chat.py's. Knows nothing of engines, threads or HTTP. Needs
`transformers`, which is imported when a tokenizer is loaded.

[Note: held back]
A piece, once out, is never taken back. So a token's bytes wait until they are whole characters, and characters wait
while they may be the beginning of a stop string; a token's log-probability goes out with the first character that
starts at or after the token's own place in the text.
"""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from yafsdp_like.inference.engine.request import FinishReason, RequestOutput, Token
from yafsdp_like.inference.text import directory as hf_directory
from yafsdp_like.inference.text.chat import ChatTemplate, Conversation, Message, tokenize
from yafsdp_like.inference.text.grammar import Grammars
from yafsdp_like.inference.text.tool_calls import ToolFormat, tool_format_of

Decode = Callable[[Sequence[int]], str]

_SEEN = "zqxjv"  # hardly a part of any template
UNKNOWN = "\ufffd"  # what decoders write for bytes that are no character
NUM_CONTEXT_TOKENS = 4  # of the prompt: some decoders drop a space before the first token that they see
MAX_PENDING_TOKENS = 16  # a character has 4 bytes at most: what is still none then will never be one
WORD = re.compile(r" [A-Za-z]")
TWO_WORDS = re.compile(r".[ \u0120\u2581][A-Za-z]", re.DOTALL)  # in a vocabulary, however spelled
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how vocabularies of characters spell single bytes


class Codec:
    """A tokenizer, its chat template, and the tokens that end a text; safe to use from several threads."""

    def __init__(self, tokenizer: Any, stop_tokens: Iterable[int] = ()) -> None:
        """`tokenizer` is a fast one of `transformers`; `stop_tokens` are added to its own eos token."""
        self._tokenizer = tokenizer
        self._model = tokenizer.backend_tokenizer
        self._model.no_truncation()  # which its file may ask for, of training
        self._model.no_padding()
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_tokens = frozenset((*eos, *stop_tokens))
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps

    @classmethod
    def load(cls, directory: str | Path, model_directory: Path | None = None) -> Codec:
        """Load the tokenizer of a Hugging Face directory, and the stop tokens that it and the model's directory name.

        Raises ValueError where there is none that can be read, or only by running code that comes with it; ImportError
        without `transformers`.
        """
        directory = Path(directory).expanduser()
        places = [directory] if model_directory is None else [directory, model_directory]
        ends = (token for place in places for token in hf_directory.stop_tokens(place))
        return cls(hf_directory.load_tokenizer(directory), ends)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Ids of a text that begins, with what the model expects at the beginning; control tokens by their names.

        Raises ValueError for text with half a surrogate pair, which is no Unicode.
        """
        return tuple(tokenize(self._model, text, add_special_tokens))

    def encode_chat(self, messages: Sequence[Message] | Conversation) -> tuple[int, ...]:
        """Ids of a conversation up to where the model answers; `messages` have `role` and `content`.

        A content is a string, or a list of parts. Control tokens are the template's own: their names in a content are
        text.
        Raises ValueError if there is no chat template, or it refuses the messages.
        """
        if not self.has_chat_template:
            raise ValueError("the model has no chat template: continue a text instead (/v1/completions, or no --chat)")
        conversation = messages if isinstance(messages, Conversation) else Conversation(messages)
        return self._chat_template.encode(conversation.in_parts() if self._wants_parts else conversation)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self.stop_tokens)

    @property
    def has_chat_template(self) -> bool:
        """Return whether the tokenizer has a chat template."""
        return bool(self._tokenizer.chat_template)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the chat template writes contents that are lists of parts, and leaves out those that are strings."""
        said = Conversation([{"role": "user", "content": _SEEN}])
        return not self._writes(said) and self._writes(said.in_parts())

    def _writes(self, conversation: Conversation) -> bool:
        try:
            return _SEEN in self._chat_template.render(conversation)
        except ValueError:
            return False

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the chat template has calls of tools written, if it knows of any."""
        template = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use", template.get("default"))
        return tool_format_of(template)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the tokens; special ones unless asked for, and ids that stand for nothing, are left out."""
        return self._model.decode(tokens, skip_special_tokens=skip_special_tokens)

    def bytes_of(self, token: int) -> bytes:
        """What one token stands for, also where that is no whole character; b"" if for nothing."""
        piece = self._model.id_to_token(token)
        if piece is None:
            return b""
        if token in self._added:
            return str(piece).encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[character] for character in piece if character in _BYTE_OF)
        if single := BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(single[1])
        return self._model.decode([token], skip_special_tokens=False).encode()

    def name_of(self, token: int) -> str:
        r"""Return a token's name in lists of log-probabilities: its text, or "bytes:\xe2\x82" where that is none."""
        if token not in self._names:
            raw = self.bytes_of(token)
            try:
                self._names[token] = raw.decode()
            except UnicodeDecodeError:
                self._names[token] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return self._names[token]

    @cached_property
    def _names(self) -> dict[int, str]:
        """Those that were asked for: lists of log-probabilities name many tokens, again and again."""
        return {}

    def offsets_of(self, tokens: Sequence[int], text: str) -> list[int]:
        """Return where each token's characters begin in ``text``, which these tokens stand for.

        Special tokens that are not in the text have none.
        """
        offsets, decoder, end = list[int](), codecs.getincrementaldecoder("utf-8")("replace"), 0
        for token in tokens:
            offsets.append(end)
            piece = decoder.decode(self.bytes_of(token))
            if token not in self._added or text.startswith(piece, end):
                end += len(piece)
        return offsets

    def grammars(self, vocab_size: int) -> Grammars:
        """Return grammars over the tokens of a model with this vocabulary."""
        return self._grammars.setdefault(vocab_size, Grammars(self._tokenizer, vocab_size, self.stop_tokens))

    @cached_property
    def _grammars(self) -> dict[int, Grammars]:
        return {}

    def max_characters(self, num_tokens: int) -> int:
        """Return the length of the longest text of so many tokens, in characters.

        A normalizer may make one character of as many as four. Characters that a tokenizer leaves out, or merges into
        one unknown token, are not counted.
        """
        longest = max(map(len, self._tokenizer.get_vocab()))
        return num_tokens * longest * (1 if self._model.normalizer is None else 4)

    def min_tokens(self, text: str) -> int:
        """Return how many tokens a text has at least: one for each word behind a space, if no token spans two.

        0 for a tokenizer of which that is not known. Takes a few nanoseconds a character.
        """
        return len(WORD.findall(text)) if self._parts_words else 0

    @cached_property
    def _parts_words(self) -> bool:
        """Whether a space with a letter behind it is always a token's beginning, or its end."""
        return self._model.normalizer is None and not any(map(TWO_WORDS.search, self._tokenizer.get_vocab()))

    @cached_property
    def _added(self) -> frozenset[int]:
        """Tokens that stand for their names, letter by letter."""
        return frozenset(self._model.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether pieces spell bytes in the alphabet of byte-level BPE."""
        decoder = self._model.decoder
        return decoder is not None and b"ByteLevel" in decoder.__getstate__()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: bytes that are visible in Latin-1 stand for themselves, others are 256 and up."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


class Detokenizer:
    """Tokens to text, one at a time; whole characters only."""

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        """`prompt`: what the tokens follow, of which the end decides about a space at their beginning."""
        self._decode = decode
        self._pending: list[int] = []  # not in any text yet
        self._guesses: list[str] = []  # what each of them, with those before it, would say if nothing followed
        self._set_context(self._end_of(prompt))

    def push(self, token: int) -> list[str]:
        """What each token says of those that have said nothing before: none while bytes may go on in the next."""
        text = self._decode([*self._context, *self._pending, token])[len(self._context_text) :]
        if not self._pending and text and not text.isspace() and not text.endswith(UNKNOWN):  # what most tokens are
            self._set_context([token])
            return [text]
        self._pending.append(token)
        self._guesses.append(text)
        if self._guesses[-1].endswith(UNKNOWN) and len(self._pending) < MAX_PENDING_TOKENS:
            return []
        return self.flush()

    def flush(self) -> list[str]:
        """The same at the end, when no other token will complete what is left."""
        if not self._pending:
            return []
        text, starts = self._guesses[-1], [0]
        for guess in self._guesses[:-1]:  # a token begins where what came before it turned out to be right
            starts.append(max(starts[-1], _num_shared(guess, text)))
        if not text:
            self._keep_silent(self._pending)
        elif text.isspace() and len(self._context) < MAX_PENDING_TOKENS:  # of which a decoder may drop some
            self._set_context(self._context + self._pending)
        else:
            self._set_context(self._pending)
        self._pending, self._guesses = [], []
        return [text[start:end] for start, end in pairwise((*starts, len(text)))]

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """As much of it as has a text, of whole characters if it can be: special tokens decide nothing."""
        size = NUM_CONTEXT_TOKENS
        while size < len(prompt) and self._decode(prompt[-size:])[:1] in ("", UNKNOWN):
            size *= 4
        return list(prompt[-size:])

    def _set_context(self, tokens: list[int]) -> None:
        """What has been said last: decoders look at a token's neighbours, but at no more than these."""
        self._context = tokens
        self._num_speaking = len(tokens)
        self._context_text = self._decode(tokens) if tokens else ""

    def _keep_silent(self, tokens: list[int]) -> None:
        """Keep tokens that decode to no text yet, such as a first or last space, as context of the next token.

        Tokens that never decode to text, such as special ones, are dropped.
        """
        speaking = [token for token in tokens if self._decode([token] * MAX_PENDING_TOKENS)]
        silent = [*self._context[self._num_speaking :], *speaking]
        self._context = self._context[: self._num_speaking] + silent[-MAX_PENDING_TOKENS:]
        self._context_text = self._decode(self._context) if self._context else ""


def _num_shared(one: str, other: str) -> int:
    """Characters at the beginning that are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


class StopStrings:
    """Finds the first of some strings in a text that grows, and lets out only what is certainly before it."""

    def __init__(self, strings: Sequence[str] = (), is_shown: bool = False) -> None:
        """``is_shown``: let out the string that stops, too.

        Raises ValueError for an empty string, which would stop everything.
        """
        if "" in strings:
            raise ValueError("a stop string must have at least one character")
        self._strings, self._is_shown = tuple(strings), is_shown
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(what may be shown, whether a stop string has been met); after that, nothing more is to be pushed."""
        text = self._held + text
        # The one that ends first, so that it does not matter in which portions the text comes.
        ends = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)[0 if self._is_shown else 1]], True
        num_held = max((_num_begun(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, string: str) -> int:
    """How many characters at the end of `text` are a beginning of `string`, at most all but its last."""
    for count in range(min(len(text), len(string) - 1), 0, -1):
        if string.startswith(text[-count:]):
            return count
    return 0


@dataclass(frozen=True)
class PlacedToken:
    """A token and where its text starts, in characters from the beginning of the answer."""

    token: Token
    text_offset: int


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; the parts in order are all of it."""

    text: str
    tokens: tuple[PlacedToken, ...] = ()  # those whose text begins in a part up to this one, each once
    finish: FinishReason | None = None
    ids: tuple[int, ...] = ()  # all that were drawn since the part before, whatever text they have
    prompt: tuple[Token, ...] = ()  # with the first part, where its log-probabilities are told


@dataclass(frozen=True)
class Wording:
    """How tokens become an answer's text."""

    stop_strings: Sequence[str] = ()
    shows_stop: bool = False  # what ends the text is part of it: a stop string, or a stop token's text
    skips_special_tokens: bool = True
    is_silent: bool = False  # what is drawn is not said: only the prompt was asked about


PLAIN_WORDING = Wording()


class Transcript:
    """One request's outputs in, pieces of its answer out."""

    def __init__(self, codec: Codec, prompt: Sequence[int], wording: Wording = PLAIN_WORDING) -> None:
        decode = partial(codec.decode, skip_special_tokens=wording.skips_special_tokens)
        self._detokenizer = Detokenizer(decode, prompt)
        self._stop_strings = StopStrings(wording.stop_strings, wording.shows_stop)
        self._wording = wording
        self._unsaid: deque[Token] = deque()  # [Note: held back] for bytes
        self._waiting: deque[PlacedToken] = deque()  # for a stop string
        self._num_characters = 0  # detokenized
        self._num_shown = 0
        self.num_tokens = 0  # generated, the one that stopped it included
        self.finish: FinishReason | None = None
        self.is_plain = not (wording.stop_strings or wording.is_silent)  # all that is drawn is said

    def push(self, output: RequestOutput) -> Piece:
        """What an output adds. Once `finish` is set, by a stop string even before the engine has ended it, nothing."""
        if self._wording.is_silent:
            self.finish = FinishReason.LENGTH if output.finish is FinishReason.STOP else output.finish
            return Piece("", (), self.finish, prompt=output.prompt)
        shown, ids = "", list[int]()
        for index, token in enumerate(output.tokens):
            if self.finish is not None:
                break
            ids.append(token.id)
            is_stop = output.finish is FinishReason.STOP and index + 1 == len(output.tokens)
            if self._wording.shows_stop or not is_stop:  # which is no text
                shown += self._add(token)
        self.num_tokens += len(ids)
        if self.finish is None and output.finish is not None:
            shown += self._end(output.finish)
        self._num_shown += len(shown)
        return Piece(shown, self._take_tokens(), self.finish, tuple(ids), output.prompt)

    def push_text(self, tokens: Sequence[Token]) -> str:
        """What tokens in the middle of an answer add to its text, where it ``is_plain`` and nothing else is asked for.

        ``push`` may follow, but its pieces do not have these tokens.
        """
        text = ""
        for token in tokens:
            self._unsaid.append(token)
            for portion in self._detokenizer.push(token.id):
                self._unsaid.popleft()
                text += portion
        self.num_tokens += len(tokens)
        self._num_characters += len(text)
        self._num_shown += len(text)
        return text

    def _add(self, token: Token) -> str:
        self._unsaid.append(token)
        return self._say(self._detokenizer.push(token.id))

    def _say(self, portions: Sequence[str]) -> str:
        """What may be shown, now that the first tokens that were unsaid say this."""
        shown = ""
        for portion in portions:
            self._waiting.append(PlacedToken(self._unsaid.popleft(), self._num_characters))
            self._num_characters += len(portion)
            text, stopped = self._stop_strings.push(portion)
            shown += text
            if stopped:
                self.finish = FinishReason.STOP
                break
        return shown

    def _end(self, finish: FinishReason) -> str:
        shown = self._say(self._detokenizer.flush())
        if self.finish is None:  # the last bytes may have completed a stop string
            self.finish = finish
            shown += self._stop_strings.flush()
        return shown

    def _take_tokens(self) -> tuple[PlacedToken, ...]:
        is_whole = self.finish is not None and self._num_shown == self._num_characters
        taken = []
        while self._waiting and (is_whole or self._waiting[0].text_offset < self._num_shown):
            taken.append(self._waiting.popleft())
        return tuple(taken)
