"""The engine against a plain loop over the decoder: the same tokens, however requests are batched, cut and moved."""

from __future__ import annotations

import functools
import random
import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.test_kernels import run_python
from tests.ranks import run_ranks
from yafsdp_like.hardware import H200
from yafsdp_like.inference.engine import forward, runner
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Completion, FinishReason, QueueFullError, Request, Token
from yafsdp_like.inference.kv.eviction import Costs, Tenant
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.step_sizes import StepSize
from yafsdp_like.inference.weights.loading import load, model_of, world_transport
from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.kernels.sampling import SamplingRows, remember, sample
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models.decoder import Attention, Decoder, DecoderConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.comm import TransportName

VOCAB_SIZE = 97
TINY = DecoderConfig(32, 2, 4, 2, 64, vocab_size=VOCAB_SIZE, max_seq_len=128, rope_theta=1e4)
ARCHITECTURES = {
    "grouped queries": TINY,
    "multi-head": replace(TINY, num_kv_heads=4),
    "multi-query": replace(TINY, num_kv_heads=1),
    "windows": replace(TINY, sliding_window=9),
    "windows in one layer of three": replace(TINY, num_layers=3, sliding_window=7, windowed_layers=(1,)),
    "norms of heads": replace(TINY, qk_norm=True, custom_head_dim=12),
    "biases": replace(TINY, qkv_bias=True),
    "tied head": replace(TINY, tie_embeddings=True),
}
SWAPPING = Costs(link_nbytes_per_s=1e15, prefill_tokens_per_s=1.0)
RECOMPUTING = Costs(link_nbytes_per_s=1.0, prefill_tokens_per_s=1e15)
OPTIONS = EngineOptions(
    kv_nbytes=48 << 10,
    host_kv_nbytes=256 << 10,
    max_batch_size=4,
    max_batch_tokens=16,
    max_seq_len=64,
    page_size=4,
    costs=SWAPPING,
)
GREEDY = SamplingParams(temperature=0.0)
MAX_STEPS = 3000
FAULTS = {FinishReason.FAILED, FinishReason.GRAMMAR}  # which no sound request ends by


@cache
def decoder(config: DecoderConfig) -> Decoder:
    """Random weights, large enough that tokens follow from those before."""
    model = Decoder(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                param.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
            elif param.dim() > 1:
                param.mul_(6.0)
    return model.eval()


def engine(config: DecoderConfig = TINY, options: EngineOptions = OPTIONS, **more: Any) -> Engine:
    options = replace(options, **more)
    return Engine.load(model_of(decoder(config)), options, device="cpu", dtype=torch.float32)


def pages_nbytes(config: DecoderConfig, num_pages: int) -> int:
    """Of a model whose layers are all alike."""
    head_nbytes = OPTIONS.page_size * config.head_dim * 4
    plane = -(-config.num_kv_heads * head_nbytes // 256) * 256
    return num_pages * config.num_layers * 2 * plane


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, longest))) for _ in range(count)]


def requests(texts: Sequence[tuple[int, ...]], sampling: SamplingParams = GREEDY, **more: Any) -> list[Request]:
    return [Request(str(i), text, sampling, **{"max_tokens": 12, **more}) for i, text in enumerate(texts)]


