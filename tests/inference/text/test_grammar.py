"""What may follow a text that a grammar binds, and one that is only drafted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.text.codec import Codec

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
