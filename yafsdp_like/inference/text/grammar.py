"""What an answer must be: JSON, JSON of a schema, a regular expression, some texts, or a grammar.

Owns the way from what is asked for to `llguidance`, which says which tokens may follow. It is optional (`pip install
'yafsdp_like[structured]'`) and imported when the first request asks for it.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from yafsdp_like.inference.engine.request import GrammarError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MAX_GRAMMAR_LENGTH = 2**16  # characters
# Between two tokens of JSON: nothing, one space, or one end of a line and an indent. A weak model that may go on with
# white space does so, and fills ``max_tokens`` with it.
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r" |\r?\n( {0,20}|\t{0,10})"}
# Of one mask: a fifth of what the package allows, and far above what schemas of 60 objects or 150 properties take. What
# needs more ends with an error after some 10 ms of a thread, and not, as with the package's own limits, after 350 ms.
LIMITS: dict[str, Any] = {
    "step_max_items": 10_000,
    "step_lexer_fuel": 50_000,
    "max_items_in_row": 1_000,
    "verbose_errors": False,
}
# Tokens that stand wholly inside of a JSON string, by their length: where a text may go on for that long, they are all
# allowed without a look at each. The package's own steps are 10, 30 and any length; a string with a `maxLength` comes
# below 10 soon, and each of its masks then takes 2 to 4 times as long.
_INSIDE = r'[^"\\\x00-\x1F\x7F]'
SLICES = (
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_INSIDE}{{1,{length}}}" for length in (2, 4, 6, 8, 10, 14, 20, 30)),
    f"{_INSIDE}+",
)
TOO_COMPLEX = "what the text must be is too complex to be followed"
MISSING = "needs a package that is not here: pip install 'yafsdp_like[structured]' (no llguidance)"


class MatcherState:
    """How far one text is: an `engine.request.GrammarState`."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that were drawn. Raises GrammarError for a text that cannot be followed."""
        for token in tokens:
            if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
                raise self._error(f"token {token} is not in it")

    def allowed(self) -> Any:
        """Return the bits (W,) int32 of tokens that may follow; where the text is whole, of none."""
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return np.zeros(1, dtype=np.int32)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        if self._matcher.is_error():
            raise self._error("it has no such text")
        return bits

    def _error(self, otherwise: str) -> GrammarError:
        words = self._matcher.get_error().splitlines() or [otherwise]
        return GrammarError(f"{TOO_COMPLEX}: {words[0][:300]}")

    def allowed_after(self, tokens: Sequence[int]) -> Any:
        """Return the same for a copy of the text that went on by ``tokens``; None if it may not."""
        copy = MatcherState(self._matcher.deep_copy())
        try:
            copy.accept(tokens)
            return copy.allowed()
        except GrammarError:  # if the text comes there in fact, it says so then
            return None


class TextGrammar:
    """A grammar that was understood.

    Each text has a matcher of its own. Copies of one share its lexer behind a lock, so threads that compute their masks
    would wait for each other, and one that accepts a token would keep the interpreter while it waits.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        """``make`` returns a matcher, or one in an error, from any thread."""
        self._make, self._unused = make, [make()]
        self.error = str(self._unused[0].get_error())  # why it was not understood; empty if it was

    def start(self) -> MatcherState:
        """Begin a text; the first has the matcher that is there, and each other one takes as long to make."""
        try:
            return MatcherState(self._unused.pop())
        except IndexError:
            return MatcherState(self._make())


class Grammars:
    """Grammars over the tokens of one model; from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_tokens: Iterable[int]) -> None:
        """``tokenizer`` is a fast one of `transformers`; ``vocab_size`` is the model's."""
        self._tokenizer, self._vocab_size, self._stop_tokens = tokenizer, vocab_size, sorted(stop_tokens)

    def of_schema(self, schema: Any) -> TextGrammar:
        """JSON of a schema, an object or its text. Raises ValueError for one that is not understood, as all here do."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return self._make(lambda it: it.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS), text)

    def of_regex(self, pattern: str) -> TextGrammar:
        """A text that a regular expression matches from end to end."""
        return self._make(lambda it: it.LLMatcher.grammar_from_regex(pattern), pattern)

    def of_choice(self, texts: Sequence[str]) -> TextGrammar:
        """One of some texts."""
        if not texts:
            raise ValueError("expected at least one text, found none")
        lark = "start: TEXT\nTEXT: " + " | ".join(json.dumps(text) for text in texts)  # one word: cheap for thousands
        return self._make(lambda it: it.LLMatcher.grammar_from_lark(lark), lark)

    def of_grammar(self, text: str) -> TextGrammar:
        """A grammar of Lark or of GBNF."""
        return self._make(lambda it: it.LLMatcher.grammar_from_lark(it.gbnf_to_lark.any_to_lark(text)), text)

    @cached_property
    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(
            self._tokenizer, n_vocab=self._vocab_size, eos_token=self._stop_tokens or None, slices=list(SLICES)
        )

    def _make(self, grammar_of: Callable[[Any], Any], text: str) -> TextGrammar:
        if len(text) > MAX_GRAMMAR_LENGTH:
            raise ValueError(f"at most {MAX_GRAMMAR_LENGTH} characters, found {len(text)}")
        try:
            import llguidance
        except ModuleNotFoundError:
            raise ValueError(MISSING) from None
        try:
            limits = llguidance.LLParserLimits(**LIMITS)
            rules = grammar_of(llguidance)
            grammar = TextGrammar(lambda: llguidance.LLMatcher(self._tokens, rules, log_level=0, limits=limits))
            error = grammar.error
        except Exception as caught:  # a grammar may be wrong in any way
            error = str(caught)
        if error:
            raise ValueError(f"it is not understood: {error[:400]}")
        return grammar