@torch.no_grad()
def expected(config: DecoderConfig, prompt: tuple[int, ...], num_tokens: int = 12) -> list[int]:
    """The most probable tokens, by one forward of the whole text for each."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(decoder(config)(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def ids(done: dict[str, Completion]) -> dict[str, list[int]]:
    return {name: completion.ids for name, completion in done.items()}


def check_idle(it: Engine) -> None:
    """Nothing runs, waits or holds pages, and all books agree."""
    metrics = it.metrics()
    assert not it.has_work
    assert (metrics.num_running, metrics.num_waiting, metrics.num_swapped) == (0, 0, 0)
    assert (metrics.kv_nbytes_used, metrics.host_kv_nbytes_used) == (0, 0)
    it.check_integrity()


# --- the same tokens ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_a_plain_loop(name: str) -> None:
    config = ARCHITECTURES[name]
    it, texts = engine(config, kv_nbytes=1 << 20), prompts(8)
    done = it.generate(requests(texts))
    assert ids(done) == {str(i): expected(config, text) for i, text in enumerate(texts)}
    assert it.metrics().num_chunks > 0
    assert len({token for completion in done.values() for token in completion.ids}) > 4
    check_idle(it)


@pytest.mark.parametrize("name", ["grouped queries", "windows in one layer of three"])
@pytest.mark.parametrize("costs", [SWAPPING, RECOMPUTING], ids=["swap", "recompute"])
@pytest.mark.parametrize("lookahead", [True, False], ids=["ahead", "in step"])
def test_tokens_are_the_same_after_preemptions(name: str, costs: Costs, lookahead: bool) -> None:
    config = ARCHITECTURES[name]
    it = engine(config, kv_nbytes=pages_nbytes(config, 16), costs=costs, lookahead=lookahead)
    texts = prompts(8, longest=22)
    done = it.generate(requests(texts, max_tokens=20))
    assert ids(done) == {str(i): expected(config, text, 20) for i, text in enumerate(texts)}
    metrics = it.metrics()
    swapped, recomputed = metrics.num_swapped_out, metrics.num_recomputed
    assert (swapped > 0) if costs is SWAPPING else (recomputed > 0 and swapped == 0)
    check_idle(it)


def test_a_shared_beginning_is_computed_once() -> None:
    it, (start,) = engine(), prompts(1, longest=1)
    start = start * 21
    texts = [(*start, i) for i in range(6)]
    first = it.generate(requests(texts[:1]))
    rest = it.generate([replace(request, id=f"again {request.id}") for request in requests(texts)])
    assert [rest[f"again {i}"].ids for i in range(6)] == [expected(TINY, text) for text in texts]
    assert first["0"].num_cached_tokens == 0
    assert {completion.num_cached_tokens for completion in rest.values()} == {20}
    assert it.metrics().num_tokens_cached == 120


def test_prefixes_are_shared_with_the_same_salt_only_and_not_at_all_when_not_wished() -> None:
    text = prompts(1, longest=30, seed=3)[0] * 2
    for options, salts, cached in (
        (OPTIONS, ("x", "x"), True),
        (OPTIONS, ("x", "y"), False),
        (OPTIONS, ("x", None), False),
        (replace(OPTIONS, prefix_cache=False), (None, None), False),
    ):
        it = engine(options=options)
        done = [it.generate([Request("a", text, GREEDY, max_tokens=2, salt=salt)])["a"] for salt in salts]
        assert (done[1].num_cached_tokens > 0) == cached
        assert done[0].ids == done[1].ids


def test_what_the_device_has_lost_of_a_prefix_comes_back_from_the_host() -> None:
    """Pages that a preempted sequence left on the host are found by others."""
    it = engine(kv_nbytes=pages_nbytes(TINY, 16))
    it.generate(requests(prompts(8, longest=22), max_tokens=20))
    assert it.metrics().num_swapped_out > 0 and it.metrics().host_kv_nbytes_cached > 0
    again = it.generate(requests(prompts(8, longest=22), max_tokens=20))
    assert ids(again) == {str(i): expected(TINY, text, 20) for i, text in enumerate(prompts(8, longest=22))}
    check_idle(it)


def test_keys_and_values_in_eight_bits_give_what_rounding_them_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(6)
    it = engine(kv_dtype="float8_e4m3fn")
    done = ids(it.generate(requests(texts)))
    plain = Attention.qkv

    def rounded(self: Attention, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = plain(self, *args)
        return q, k.to(torch.float8_e4m3fn).float(), v.to(torch.float8_e4m3fn).float()

    exact = {str(i): expected(TINY, text) for i, text in enumerate(texts)}
    monkeypatch.setattr(Attention, "qkv", rounded)
    assert done == {str(i): expected(TINY, text) for i, text in enumerate(texts)} != exact


class Recorder:
    """Stands for CUDA graphs: work is done once when it is recorded, and again, as it is, when it is replayed."""

    def __init__(self) -> None:
        self.recorded: list[tuple[str, StepSize | int]] = []
        self.replayed: list[tuple[str, StepSize | int]] = []

    def record(self, work: functools.partial[None]) -> Any:
        name, (size,) = work.func.__name__, work.args
        self.recorded.append((name, size))
        work()

        def replay() -> None:
            self.replayed.append((name, size))
            work()

        return SimpleNamespace(replay=replay)


def record_steps(it: Engine, monkeypatch: pytest.MonkeyPatch, recording_nbytes: int = 0) -> Recorder:
    """As on a GPU, of which each recording takes that much."""
    recorder, plan = Recorder(), it._weights.plan
    it._weights.plan = replace(plan, site=replace(plan.site, hardware=H200))
    monkeypatch.setattr(runner, "StepRecorder", lambda: recorder)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (-len(recorder.recorded) * recording_nbytes, 0))
    it._runner._on_gpu = True
    it._runner.warm_up(graphs=True)
    return recorder


def test_recorded_steps_begin_and_end_with_weights_same_residency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a replay that overtakes a copy which a step before it has left under way."""
    config = replace(TINY, num_layers=4)
    options = replace(OPTIONS, kv_nbytes=1 << 20, max_batch_size=6)
    it = Engine.load(model_of(decoder(config)), options, mode="streamed", dtype=torch.float32)
    done: list[str] = []
    reset_residency, step, texts = it._weights.reset_residency, it._runner._step, prompts(9)

    def _step(size: StepSize) -> None:
        done.append("begin")
        step(size)
        done.append("end")

    monkeypatch.setattr(it._weights, "reset_residency", lambda: (reset_residency(), done.append("reset")))
    monkeypatch.setattr(it._runner, "_step", _step)
    recorder = record_steps(it, monkeypatch)
    assert ids(it.generate(requests(texts))) == {str(i): expected(config, text) for i, text in enumerate(texts)}
    steps = [name for name, _ in recorder.recorded + recorder.replayed if name == "_step"]
    assert len(steps) > 10
    assert done == ["reset", "begin", "reset", "end"] * len(steps)


