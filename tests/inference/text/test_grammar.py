"""What may follow a text that a grammar binds, and one that is only drafted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.engine.request import GrammarError
from yafsdp_like.inference.text import grammar
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.grammar import LIMITS, TOO_COMPLEX

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("llguidance")


def test_what_is_drafted_in_a_grammar_leaves_its_text_where_it_was(tmp_path: Path) -> None:
    codec = Codec.load(write_tokenizer(tmp_path))
    state = codec.grammars(codec.vocab_size).of_regex("ab[cd]").start()
    a, b, x = (codec.encode(letter)[0] for letter in "abx")
    state.accept([a])
    before = np.array(state.allowed())
    after = np.array(state.allowed_after([b]))
    assert state.allowed_after([x]) is None
    assert (np.array(state.allowed()) == before).all() and (before != after).any()
    state.accept([b])
    assert (np.array(state.allowed()) == after).all()


def test_each_text_has_a_matcher_of_its_own_and_the_first_the_one_that_is_there(tmp_path: Path) -> None:
    """Prevents: threads that wait, with the interpreter, for the lexer that copies of a matcher share."""
    codec = Codec.load(write_tokenizer(tmp_path))
    found = codec.grammars(codec.vocab_size).of_regex("ab[cd]")
    (there,) = found._unused
    states = [found.start() for _ in range(3)]
    assert states[0]._matcher is there and len({id(state._matcher) for state in states}) == 3
    states[0].accept([codec.encode("a")[0]])
    first, second, third = (np.array(state.allowed()) for state in states)
    assert (second == third).all() and (first != second).any()


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        ("start: s\ns: s s s | s s | /./", "max is 100"),
        ("start: X\nX: /(.*[0-9].{10}){1,30}/ & /(.*[a-z].{12}){1,30}/ & ~/(.*foo.*)/", "too many expressions"),
    ],
    ids=["ambiguous", "expressions"],
)
def test_a_grammar_made_to_cost_time_ends_with_an_error_that_says_so(
    hostile: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a third of a second of a thread for each token."""
    monkeypatch.setitem(LIMITS, "max_items_in_row", 100)  # which is reached sooner in a vocabulary of this size
    codec = Codec.load(write_tokenizer(tmp_path))
    state = codec.grammars(codec.vocab_size).of_grammar(hostile).start()
    with pytest.raises(GrammarError, match=f"{TOO_COMPLEX}: .*{words}"):
        for _ in range(100):
            state.allowed()
            state.accept(codec.encode("a", add_special_tokens=False))


def test_tokens_that_are_allowed_at_once_are_those_that_would_be_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strings that may go on for any length up to the longest slice, and in one without an end."""
    codec = Codec.load(write_tokenizer(tmp_path))
    fields = [{"type": "string", "maxLength": length} for length in (1, 5, 12, 25, 40)] + [{"type": "string"}]
    schema = {"type": "array", "prefixItems": fields, "minItems": len(fields), "items": False}
    text = codec.encode('["a","the a","the quick\\n","a, b","\u00e9\u2603 x y z","x', add_special_tokens=False)

    def masks() -> list[np.ndarray]:
        state, found = codec.grammars(codec.vocab_size).of_schema(schema).start(), []
        for token in text:
            found.append(np.array(state.allowed()))
            state.accept([token])
        return found

    sliced = masks()
    codec = Codec.load(tmp_path)
    monkeypatch.setattr(grammar, "SLICES", ())
    assert len(sliced) > 20 and all((ours == theirs).all() for ours, theirs in zip(sliced, masks(), strict=True))


def test_large_schemas_stay_within_the_limits(tmp_path: Path) -> None:
    codec = Codec.load(write_tokenizer(tmp_path))
    kinds = {"kind": {"enum": [f"kind {number}" for number in range(30)]}, "name": {"type": "string"}}
    inner = {"type": "object", "properties": kinds, "required": ["name"]}
    fields = {f"field_{number}": inner for number in range(60)}
    variants = [
        {"type": "object", "properties": {f"f{number}": inner}, "required": [f"f{number}"]} for number in range(60)
    ]
    for schema, text in (
        ({"type": "object", "properties": fields}, '{"field_0":{"kind":"kind 3","name":"x"},"field_59":{"name":"y"}}'),
        ({"type": "array", "items": {"anyOf": variants}}, '[{"f7":{"name":"x"}},{"f59":{"kind":"kind 9","name":"y"}}]'),
    ):
        state = codec.grammars(codec.vocab_size).of_schema(schema).start()
        for token in codec.encode(text, add_special_tokens=False):
            assert state.allowed().any()
            state.accept([token])


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.load(write_tokenizer(tmp_path_factory.mktemp("grammar")))


def follow_numbers(codec: Codec, text: str) -> None:
    """Raise GrammarError unless ``text`` begins JSON of an object with a list of integers."""
    numbers = {"type": "array", "items": {"type": "integer"}}
    schema = {"type": "object", "properties": {"a": numbers}, "required": ["a"]}
    codec.grammars(codec.vocab_size).of_schema(schema).start().accept(codec.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
def test_json_may_be_written_on_one_line_or_with_indents(indent: int | str | None, codec: Codec) -> None:
    text = json.dumps({"a": [1, 23]}, indent=indent)
    for written in (text, text.replace("\n", "\r\n"), text.replace(" ", "")):
        follow_numbers(codec, written)


@pytest.mark.parametrize("begun", ["{", '{"a"', '{"a":', '{"a": [1', '{"a": [1,', '{"a": [1]'])
def test_json_has_one_space_or_one_end_of_a_line_and_an_indent_between_tokens(begun: str, codec: Codec) -> None:
    """Prevents: a weak model that fills all of its tokens with white space."""
    for space in (" ", "\n", "\r\n", "\n" + 20 * " ", "\n" + 10 * "\t"):
        follow_numbers(codec, begun + space)
        for more in (" ", "\n", "\r\n", "\t"):
            if len(space) > 2 or space == " " or "\n" in more:
                with pytest.raises(GrammarError):
                    follow_numbers(codec, begun + space + more)
