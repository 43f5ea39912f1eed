"""Speculative decoding: the same tokens as without it, in fewer steps, whatever is drafted."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.inference.engine.test_adapters import write_adapter
from tests.inference.engine.test_engine import (
    ARCHITECTURES,
    GREEDY,
    OPTIONS,
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
    requests,
)
from tests.inference.engine.test_limits import OddAfterEven
from tests.models.published import publish
from yafsdp_like.inference.engine.batch import ActiveRequest
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.prompt_lookup import PromptLookup, look_up
from yafsdp_like.inference.engine.request import Request, TokenLimits
from yafsdp_like.inference.engine.speculator import Prospect, Speculator
from yafsdp_like.inference.engine.step_times import StepTimes
from yafsdp_like.inference.options import MAX_DRAFTED_ROWS, EngineOptions, Speculation
from yafsdp_like.inference.plan.draft_plan import plan_with_draft
from yafsdp_like.inference.plan.serving_plan import Site, least_nbytes
from yafsdp_like.inference.weights.loading import model_of
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models.moe import ExpertsConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from yafsdp_like.inference.kv.eviction import Costs
    from yafsdp_like.inference.options import AnyMode

FREE = {1: 1.0, MAX_DRAFTED_ROWS: 1.0}  # seconds of steps by rows, of a device to which rows cost nothing
NUM_TOKENS = 12
SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.95, seed=5)


class Oracle:
    """Drafts what the answers say, every third token but one of which is another."""

    def __init__(self, answers: Mapping[str, Sequence[int]], every: int = 3) -> None:
        self._every = every
        self._texts = {
            name: [(token + (index % every == every - 1)) % VOCAB_SIZE for index, token in enumerate(answer)]
            for name, answer in answers.items()
        }

    def _behind(self, sequence: ActiveRequest) -> list[int]:
        return self._texts[sequence.request.id][len(sequence.tokens) - len(sequence.request.prompt) :]

    def prospect_of(self, sequence: ActiveRequest, most: int) -> Prospect | None:
        count = min(most, len(self._behind(sequence)))
        return Prospect(count, 0, 0.5) if count else None

    def draft(self, wanted: Mapping[ActiveRequest, int]) -> dict[ActiveRequest, tuple[int, ...]]:
        return {sequence: tuple(self._behind(sequence)[:count]) for sequence, count in wanted.items()}


def always(it: Engine, drafter: Any = None) -> Engine:
    """Draft as if rows cost nothing, so that no clock decides."""
    assert it._speculator is not None
    it._speculator._times, it._speculator._learns = StepTimes(FREE), False
    it._speculator._drafter = drafter or it._speculator._drafter
    return it


def speculating(answers: Mapping[str, Sequence[int]] | None = None, config: Any = TINY, **more: Any) -> Engine:
    options = {"speculate": "prompt-lookup:3", "kv_nbytes": 1 << 20, **more}
    return always(engine(config, **options), None if answers is None else Oracle(answers))


def check_drafted(it: Engine, *, rejects: bool = True) -> None:
    """Some tokens were accepted and some, where they should be, rejected; and nothing is left."""
    metrics = it.metrics()
    assert 0 < metrics.num_tokens_accepted <= metrics.num_tokens_drafted
    assert (metrics.num_tokens_accepted < metrics.num_tokens_drafted) == rejects
    check_idle(it)


# --- the same tokens ---


@pytest.mark.parametrize("name", ["grouped queries", "windows in one layer of three"])
@pytest.mark.parametrize("lookahead", [True, False], ids=["ahead", "in step"])
def test_greedy_tokens_are_those_of_a_plain_loop_in_fewer_steps(name: str, lookahead: bool) -> None:
    config, texts = ARCHITECTURES[name], prompts(6)
    answers = {str(i): expected(config, text) for i, text in enumerate(texts)}
    it, plain = speculating(answers, config, lookahead=lookahead), engine(config, kv_nbytes=1 << 20)
    assert ids(it.generate(requests(texts))) == answers == ids(plain.generate(requests(texts)))
    assert it.metrics().num_steps < plain.metrics().num_steps
    assert it.metrics().num_tokens_drawn == plain.metrics().num_tokens_drawn
    check_drafted(it)


def test_a_text_that_repeats_itself_is_drafted_from_its_own_tokens() -> None:
    text = (5, 6, 7, 8) * 5
    answer = expected(TINY, text, 24)
    it = speculating()
    assert it.generate(requests([text], max_tokens=24))["0"].ids == answer
    assert it.metrics().num_tokens_drafted > 0
    check_idle(it)


@pytest.mark.parametrize("costs", [SWAPPING, RECOMPUTING], ids=["swap", "recompute"])
def test_tokens_are_the_same_after_preemptions(costs: Costs) -> None:
    texts = prompts(8, 30)
    answers = {str(i): expected(TINY, text, 20) for i, text in enumerate(texts)}
    it = speculating(answers, kv_nbytes=pages_nbytes(TINY, 26), costs=costs, debug=True)
    assert ids(it.generate(requests(texts, max_tokens=20))) == answers
    assert it.metrics().num_preempted > 0
    check_drafted(it)


def test_pages_of_equal_prefixes_are_shared_after_drafts() -> None:
    text = prompts(1, 30)[0] * 2
    answer = expected(TINY, text[:30], 16)
    it = speculating({str(i): answer for i in range(3)})
    for number in range(3):
        done = it.generate([Request(str(number), text[:30], GREEDY, max_tokens=16)])
        assert done[str(number)].ids == answer
    longer = Request("0", (*text[:30], *answer[:12]), GREEDY, max_tokens=4)
    assert it.generate([longer])["0"].ids == answer[12:]
    assert it.metrics().num_tokens_cached >= 2 * 28 + 40, "what drafts wrote is found by its content"
    check_drafted(it)


def test_sampled_tokens_are_those_without_drafts() -> None:
    texts = prompts(6)
    answers = ids(engine(kv_nbytes=1 << 20).generate(requests(texts, SAMPLED)))
    it = speculating(answers)
    assert ids(it.generate(requests(texts, SAMPLED))) == answers
    check_drafted(it)


def made(kind: str, directory: Path, **more: Any) -> Engine:
    """An engine of one kind of model, whose weights are the same each time."""
    options = replace(OPTIONS, kv_nbytes=1 << 20, **more)
    model: Any = model_of(decoder(replace(TINY, experts=ExpertsConfig(4, 2)) if kind == "experts" else TINY))
    if kind == "quantized":
        if not any(directory.iterdir()):
            publish("awq", directory)
        model = str(directory)
    adapters = {"it": write_adapter(directory, TINY, "wide")} if kind == "adapters" else {}
    mode: AnyMode = "streamed" if kind == "streamed" else "auto"
    return Engine.load(model, options, device="cpu", dtype=torch.float32, mode=mode, adapters=adapters)


@pytest.mark.parametrize("kind", ["adapters", "experts", "quantized", "streamed"])
def test_tokens_are_those_without_drafts_whatever_layers_compute(kind: str, tmp_path: Path) -> None:
    adapters = ("it", None) if kind == "adapters" else (None, None)
    asked = [replace(it, adapter=adapters[i % 2]) for i, it in enumerate(requests(prompts(4), max_tokens=8))]
    answers = ids(made(kind, tmp_path).generate(asked))
    it = always(made(kind, tmp_path, speculate="prompt-lookup:3"), Oracle(answers))
    assert ids(it.generate(asked)) == answers
    check_drafted(it)


def test_drafts_obey_a_budget_that_is_set_while_the_engine_runs() -> None:
    texts = prompts(4)
    answers = {str(i): expected(TINY, text) for i, text in enumerate(texts)}
    it = speculating(answers)
    it.set_budget(6)
    with patch.object(it._runner, "launch", wraps=it._runner.launch) as launched:
        assert ids(it.generate(requests(texts))) == answers
    assert max(sum(run.num_tokens for run in call.args[0].runs) for call in launched.call_args_list) == 6
    check_drafted(it)


def test_stop_tokens_and_the_most_tokens_end_answers_in_the_middle_of_a_draft() -> None:
    texts = prompts(6)
    answers = {str(i): expected(TINY, text, 20) for i, text in enumerate(texts)}
    asked = [
        replace(request, max_tokens=5 + i, stop_tokens=frozenset([answers[request.id][4]]) if i % 2 else frozenset())
        for i, request in enumerate(requests(texts))
    ]
    done = speculating(answers, speculate="prompt-lookup:7").generate(asked)
    plain = engine(kv_nbytes=1 << 20).generate(asked)
    assert {name: (it.ids, it.finish) for name, it in done.items()} == {
        name: (it.ids, it.finish) for name, it in plain.items()
    }


def test_logprobs_are_told_of_every_token_of_a_draft() -> None:
    texts = prompts(3)
    answers = {str(i): expected(TINY, text) for i, text in enumerate(texts)}
    asked = requests(texts, num_logprobs=3)
    done, plain = speculating(answers).generate(asked), engine(kv_nbytes=1 << 20).generate(asked)
    for name, completion in plain.items():
        found = done[name].tokens
        assert [token.id for token in found] == completion.ids
        assert [[i for i, _ in token.top] for token in found] == [[i for i, _ in it.top] for it in completion.tokens]
        values = [[token.logprob, *(p for _, p in token.top)] for token in (*found, *completion.tokens)]
        np.testing.assert_allclose(values[: len(found)], values[len(found) :], atol=1e-4)


@pytest.mark.parametrize(
    "limits",
    [
        TokenLimits(min_tokens=6),
        TokenLimits(biases=((3, 4.0), (11, -50.0))),
        TokenLimits(bad_words=tuple((one, other) for one in range(0, 97, 2) for other in range(0, 97, 3))),
        TokenLimits(grammar=OddAfterEven()),
    ],
    ids=["least tokens", "biases", "words", "a grammar"],
)
def test_limited_tokens_are_those_without_drafts(limits: TokenLimits) -> None:
    texts = prompts(8)
    stops = frozenset(range(0, VOCAB_SIZE, 2)) if limits.min_tokens else frozenset[int]()
    asked = requests(texts, limits=limits, stop_tokens=stops)
    answers = ids(engine(kv_nbytes=1 << 20).generate(asked))
    it = speculating(answers)
    assert ids(it.generate(asked)) == answers
    check_drafted(it)


@pytest.mark.parametrize("lookahead", [True, False], ids=["ahead", "in step"])
@pytest.mark.parametrize(
    "limits",
    [None, TokenLimits(biases=((3, 4.0), (11, -50.0))), TokenLimits(grammar=OddAfterEven())],
    ids=["free", "biases", "a grammar"],
)
def test_penalties_count_what_they_count_without_drafts(limits: TokenLimits | None, lookahead: bool) -> None:
    """Of tokens that are accepted, and none that are rejected; half of the requests have no penalties."""
    repeats = replace(PENALIZED, repetition_penalty=0.7, frequency_penalty=-0.2)  # which draws tokens again and again
    asked = [
        replace(request, sampling=(PENALIZED, SAMPLED, repeats, GREEDY)[i % 4])
        for i, request in enumerate(requests(prompts(8), max_tokens=20, limits=limits))
    ]
    answers = ids(engine(kv_nbytes=1 << 20).generate(asked))
    it = speculating(answers, lookahead=lookahead)
    assert it._speculator is not None
    with patch.object(it._speculator._drafter, "draft", wraps=it._speculator._drafter.draft) as drafted:
        assert ids(it.generate(asked)) == answers
    assert {sequence.request.id for call in drafted.call_args_list for sequence in call.args[0]} == set(answers)
    check_drafted(it)


@pytest.mark.parametrize("costs", [SWAPPING, RECOMPUTING], ids=["swap", "recompute"])
def test_penalties_are_the_same_after_preemptions(costs: Costs) -> None:
    asked = requests(prompts(8, 30), PENALIZED, max_tokens=20)
    answers = ids(engine(kv_nbytes=1 << 20).generate(asked))
    it = speculating(answers, kv_nbytes=pages_nbytes(TINY, 26), costs=costs, debug=True)
    assert ids(it.generate(asked)) == answers
    assert it.metrics().num_preempted > 0
    check_drafted(it)


def test_requests_that_cannot_be_drafted_draw_the_same_beside_others_that_are() -> None:
    texts = prompts(4)
    asked = [replace(request, wants_hidden=True) if i % 2 else request for i, request in enumerate(requests(texts))]
    answers = ids(engine(kv_nbytes=1 << 20).generate(asked))
    it = speculating(answers)
    assert it._speculator is not None
    with patch.object(it._speculator._drafter, "draft", wraps=it._speculator._drafter.draft) as drafted:
        assert ids(it.generate(asked)) == answers
    wanted = {sequence.request.id for call in drafted.call_args_list for sequence in call.args[0]}
    assert wanted == {request.id for request in asked[::2]}
    check_drafted(it)
    alone = speculating(answers)
    alone.generate(asked[1::2])
    assert alone.metrics().num_tokens_drafted == 0


def test_one_output_of_a_step_has_all_tokens_that_were_accepted() -> None:
    text = prompts(1)[0]
    answers = {"0": expected(TINY, text)}
    it = always(engine(kv_nbytes=1 << 20, speculate="prompt-lookup:7", lookahead=False), Oracle(answers, every=100))
    it.add(requests([text])[0])
    steps = [it.step() for _ in range(4)]
    told = [[token.id for token in output.tokens] for outputs in steps for output in outputs]
    assert max(len(outputs) for outputs in steps) == 1
    assert [token for tokens in told for token in tokens] == answers["0"][: sum(map(len, told))]
    assert 8 in map(len, told)


# --- the same distribution ---

FEW = replace(TINY, vocab_size=3)
HOT = SamplingParams(temperature=6.0)


@cache
def probabilities() -> dict[tuple[int, ...], float]:
    """Of all texts of three tokens behind (1, 2), at the temperature."""
    found = {}
    for text in itertools.product(range(FEW.vocab_size), repeat=3):
        with torch.no_grad():
            scores = decoder(FEW)(torch.tensor([[1, 2, *text[:-1]]]))[0, 1:] / HOT.temperature
        found[text] = float(scores.softmax(-1)[torch.arange(3), torch.tensor(text)].prod())
    return found


class Stubborn:
    """Drafts the same tokens, whatever the text."""

    def prospect_of(self, sequence: ActiveRequest, most: int) -> Prospect | None:
        return Prospect(most, 0, 0.5, (2, 1)[:most])

    def draft(self, wanted: Mapping[ActiveRequest, int]) -> dict[ActiveRequest, tuple[int, ...]]:
        return {sequence: (2, 1)[:count] for sequence, count in wanted.items()}


def test_texts_are_drawn_with_the_models_own_probabilities_whatever_is_drafted() -> None:
    count = 300
    it = engine(FEW, kv_nbytes=1 << 20, max_batch_size=32, max_batch_tokens=128, speculate="prompt-lookup:2")
    always(it, Stubborn())
    seeded = [Request(str(i), (1, 2), replace(HOT, seed=i), max_tokens=3) for i in range(count)]
    drawn = Counter(tuple(answer) for answer in ids(it.generate(seeded)).values())
    check_drafted(it)
    expected_counts = {text: count * p for text, p in probabilities().items()}
    assert sum(probabilities().values()) == pytest.approx(1.0, abs=1e-4)
    often = [text for text, number in expected_counts.items() if number >= 5]
    statistic = sum((drawn[text] - expected_counts[text]) ** 2 / expected_counts[text] for text in often)
    assert len(often) > 15
    assert statistic < len(often) + 3.1 * (2 * len(often)) ** 0.5, "chi-squared, beyond which is one case in a thousand"


# --- what is drafted ---


@pytest.mark.parametrize(
    ("text", "drafted", "num_alike"),
    [
        ([1, 2, 3], (), 0),
        ([7], (), 0),
        ([7, 7], (), 0),
        ([1, 2, 9, 8, 1, 2], (9, 8, 1), 2),
        ([1, 2, 3, 1, 2, 4, 1, 2], (4, 1, 2), 2),
        ([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2], (3, 6, 1), 3),
        ([1, 2, 1, 2], (1, 2, 1), 2),
        ([4, 4, 4, 4, 4, 4], (4, 4, 4), 4),
        ([0, 1, 2, 3, 4, 5, 9, 1, 2, 3, 4], (5, 9, 1), 4),
    ],
)
def test_what_followed_the_last_tokens_before_is_drafted(
    text: list[int], drafted: tuple[int, ...], num_alike: int
) -> None:
    assert look_up(np.array(text), 3) == (drafted, num_alike)


# --- what pays ---


class Known:
    """Drafts with chances that a test says."""

    def __init__(self, chances: Mapping[str, float]) -> None:
        self.chances = chances

    def prospect_of(self, sequence: ActiveRequest, most: int) -> Prospect | None:
        return Prospect(most, 0, self.chances[sequence.request.id], tuple(range(most)))

    def draft(self, wanted: Mapping[ActiveRequest, int]) -> dict[ActiveRequest, tuple[int, ...]]:
        return {}


def chosen(
    chances: Mapping[str, float], seconds: Mapping[int, float], waits_s: float = 0.0, most: int = 3
) -> list[int]:
    """How many tokens are drafted for requests with these chances on a device of such steps."""
    options = replace(OPTIONS, speculate=f"prompt-lookup:{most}")
    it = Speculator(Known(chances), options, StepTimes(seconds))
    it._waits[True] = waits_s
    asked = [Request(name, (1, 2, 3), GREEDY, max_tokens=10) for name in chances]
    sequences = [ActiveRequest(request, row, None, list(request.prompt)) for row, request in enumerate(asked)]
    wanted = it._choose(sequences)
    return [wanted.get(sequence, 0) for sequence in sequences]


def test_rows_are_added_as_long_as_they_raise_the_tokens_a_second() -> None:
    assert chosen({"a": 0.5}, FREE) == [3]
    assert chosen({"a": 0.5}, {1: 1.0, 2: 1.4, 4: 1.5}) == [3]
    assert chosen({"a": 0.5}, {1: 1.0, 2: 1.6, 4: 1.9}) == [0]
    assert chosen({"a": 0.9}, {1: 1.0, 2: 1.6, 4: 1.9}) == [3]
    assert chosen({"a": 0.5}, {1: 1.0, 2: 1.1, 4: 9.0}) == [1]
    assert chosen({"a": 0.9, "b": 0.1}, {2: 1.0, 5: 1.02, 8: 3.0}) == [3, 0]
    assert chosen({"a": 0.5}, FREE, waits_s=0.5) == [3]
    assert chosen({"a": 0.5}, FREE, waits_s=1.0) == [0]


def test_no_text_is_looked_through_where_not_even_accepted_drafts_would_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen({"a": 1.0}, {1: 1.0, 2: 2.1, 4: 3.9}) == [3], "one row would not pay, three do"
    monkeypatch.setattr(Known, "prospect_of", lambda *_: pytest.fail("looked"))
    assert chosen({"a": 1.0}, {1: 1.0, 2: 2.1, 4: 4.2}) == [0]


def test_drafts_have_no_more_rows_than_are_planned_and_end_with_the_answer() -> None:
    assert sum(chosen(dict.fromkeys("abcd", 0.9), FREE, most=16)) == OPTIONS.max_batch_tokens - 4
    assert chosen({"a": 0.9}, FREE, most=16) == [9]


def test_chances_are_learned_from_what_became_of_drafts_that_were_never_verified() -> None:
    it = Speculator(PromptLookup(), replace(OPTIONS, speculate="prompt-lookup"), StepTimes(FREE))
    request = Request("0", (5, 6, 7, 8) * 3, GREEDY, max_tokens=20)
    sequence = ActiveRequest(request, 0, None, list(request.prompt))
    chances = []
    for token in (9, 5, 6, 9, 5, 6):
        it._choose([sequence])
        sequence.tokens.append(token)
        chances.append(dict(it._records[sequence].chances))
    assert chances[0][4] == pytest.approx(4 / 6)
    it._choose([sequence])
    assert it._records[sequence].chances[4] < 4 / 6, "5 was drafted behind 8, and 9 came"


def test_steps_without_drafts_are_launched_ahead_and_those_with_drafts_are_not() -> None:
    text = prompts(1)[0]
    answers = {"0": expected(TINY, text)}
    it = always(engine(kv_nbytes=1 << 20, speculate="prompt-lookup:3"), Known({"0": 0.0}))
    assert it.generate(requests([text]))["0"].ids == answers["0"]
    assert it.metrics().num_tokens_drafted == 0
    plain = engine(kv_nbytes=1 << 20)
    plain.generate(requests([text]))
    assert it.metrics().num_steps == plain.metrics().num_steps == NUM_TOKENS - 1 + it.metrics().num_chunks + 1


# --- options and plans ---


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prompt-lookup", Speculation()),
        ("prompt-lookup:4", Speculation(4)),
        ("draft:models/small", Speculation(3, "models/small")),
        ("draft:preset:tiny:5", Speculation(5, "preset:tiny")),
    ],
)
def test_how_tokens_are_drafted_is_said_in_a_word(text: str, found: Speculation) -> None:
    assert Speculation.parse(text) == found == EngineOptions(speculate=text).speculation


@pytest.mark.parametrize("text", ["", "lookup", "prompt-lookup:x", "prompt-lookup:a:3", "draft", "draft:", "draft:4"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="speculate must be prompt-lookup, or draft:MODEL"):
        EngineOptions(speculate=text)
    with pytest.raises(ValueError, match="1 to 16 tokens, found 17"):
        EngineOptions(speculate="prompt-lookup:17")


def test_a_plan_has_rows_for_drafts() -> None:
    assert EngineOptions(max_batch_size=4, speculate="prompt-lookup:7").max_decode_rows == 32
    assert EngineOptions(max_batch_size=64, speculate="prompt-lookup:7").max_decode_rows == MAX_DRAFTED_ROWS
    assert EngineOptions(max_batch_size=200, speculate="prompt-lookup:7").max_decode_rows == 200
    assert EngineOptions(max_batch_size=200).max_decode_rows == 200


# --- a draft model ---

SMALL = replace(TINY, num_layers=1, ffn_dim=32)


def drafted_by(draft: Any, **more: Any) -> Engine:
    options = replace(OPTIONS, speculate="draft:it:3", **{"kv_nbytes": 1 << 20, **more})
    return always(Engine.load(model_of(decoder(TINY)), options, dtype=torch.float32, draft=model_of(decoder(draft))))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_model_drafts_its_own_tokens_without_a_fault(sampling: SamplingParams) -> None:
    texts = prompts(5)
    answers = ids(engine(kv_nbytes=1 << 20).generate(requests(texts, sampling)))
    it = drafted_by(TINY)
    assert ids(it.generate(requests(texts, sampling))) == answers
    check_drafted(it, rejects=False)
    check_idle(it._speculator._drafter.engine)  # type: ignore[union-attr]


def test_another_model_that_drafts_changes_no_token() -> None:
    texts = prompts(5)
    answers = ids(engine(kv_nbytes=1 << 20).generate(requests(texts, SAMPLED)))
    it = drafted_by(SMALL, debug=True)
    assert ids(it.generate(requests(texts, SAMPLED))) == answers
    assert it.metrics().num_tokens_drafted > it.metrics().num_tokens_accepted
    check_idle(it)


def test_a_draft_model_lies_on_the_same_arena_with_pages_for_as_many_tokens() -> None:
    it = drafted_by(SMALL)
    drafts = it._weights.plan.draft
    assert drafts is not None
    assert it._weights.arena.nbytes == it.plan.nbytes == sum(region.nbytes for region in it.plan.regions)
    assert {region.name for region in drafts.memory.regions} == {
        region.name.removeprefix("draft: ") for region in it.plan.regions if region.name.startswith("draft: ")
    }
    limited = replace(OPTIONS, kv_nbytes=None, memory_limit_nbytes=4 << 20, speculate="draft:it:3")
    plan = plan_with_draft(TINY, limited, draft=SMALL)
    assert plan.draft is not None and plan.memory.nbytes <= 4 << 20
    assert plan.draft.num_context_tokens == pytest.approx(plan.num_context_tokens, rel=0.1)


def test_a_draft_model_that_cannot_serve_is_refused() -> None:
    options = replace(OPTIONS, speculate="draft:it:3")
    with pytest.raises(ValueError, match="must have the tokens of the model, 97 of them, found 3"):
        plan_with_draft(TINY, options, draft=FEW)
    with pytest.raises(ValueError, match="needs the draft model's configuration"):
        plan_with_draft(TINY, options)
    with pytest.raises(ValueError, match="a draft model needs speculate='draft:"):
        Engine.load(model_of(decoder(TINY)), OPTIONS, draft=model_of(decoder(SMALL)))
    least = least_nbytes(TINY, replace(OPTIONS, kv_nbytes=None, speculate="draft:it"), Site())
    with pytest.raises(ValueError, match="the model fits, but not its draft model beside it"):
        plan_with_draft(
            TINY, replace(OPTIONS, kv_nbytes=None, memory_limit_nbytes=least, speculate="draft:it"), draft=TINY
        )