def test_rows_that_fill_up_a_recorded_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    it, texts = engine(kv_nbytes=1 << 20, max_batch_size=6), prompts(9)
    recorder = record_steps(it, monkeypatch)
    done = it.generate(requests(texts, num_logprobs=1))
    assert ids(done) == {str(i): expected(TINY, text) for i, text in enumerate(texts)}
    assert all(token.top == ((token.id, token.logprob),) for completion in done.values() for token in completion.tokens)
    replayed = {size for name, size in recorder.replayed if name == "_step"}
    assert replayed >= {StepSize.decode(4), StepSize.decode(6), StepSize(16, 6, 6, 6)}
    assert {size for name, size in recorder.replayed if name == "_compute_logprobs"} >= {4, 6}
    check_idle(it)


def test_recordings_beyond_the_plan_are_left_out_and_their_steps_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    it, texts = engine(kv_nbytes=1 << 20, max_batch_size=6), prompts(9)
    with pytest.warns(UserWarning, match="CUDA graphs do not fit the .* bytes planned for them"):
        recorder = record_steps(it, monkeypatch, recording_nbytes=7 << 20)
    steps = [size for name, size in recorder.recorded if name == "_step"]
    assert steps == [StepSize.decode(6), StepSize.decode(4)]
    taken = it.metrics().recordings_nbytes
    assert taken == len(recorder.recorded) * (7 << 20) <= 1.05 * it._weights.plan.recordings_nbytes
    assert ids(it.generate(requests(texts))) == {str(i): expected(TINY, text) for i, text in enumerate(texts)}
    assert {size for name, size in recorder.replayed if name == "_step"} == {*steps}
    it.close()
    assert not it._runner._recordings and not it._runner._logprobs  # a process group would wait for their sums


