"""Sampling against its reference, and the reference against numbers by hand."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.inference import (
    BF16,
    F16,
    F32,
    random,
)
from tests.kernels.test_kernels import DEVICE, needs_kernels
from yafsdp_like.kernels import sampling
from yafsdp_like.kernels.sampling import SamplingRows, gumbel_noise, remember, sample, sample_reference
from yafsdp_like.kernels.sampling_params import SamplingParams


def rows_of(
    params: Sequence[SamplingParams], positions: Sequence[int] | None = None, history: Tensor | None = None
) -> SamplingRows:
    """Row b has row b of the history, if there is one and it needs it."""
    positions = range(10, 10 + len(params)) if positions is None else positions
    indices = [b if history is not None and p.needs_history else -1 for b, p in enumerate(params)]
    integers = [p.ints(*pair) for p, *pair in zip(params, positions, indices, strict=True)]
    numbers = [p.floats for p in params]
    return SamplingRows(torch.tensor(numbers, device=DEVICE), torch.tensor(integers, device=DEVICE), history)


def drawn(logits: Tensor, rows: SamplingRows, reference: bool = False) -> list[int]:
    out = torch.full((len(logits),), -1, device=DEVICE)
    (sample_reference if reference else sample)(logits, rows, out)
    return out.tolist()


def survivors(logits: Sequence[float], **params: float) -> list[int]:
    """Tokens that are drawn at some of many positions."""
    many = [SamplingParams(**params)] * 100  # type: ignore[arg-type]
    repeated = torch.tensor([list(logits)] * 100, device=DEVICE)
    return sorted(set(drawn(repeated, rows_of(many), reference=True)))


def test_noise_is_made_of_the_published_philox() -> None:
    """The first of the known answers that come with Random123."""
    assert [int(word) for word in sampling._philox(0, 0, 1, DEVICE)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_has_the_mean_and_variance_of_gumbel() -> None:
    noise = gumbel_noise(5, 3, 100_000, DEVICE)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - math.pi**2 / 6) < 0.04
    assert noise.unique().numel() > 99_000


def test_noise_is_the_requests_and_the_positions_own() -> None:
    noise = gumbel_noise(1, 0, 64, DEVICE)
    for other in (
        gumbel_noise(2, 0, 64, DEVICE),
        gumbel_noise(1 << 32 | 1, 0, 64, DEVICE),
        gumbel_noise(1, 1, 64, DEVICE),
    ):
        assert not (noise == other).any()
    assert torch.equal(noise[:61], gumbel_noise(1, 0, 61, DEVICE))


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -math.inf], device=DEVICE)
    params = [SamplingParams(temperature=2.0, seed=7)] * 2000
    counts = torch.tensor(drawn(logits.expand(2000, -1), rows_of(params), reference=True)).bincount(minlength=5)
    expected = (logits / 2).softmax(0).cpu() * 2000
    assert counts[4] == 0
    assert ((counts - expected).abs() <= 4 * (expected * (1 - expected / 2000)).sqrt()).all()


def test_candidates_are_those_of_the_formulas() -> None:
    logits = [math.log(p) for p in (0.4, 0.1, 0.3, 0.1, 0.1)]
    assert survivors(logits) == [0, 1, 2, 3, 4]
    assert survivors(logits, top_k=2) == [0, 2]
    assert survivors(logits, top_k=3) == [0, 1, 2, 3, 4]  # equals stay together
    assert survivors(logits, top_p=0.39) == [0]
    assert survivors(logits, top_p=0.41) == [0, 2]
    assert survivors(logits, top_p=0.71) == [0, 1, 2, 3, 4]
    assert survivors(logits, top_k=2, top_p=0.56) == [0]  # of the two, the first has 4 / 7
    assert survivors(logits, min_p=0.5) == [0, 2]
    assert survivors(logits, top_p=1e-6) == [0]


def test_penalties_are_those_of_the_formulas() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]], device=DEVICE)
    history = torch.zeros(1, 4, dtype=torch.int32, device=DEVICE)
    remember(history[0], torch.tensor([0, 1], device=DEVICE), torch.tensor([1, 2, 2], device=DEVICE))
    assert history.tolist() == [[1, 3, 4, 0]]
    found = sampling._penalized(logits[0], history[0], 4.0, 0.25, 0.5, 1.0)
    assert found.tolist() == [0.5, -8.0 - 1.5, 0.25 - 2.5, 0.5]


@pytest.mark.parametrize("reference", [True, pytest.param(False, marks=needs_kernels)])
def test_greedy_draws_the_lowest_of_equals_and_counts_it(reference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 16)
    logits = torch.zeros(3, 70, device=DEVICE)
    logits[0, [33, 37, 65]] = 1.0
    logits[1, 69] = 2.0
    logits[2, [1, 2]] = 1.0
    history = torch.zeros(3, 70, dtype=torch.int32, device=DEVICE)
    history[2, 1] = 2
    greedy = SamplingParams(temperature=0.0)
    params = [greedy, greedy, SamplingParams(temperature=1e-4, presence_penalty=0.5)]  # as cold as 0
    rows = rows_of(params, history=history)
    assert drawn(logits, rows, reference) == [33, 69, 2]
    assert drawn(logits, rows, reference) == [33, 69, 1]  # 2 has been said as well by now
    assert history.sum().item() == 2 * 3


SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=40, seed=-5),
    SamplingParams(temperature=1.3, top_p=0.8, seed=2**62 + 1),
    SamplingParams(temperature=0.5, top_k=17, top_p=0.6, min_p=0.01, seed=3),
    SamplingParams(temperature=2.0, min_p=0.2, seed=4),
    SamplingParams(temperature=0.9, top_k=1, seed=5),
    SamplingParams(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=-0.4, seed=6),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.4),
    SamplingParams(top_k=100_000, top_p=1e-7, seed=7),
]


def sampled_logits(vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Some tokens are out of the question, and in bfloat16 many are equal."""
    logits = 3 * random(len(SAMPLINGS), vocab_size, dtype=dtype)
    logits[:, 5:30:7] = -math.inf
    return logits


