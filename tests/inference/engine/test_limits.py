"""Tokens that may not be drawn, and biases: what a plain loop draws, beside requests that nothing limits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.inference.engine.test_engine import (
    GREEDY,
    PENALIZED,
    RECOMPUTING,
    SWAPPING,
    TINY,
    VOCAB_SIZE,
    check_idle,
    decoder,
    engine,
    expected,
    ids,
    pages_nbytes,
    prompts,
    record_steps,
    requests,
)
from yafsdp_like.inference.engine import limits as limits_of
from yafsdp_like.inference.engine.batch import ActiveRequest
from yafsdp_like.inference.engine.limits import LimitedSequence, all_bits, bits_of
from yafsdp_like.inference.engine.request import (
    Completion,
    FinishReason,
    GrammarError,
    Request,
    RequestOutput,
    TokenLimits,
)
from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.kernels.sampling_params import MAX_BIASES
from yafsdp_like.kernels.token_bits import forbid, forbid_reference, num_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from yafsdp_like.inference.kv.eviction import Costs

EVERYTHING = TokenLimits(allowed=tuple(range(VOCAB_SIZE)))
NUM_TOKENS = 12


@torch.no_grad()
def drawn(prompt: Sequence[int], change: Callable[[Tensor, list[int]], Tensor]) -> list[int]:
    """Greedy tokens of a plain loop; `change` is given the logits and what was drawn."""
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        logits = decoder(TINY)(torch.tensor([tokens]))[0, -1]
        tokens.append(int(change(logits, tokens[len(prompt) :]).argmax()))
    return tokens[len(prompt) :]


def only(*allowed: int) -> Callable[[Tensor, list[int]], Tensor]:
    return lambda logits, _: torch.full_like(logits, -torch.inf).index_copy(
        0, torch.tensor(allowed), logits[list(allowed)]
    )


class OddAfterEven:
    """A grammar in which even and odd tokens take turns."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def start(self) -> OddAfterEven:
        return OddAfterEven()

    def accept(self, tokens: Sequence[int]) -> None:
        self.seen += tokens

    def allowed_after(self, tokens: Sequence[int]) -> Any:
        after = OddAfterEven()
        after.accept([*self.seen, *tokens])
        return after.allowed()

    def allowed(self) -> Any:
        odd = bool(self.seen) and self.seen[-1] % 2 == 0
        return bits_of(range(int(odd), VOCAB_SIZE, 2), VOCAB_SIZE)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_limited_requests_draw_what_a_plain_loop_draws_beside_others_that_are_not(
    is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = prompts(6, seed=3)
    free = [expected(TINY, text) for text in texts]
    first, second = free[2][0], free[3][1]
    limits = [
        None,
        TokenLimits(allowed=(5, 9, 40, 77)),
        TokenLimits(biases=((first, -100.0), (8, 100.0))),
        TokenLimits(bad_words=((free[3][0], second), (free[3][4],))),
        TokenLimits(grammar=OddAfterEven()),
        None,
    ]

    def no_bad_word(logits: Tensor, said: list[int]) -> Tensor:
        banned = [free[3][4], *([second] if said[-1:] == [free[3][0]] else [])]
        return logits.index_fill(0, torch.tensor(banned), -torch.inf)

    def alternating(logits: Tensor, said: list[int]) -> Tensor:
        return logits.index_fill(0, torch.arange(0 if said and said[-1] % 2 == 0 else 1, VOCAB_SIZE, 2), -torch.inf)

    wanted = [
        free[0],
        drawn(texts[1], only(5, 9, 40, 77)),
        drawn(texts[2], lambda logits, _: logits.index_add(0, torch.tensor([first, 8]), torch.tensor([-100.0, 100.0]))),
        drawn(texts[3], no_bad_word),
        drawn(texts[4], alternating),
        free[5],
    ]
    asked = [replace(request, limits=each) for request, each in zip(requests(texts), limits, strict=True)]
    it = engine(kv_nbytes=1 << 20, max_batch_size=6)
    recorder = record_steps(it, monkeypatch) if is_recorded else None
    assert ids(it.generate(asked)) == {str(index): each for index, each in enumerate(wanted)}
    assert recorder is None or {name for name, _ in recorder.replayed} == {"_step"}
    check_idle(it)


class TooComplex(OddAfterEven):
    """A grammar that can be followed for a few tokens only."""

    def __init__(self, fails_in: str) -> None:
        super().__init__()
        self.fails_in = fails_in

    def start(self) -> TooComplex:
        return TooComplex(self.fails_in)

    def accept(self, tokens: Sequence[int]) -> None:
        super().accept(tokens)
        self._fail("accept")

    def allowed(self) -> Any:
        self._fail("allowed")
        return super().allowed()

    def _fail(self, where: str) -> None:
        if where == self.fails_in and len(self.seen) == 3:
            raise GrammarError("it is too complex")


@pytest.mark.parametrize("fails_in", ["accept", "allowed"])
@pytest.mark.parametrize("lookahead", [True, False])
def test_a_grammar_that_cannot_be_followed_ends_its_own_request_and_no_other(fails_in: str, lookahead: bool) -> None:
    """Prevents: an engine that fails with all of its requests because of what one client wants a text to be."""
    texts = prompts(3, seed=3)
    told: list[RequestOutput] = []
    it = engine(kv_nbytes=1 << 20, max_batch_size=3, lookahead=lookahead)
    limits = [None, TokenLimits(grammar=TooComplex(fails_in)), TokenLimits(grammar=OddAfterEven())]
    for request, each in zip(requests(texts), limits, strict=True):
        it.add(replace(request, limits=each))
    while it.has_work:
        told += it.step()
    found = {name: Completion.of([each for each in told if each.request_id == name]) for name in ("0", "1", "2")}
    assert found["0"].ids == expected(TINY, texts[0])
    assert (found["1"].finish, len(found["1"].ids)) == (FinishReason.GRAMMAR, 3)
    assert [each.error for each in told if each.finish is FinishReason.GRAMMAR] == ["it is too complex"]
    assert (found["2"].finish, len(found["2"].ids)) == (FinishReason.LENGTH, 12)
    check_idle(it)


@pytest.mark.parametrize("costs", [SWAPPING, RECOMPUTING], ids=["swap", "recompute"])
@pytest.mark.parametrize("lookahead", [True, False])
def test_drawing_twice_leaves_no_trace(costs: Costs, lookahead: bool) -> None:
    """Penalties, noise and preemptions: where everything is allowed the tokens are those without limits."""
    texts = prompts(9)
    plain = requests(texts, PENALIZED, num_logprobs=2)
    limited = [replace(each, limits=EVERYTHING) if index % 2 else each for index, each in enumerate(plain)]
    told = [engine(lookahead=lookahead).generate(plain)]
    it = engine(kv_nbytes=pages_nbytes(TINY, 16), costs=costs, lookahead=lookahead)
    told.append(it.generate(limited))
    assert it.metrics().num_preempted > 0
    assert ids(told[0]) == ids(told[1])
    for name, completion in told[0].items():
        assert [token.logprob for token in told[1][name].tokens] == pytest.approx(
            [token.logprob for token in completion.tokens], abs=1e-4
        )
    check_idle(it)


def test_no_stop_token_is_drawn_before_there_are_enough() -> None:
    (text,) = prompts(1)
    free = expected(TINY, text)
    stop = free[0]
    asked = Request("a", text, GREEDY, NUM_TOKENS, frozenset({stop}), limits=TokenLimits(min_tokens=5))
    found = engine().generate([asked])["a"].ids
    assert stop not in found[:5]
    assert len(found) >= 5
    assert engine().generate([replace(asked, limits=TokenLimits())])["a"].ids == [stop]


class Counted(list[int]):
    """Tokens that count how many of them are read."""

    num_read = 0

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("all tokens are read")

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found


def test_what_may_be_drawn_next_takes_the_same_work_however_long_the_text_is() -> None:
    """Prevents: a token of a limited request that takes the longer, the more were drawn before."""
    words = ((5, 6, 7), (7, 8))
    request = Request("a", (5, 6), max_tokens=1000, limits=TokenLimits(bad_words=words, grammar=OddAfterEven()))
    tokens, bits = Counted(request.prompt), np.empty(num_words(VOCAB_SIZE), dtype=np.int32)
    assert request.limits is not None
    limited = LimitedSequence(ActiveRequest(request, 0, None, tokens), request.limits, VOCAB_SIZE)
    for token in range(500):
        assert limited.text is not None
        limited.text.follow(tokens, [()])
        limited.write(tokens, bits)
        tokens.append(token % VOCAB_SIZE)
        assert tokens.num_read <= 3  # the last one, and those that may begin a word
        tokens.num_read = 0


def test_nothing_is_done_for_each_token_of_the_vocabulary_when_a_limited_request_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents: ten milliseconds in which no stream goes on, for each such request."""
    tokens = list[int]()

    def counted(chosen: Iterable[int], vocab_size: int) -> Any:
        chosen = list(chosen)
        tokens.extend(chosen)
        return bits_of(chosen, vocab_size)

    monkeypatch.setattr(limits_of, "bits_of", counted)
    request = Request("a", (1,), stop_tokens=frozenset({3}), limits=TokenLimits(bad_words=((4,), (5, 6))))
    assert request.limits is not None
    bits = np.empty(num_words(1 << 17), dtype=np.int32)
    limited = LimitedSequence(ActiveRequest(request, 0, None, [1]), request.limits, 1 << 17)
    limited.write([1], bits)
    assert sorted(tokens) == [3, 4]
    assert (bits == ~bits_of([4], 1 << 17)).all()
    assert (all_bits(99) == bits_of(range(99), 99)).all()


def test_log_probabilities_are_those_before_limits() -> None:
    (text,) = prompts(1)
    asked = Request("a", text, GREEDY, 1, num_logprobs=1)
    free = engine().generate([asked])["a"].tokens[0]
    other = engine().generate([replace(asked, limits=TokenLimits(biases=((free.id, -100.0),)))])["a"].tokens[0]
    assert other.id != free.id
    assert other.top == free.top == ((free.id, free.logprob),)
    assert free.logprob is not None and other.logprob is not None and other.logprob < free.logprob


def test_where_nothing_may_be_drawn_the_text_ends() -> None:
    (text,) = prompts(1)
    limits = TokenLimits(allowed=(3,), bad_words=((3,),))
    done = engine().generate([Request("a", text, GREEDY, 8, frozenset({7}), limits=limits)])["a"]
    assert done.ids == [7]


@pytest.mark.parametrize(
    "limits", [TokenLimits((), (3,), ((3,),)), TokenLimits((), None, tuple((t,) for t in range(VOCAB_SIZE)))]
)
def test_where_nothing_may_be_drawn_and_nothing_stops_a_request_is_refused(limits: TokenLimits) -> None:
    """Prevents: token 0 drawn, which is forbidden, too."""
    it = engine()
    with pytest.raises(ValueError, match="request 'a': all tokens that are allowed are bad words, and none stops"):
        it.add(Request("a", (1,), stop_tokens=frozenset({VOCAB_SIZE}), limits=limits))
    check_idle(it)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"allowed": ()}, "at least one token"),
        ({"bad_words": ((),)}, "at least one token"),
        ({"biases": ((1, 1.0), (1, 2.0))}, "each once"),
        ({"biases": tuple((token, 1.0) for token in range(MAX_BIASES + 1))}, "at most"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenLimits(**limits)


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    for limits in (TokenLimits(allowed=(VOCAB_SIZE,)), TokenLimits(biases=((-1, 1.0),))):
        with pytest.raises(ValueError, match="outside of the vocabulary"):
            engine().add(Request("a", (1,), limits=limits))


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 97, 4099])
def test_scores_of_tokens_without_their_bit_become_minus_infinity(vocab_size: int) -> None:
    draw = np.random.default_rng(vocab_size)
    chosen = [sorted(draw.choice(vocab_size, size=max(1, vocab_size // 3), replace=False)) for _ in range(3)]
    bits = torch.tensor(np.stack([bits_of(row, vocab_size) for row in chosen]))
    assert bits.shape == (3, num_words(vocab_size))
    scores = torch.randn(3, vocab_size)
    expected_scores = torch.full_like(scores, -torch.inf)
    for row, tokens in enumerate(chosen):
        expected_scores[row, tokens] = scores[row, tokens]
    for function in (forbid_reference, forbid):
        found = scores.clone()
        function(found, bits)
        assert found.equal(expected_scores)
    with pytest.raises(ValueError, match="expected scores"):
        forbid(scores, bits[:2])


@pytest.mark.skipif(INTERPRETED, reason="this process interprets kernels anyway")
def test_the_kernel_does_what_its_reference_does() -> None:
    from tests.kernels.test_kernels import run_python

    run_python(
        "-c",
        "import torch\n"
        "from yafsdp_like.kernels.token_bits import forbid, forbid_reference, num_words\n"
        "scores, bits = torch.randn(3, 5000), torch.randint(-2**31, 2**31, (3, num_words(5000)), dtype=torch.int32)\n"
        "other = scores.clone()\n"
        "forbid(scores, bits)\n"
        "forbid_reference(other, bits)\n"
        "assert scores.equal(other) and scores.isinf().any()\n",
        TRITON_INTERPRET="1",
    )