def test_an_engine_that_an_error_ends_has_no_recordings_though_other_ranks_are_in_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents: an error that is never told, since the end of the process group waits for the recordings."""
    it = engine()
    record_steps(it, monkeypatch)
    it.lockstep = True
    with pytest.raises(ZeroDivisionError), it:
        assert it._runner._recordings
        raise ZeroDivisionError
    assert not it._runner._recordings and not it._runner._logprobs


@pytest.mark.slow(unless=lambda name, costs: (name == "grouped queries") == (costs is SWAPPING))
@pytest.mark.parametrize("name", ["grouped queries", "windows in one layer of three"])
@pytest.mark.parametrize("costs", [SWAPPING, RECOMPUTING], ids=["swap", "recompute"])
def test_every_step_is_a_recording_also_with_preemptions_and_arrivals(
    name: str, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that differ in all that a request may say, with few pages: the tokens of steps that are not padded."""
    draw, starts, tokens = random.Random(name), prompts(4, longest=20), []
    asked = [replace(arrival(draw, str(i), starts), deadline=None) for i in range(60)]
    for padded in (False, True):
        it = engine(ARCHITECTURES[name], kv_nbytes=pages_nbytes(TINY, 24), costs=costs, max_batch_size=10)
        recorder = record_steps(it, monkeypatch) if padded else None
        tokens.append(ids(it.generate(asked)))
        assert it.metrics().num_preempted > 0
        check_idle(it)
    assert recorder is not None
    replayed = [size for name, size in recorder.replayed if name == "_step"]
    assert len(replayed) == it.metrics().num_steps and len(set(replayed)) > 5
    assert tokens[0] == tokens[1]
    assert list(it._runner.measure_steps()) == [8, 16]


@pytest.mark.parametrize("name", ["windows in one layer of three", "norms of heads"])
def test_a_few_tokens_of_three_prompts_are_the_same(name: str) -> None:
    """Small enough for the interpreter; steps have rows of both sorts."""
    config = ARCHITECTURES[name]
    it = engine(config, kv_nbytes=pages_nbytes(config, 7), max_batch_tokens=8, max_seq_len=16)
    texts = [text[:9] for text in prompts(6, seed=1) if len(text) > 8][:3]
    done = it.generate(requests(texts, max_tokens=5))
    assert ids(done) == {str(i): expected(config, text, 5) for i, text in enumerate(texts)}
    assert it.metrics().num_chunks > 0


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.slow
def test_with_kernels_in_the_interpreter_tokens_are_the_same() -> None:
    pytest.importorskip("triton")
    names = "few_tokens_of_three"
    run_python("-m", "pytest", "-q", "-x", "tests/inference/engine/test_engine.py", "-k", names, TRITON_INTERPRET="1")


# --- drawing ---

DRAWN = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=5)
PENALIZED = replace(DRAWN, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, seed=6)


@torch.no_grad()
def drawn_by_hand(prompt: tuple[int, ...], params: SamplingParams, num_tokens: int) -> list[int]:
    """One forward and one draw for each token."""
    tokens, history = list(prompt), torch.zeros(1, VOCAB_SIZE, dtype=torch.int32)
    remember(history[0], torch.tensor(prompt), torch.tensor([], dtype=torch.int64))
    for _ in range(num_tokens):
        logits, out = decoder(TINY)(torch.tensor([tokens]))[:, -1], torch.zeros(1, dtype=torch.int64)
        rows = torch.tensor([params.floats]), torch.tensor([params.ints(len(tokens), 0)])
        sample(logits, SamplingRows(*rows, history), out)
        tokens.append(int(out))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("params", [DRAWN, PENALIZED], ids=["plain", "penalized"])
def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_after_preemption(params: SamplingParams) -> None:
    texts = prompts(6, longest=22)
    by_seed = [Request(str(i), text, replace(params, seed=i), max_tokens=16) for i, text in enumerate(texts)]
    by_hand = {request.id: drawn_by_hand(request.prompt, request.sampling, 16) for request in by_seed}
    assert len({token for tokens in by_hand.values() for token in tokens}) > 30
    alone = engine()
    assert {r.id: alone.generate([r])[r.id].ids for r in by_seed} == by_hand
    for costs, order in ((SWAPPING, 1), (RECOMPUTING, -1)):
        it = engine(kv_nbytes=pages_nbytes(TINY, 16), costs=costs)
        assert ids(it.generate(by_seed[::order])) == by_hand
        assert it.metrics().num_preempted > 0


def test_log_probabilities_are_those_of_the_model_in_order() -> None:
    it, texts = engine(), prompts(5)
    told = [None, 0, 1, 5, 20]
    asked = [replace(request, num_logprobs=n) for request, n in zip(requests(texts, PENALIZED), told, strict=True)]
    for request, completion in ((r, it.generate([r])[r.id]) for r in asked):
        tokens = list(request.prompt)
        for token in completion.tokens:
            with torch.no_grad():
                scores = decoder(TINY)(torch.tensor([tokens]))[0, -1].log_softmax(-1)
            check_logprobs(token, scores, request.num_logprobs)
            tokens.append(token.id)