@needs_kernels
@pytest.mark.parametrize(("vocab_size", "dtype"), [(1003, F32), (1003, BF16), (3, F32), (1, F16), (256, F16)])
def test_tokens_are_those_of_the_reference(
    vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 256)
    logits = sampled_logits(vocab_size, dtype)
    histories = [(random(len(SAMPLINGS), vocab_size, seed=1) * 2).int().clamp(min=0) for _ in range(2)]
    for start in (0, 1000):
        positions = [start + b for b in range(len(SAMPLINGS))]
        found, expected = (
            drawn(logits, rows_of(SAMPLINGS, positions, history), reference)
            for history, reference in zip(histories, (False, True), strict=True)
        )
        assert found == expected
    assert torch.equal(*histories)


@needs_kernels
def test_a_request_draws_the_same_tokens_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 256)
    logits, positions = sampled_logits(300, F32), range(len(SAMPLINGS))
    together = drawn(logits, rows_of(SAMPLINGS, positions))
    order = [3, 4, 0]
    apart = drawn(logits[order], rows_of([SAMPLINGS[b] for b in order], order))
    assert apart == [together[b] for b in order]


@needs_kernels
def test_a_row_without_a_possible_token_draws_one_of_the_vocabulary() -> None:
    """Prevents: an index past the vocabulary, which would be read from the embedding."""
    logits = torch.full((2, 5), -math.inf, device=DEVICE)
    assert drawn(logits, rows_of([SamplingParams(temperature=0.0), SamplingParams(top_k=2, top_p=0.5)])) == [0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"seed": 2**63},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        SamplingParams(**change)  # type: ignore[arg-type]


def test_rows_for_other_logits_are_refused() -> None:
    rows = rows_of([SamplingParams()] * 2)
    with pytest.raises(ValueError, match=r"floats: expected \(3, 7\)"):
        sample(torch.zeros(3, 5, device=DEVICE), rows, torch.zeros(3, device=DEVICE).long())
    with pytest.raises(ValueError, match=r"out: expected \(2,\) in torch.int64"):
        sample(torch.zeros(2, 5, device=DEVICE), rows, torch.zeros(2, device=DEVICE))
