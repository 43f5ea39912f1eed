"""Log-probabilities of prompts: those of one forward of the whole prompt, however it was cut and moved."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.inference.engine.test_engine import (
    OPTIONS,
    PENALIZED,
    RECOMPUTING,
    SWAPPING,
    TINY,
    check_idle,
    check_logprobs,
    decoder,
    engine,
    expected,
    ids,
    pages_nbytes,
    prompts,
    record_steps,
    requests,
)
from yafsdp_like.inference.engine import prompt_scores
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request, Token
from yafsdp_like.inference.weights.loading import model_of

if TYPE_CHECKING:
    from yafsdp_like.inference.kv.eviction import Costs


@torch.no_grad()
def check_prompt(request: Request, told: tuple[Token, ...]) -> None:
    if request.num_prompt_logprobs is None:
        assert told == ()
        return
    assert tuple(token.id for token in told) == request.prompt
    assert told[0] == Token(request.prompt[0])
    scores = decoder(TINY)(torch.tensor([request.prompt]))[0].log_softmax(-1)
    for token, row in zip(told[1:], scores, strict=False):
        check_logprobs(token, row, request.num_prompt_logprobs)


def asked() -> list[Request]:
    """Every other one's prompt is scored, with different numbers of the most probable."""
    counts = [0, None, 1, None, 5, None, 20, None, 2]
    plain = requests([*prompts(8), (7,)], PENALIZED, num_logprobs=1)
    return [replace(each, num_prompt_logprobs=count) for each, count in zip(plain, counts, strict=True)]


@pytest.mark.parametrize("costs", [SWAPPING, RECOMPUTING], ids=["swap", "recompute"])
@pytest.mark.parametrize("lookahead", [True, False])
def test_prompts_are_scored_beside_others_through_preemptions(costs: Costs, lookahead: bool) -> None:
    it, alone = engine(kv_nbytes=pages_nbytes(TINY, 16), costs=costs, lookahead=lookahead), engine()
    done = it.generate(asked())
    for request in asked():
        check_prompt(request, done[request.id].prompt)
    assert it.metrics().num_preempted > 0
    assert it.metrics().num_chunks > 0
    assert ids(done) == ids(alone.generate([replace(each, num_prompt_logprobs=None) for each in asked()]))
    check_idle(it)


def test_a_prompt_that_is_cached_is_scored_all_the_same() -> None:
    it, text = engine(), prompts(1, longest=40)[0] + (3,) * 20
    plain = Request("a", text, max_tokens=1)
    it.generate([plain])
    assert it.generate([plain])["a"].num_cached_tokens > 0
    scored = it.generate([replace(plain, num_prompt_logprobs=2)])["a"]
    assert scored.num_cached_tokens == 0
    check_prompt(replace(plain, num_prompt_logprobs=2), scored.prompt)


def test_no_more_rows_of_logits_are_there_than_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    compute = prompt_scores.compute_logprobs

    def counting(to: object, tokens: torch.Tensor) -> None:
        sizes.append(len(tokens))
        compute(to, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(prompt_scores, "compute_logprobs", counting)
    text = prompts(1)[0] + tuple(range(30))
    done = engine().generate([Request("a", text, max_tokens=1, num_prompt_logprobs=0)])["a"]
    assert len(done.prompt) == len(text)
    assert sum(sizes) == len(text) - 1
    assert max(sizes) == OPTIONS.max_batch_size


def test_steps_that_score_are_issued_and_others_are_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    it, texts = engine(kv_nbytes=1 << 20, max_batch_size=6), prompts(6)
    recorder = record_steps(it, monkeypatch)
    scored = [replace(each, num_prompt_logprobs=1) for each in requests(texts)]
    done = it.generate(scored)
    assert ids(done) == {str(index): expected(TINY, text) for index, text in enumerate(texts)}
    for request in scored:
        check_prompt(request, done[request.id].prompt)
    num_replayed = sum(name == "_step" for name, _ in recorder.replayed)
    assert 0 < num_replayed < it.metrics().num_steps


def test_weights_that_are_streamed_score_the_same() -> None:
    it = Engine.load(model_of(decoder(TINY)), OPTIONS, device="cpu", dtype=torch.float32, mode="streamed")
    request = Request("a", prompts(1)[0] + (5, 6, 7), max_tokens=3, num_prompt_logprobs=3)
    check_prompt(request, it.generate([request])["a"].prompt)


def test_more_than_is_computed_of_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="num_prompt_logprobs must be between 0 and 20, found 21"):
        Request("a", (1,), num_prompt_logprobs=21)