def check_logprobs(token: Token, scores: Tensor, num_logprobs: int | None) -> None:
    if num_logprobs is None:
        assert token.logprob is None and token.top == ()
        return
    assert token.logprob == pytest.approx(scores[token.id].item(), abs=1e-4)
    best = scores.topk(num_logprobs)
    assert [index for index, _ in token.top] == best.indices.tolist()
    assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


# --- the machine ---


def test_weights_that_are_streamed_give_the_same_tokens() -> None:
    weights = load(model_of(decoder(TINY)), OPTIONS, device="cpu", dtype=torch.float32, mode="streamed")
    it, texts = Engine(weights), prompts(5)
    assert weights.plan.mode == "streamed"
    assert ids(it.generate(requests(texts))) == {str(i): expected(TINY, text) for i, text in enumerate(texts)}


def serve_gathered(
    asked: TransportName, num_prompts: Sequence[int], num_steps: int
) -> tuple[bool, dict[str, list[int]]]:
    """On each rank: whether ranks step together, and what its own requests drew."""
    transport = world_transport("cpu", asked)
    weights = load(
        model_of(decoder(TINY)), OPTIONS, device="cpu", dtype=torch.float32, mode="gathered", transport=transport
    )
    it, drawn = Engine(weights), dict[str, list[int]]()
    for request in requests(prompts(num_prompts[dist.get_rank()], seed=dist.get_rank())):
        it.add(request)
    for step in range(MAX_STEPS):
        if step >= num_steps if weights.lockstep else not it.has_work:
            break
        for output in it.step():
            drawn.setdefault(output.request_id, []).extend(token.id for token in output.tokens)
    check_idle(it)
    weights.close()
    return weights.lockstep, drawn


@pytest.mark.parametrize(("asked", "lockstep"), [("process_group", True), ("peer", False)])
def test_ranks_that_share_weights_serve_requests_of_their_own(asked: TransportName, lockstep: bool) -> None:
    results = run_ranks(serve_gathered, asked, [5, 1], 60)
    for rank, (found, drawn) in enumerate(results):
        texts = prompts([5, 1][rank], seed=rank)
        assert found == lockstep
        assert drawn == {str(i): expected(TINY, text) for i, text in enumerate(texts)}


def test_costs_are_measured_where_there_is_a_host_tier() -> None:
    costs = engine(costs=None).cache.costs
    assert costs.link_nbytes_per_s > 1e6 and costs.prefill_tokens_per_s > 1


def test_ranks_that_step_together_make_one_forward_a_step_with_work_or_without() -> None:
    options = replace(OPTIONS, kv_nbytes=pages_nbytes(TINY, 16), costs=RECOMPUTING)
    weights = load(model_of(decoder(TINY)), options, device="cpu", dtype=torch.float32)
    weights.lockstep = True
    it, forwards, embedding = Engine(weights), [0], weights.embedding

    def counted() -> Tensor:
        forwards[0] += 1
        return embedding()

    weights.embedding = counted  # type: ignore[method-assign]
    for request in requests(prompts(8, longest=22), max_tokens=20):
        it.add(request)
    for num_steps in range(1, MAX_STEPS):
        working = it.has_work
        it.step()
        assert forwards[0] == num_steps
        if not working and num_steps > it.metrics().num_steps + 3:
            break
    assert it.metrics().num_recomputed > 0 and not it.has_work
    with pytest.raises(RuntimeError, match="step"):
        it.generate([])


class Made(TorchDispatchMode):
    """Names of the operations whose results lie in memory that was not among their arguments'."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        if any(tensor.untyped_storage().data_ptr() not in given for tensor in tensors_in(results)):
            self.names.add(str(func))
        return results


def tensors_in(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", ["windows in one layer of three", "norms of heads", "biases"])
def test_a_step_writes_into_places_that_were_there_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are left out, whose references are not what a GPU runs."""
    it = engine(ARCHITECTURES[name])
    for kernel in ("rms_norm", "swiglu", "decode_attention", "prefill_attention", "rotate_and_store"):
        monkeypatch.setattr(forward, kernel, lambda *args, **kwargs: None)
    monkeypatch.setattr(runner, "sample", lambda *args: None)
    for request in requests(prompts(4), PENALIZED, num_logprobs=3):
        it.add(request)
    with Made() as made:
        torch.zeros(1)
        while it.has_work:
            it.step()
    assert made.names == {"aten.zeros.default"}
    assert it.metrics().num_chunks > 0


def allocations() -> dict[str, int]:
    """Counters of torch's allocator, which only grow."""
    stats = torch.cuda.memory_stats()
    return {name: stats[name] for name in ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries")}


@pytest.mark.gpu(count=1)
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu_tokens_are_the_same_and_nothing_is_allocated(graphs: bool) -> None:
    """The plain loop is on the CPU; the requests differ in all that a request may say."""
    options = replace(OPTIONS, kv_nbytes=1 << 20, graphs=graphs)
    it = Engine.load(model_of(decoder(TINY)), options, device="cuda", dtype=torch.float32)
    texts = prompts(8)
    assert ids(it.generate(requests(texts))) == {str(i): expected(TINY, text) for i, text in enumerate(texts)}
    draw, starts = random.Random(0), prompts(4, longest=20)
    it.generate(arrival(draw, str(i), starts) for i in range(100))
    if graphs:
        before = allocations()
        for _ in range(100):
            it.generate(arrival(draw, str(i), starts) for i in range(100))
        assert allocations() == before
    check_idle(it)


# --- long runs ---


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        ("lru", 200),
        pytest.param("lru", 2000, marks=[pytest.mark.slow, pytest.mark.timeout(400)]),
        pytest.param("gdsf", 2000, marks=[pytest.mark.slow, pytest.mark.timeout(400)]),
    ],
)
def test_random_arrivals_leave_no_page_behind(policy: str, count: int) -> None:
    """Some are cancelled, some too late, some share beginnings; nothing stays but what is cached."""
    draw = random.Random(policy)
    config = replace(TINY, dim=16, num_heads=2, num_kv_heads=1, ffn_dim=16, num_layers=1)
    it = engine(
        config,
        kv_nbytes=pages_nbytes(config, 24),
        host_kv_nbytes=pages_nbytes(config, 40),
        max_batch_size=8,
        max_batch_tokens=24,
        max_waiting=12,
        policy=policy,
        costs=Costs(1e9, 1e6) if policy == "lru" else SWAPPING,
        tenants=(Tenant("floor", pages_nbytes(config, 2)),),
    )
    starts = prompts(4, longest=20)
    finished: dict[str, FinishReason] = {}
    left = count
    while left or it.has_work:
        for _ in range(draw.choice([0, 0, 1, 3]) if left else 0):
            try:
                it.add(arrival(draw, str(left), starts))
            except QueueFullError:
                break
            left -= 1
            if not left:
                break
        if it._sequences and draw.random() < 0.1:
            it.cancel(draw.choice(list(it._sequences)))
        for output in it.step():
            if output.finish is not None:
                assert output.request_id not in finished
                finished[output.request_id] = output.finish
        if draw.random() < 0.02:
            it.check_integrity()
    assert len(finished) == count and set(finished.values()) == set(FinishReason) - FAULTS
    metrics = it.metrics()
    assert metrics.num_preempted > 0 and metrics.num_tokens_cached > 0 and metrics.num_tokens_dropped > 0
    check_idle(it)


def arrival(draw: random.Random, name: str, starts: Sequence[tuple[int, ...]]) -> Request:
    text = [*draw.choice(starts), *(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 20)))]
    return Request(
        name,
        tuple(text),
        draw.choice([GREEDY, GREEDY, GREEDY, replace(DRAWN, seed=len(text)), replace(PENALIZED, seed=len(text))]),
        max_tokens=draw.randint(1, 16),
        stop_tokens=frozenset(draw.sample(range(VOCAB_SIZE), 4)),
        num_logprobs=draw.choice([None, None, None, 3]),
        tenant=draw.choice(["", "floor"]),
        priority=draw.choice([0, 0, 0, 1]),
        deadline=time.monotonic() + draw.choice([0.0, 60.0]) if draw.random() < 0.1 else None,
    )
