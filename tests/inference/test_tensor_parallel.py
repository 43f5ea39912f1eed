"""Ranks that compute together: the same tokens as one rank alone, cut as PyTorch's own plan cuts, deciding alike."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from tests.inference.engine.test_engine import (
    ARCHITECTURES,
    GREEDY,
    OPTIONS,
    RECOMPUTING,
    SWAPPING,
    TINY,
    VOCAB_SIZE,
    check_idle,
    decoder,
    expected,
    ids,
    pages_nbytes,
    prompts,
    requests,
)
from tests.inference.weights import test_weights
from tests.ranks import RankError, run_ranks
from yafsdp_like.comm.choice import transport_of
from yafsdp_like.comm.tp_group import world_tp_group
from yafsdp_like.hardware import H200
from yafsdp_like.inference.engine import engine as engine_module
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.forward import _range_of
from yafsdp_like.inference.engine.request import FinishReason, Request, Token
from yafsdp_like.inference.engine.runner import Runner
from yafsdp_like.inference.kv.eviction import Costs
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.serving_plan import Site, plan_serving
from yafsdp_like.inference.weights.loading import load, model_of, site_of, world_transport
from yafsdp_like.inference.weights.store import Weights, reserve
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.memory.layout import aligned
from yafsdp_like.models import PRESETS, Decoder, DecoderConfig, ExpertsConfig
from yafsdp_like.models.hf import save_hf
from yafsdp_like.models.tensor_parallel import cuts_of, parallelize, share_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from yafsdp_like.comm import TransportName
    from yafsdp_like.inference.engine.metrics import Metrics

CPU = torch.device("cpu")
CUT = [name for name in ARCHITECTURES if name != "multi-query"]
EVERYTHING = replace(
    TINY, qk_norm=True, custom_head_dim=12, qkv_bias=True, o_bias=True, ffn_bias=True, tie_embeddings=True
)
EXPERTS = replace(TINY, qk_norm=True, experts=ExpertsConfig(5, 2), dense_layers=(1,), dense_ffn_dim=24)
ALL_EXPERTS = replace(EXPERTS, dense_layers=(), dense_ffn_dim=None)
IN_THREE = replace(TINY, dim=36, num_heads=6, num_kv_heads=3, ffn_dim=48)
DRAWN = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2, seed=5)
LIMITS = EngineOptions(kv_nbytes=1 << 20, max_batch_size=4, max_batch_tokens=32, max_seq_len=64)


@dataclass(frozen=True)
class Served:
    """What one rank was told."""

    tokens: dict[str, tuple[Token, ...]]
    metrics: Metrics

    @property
    def ids(self) -> dict[str, list[int]]:
        return {name: [token.id for token in tokens] for name, tokens in self.tokens.items()}


def engine_together(config: DecoderConfig, options: EngineOptions, asked: TransportName = "auto") -> Engine:
    """This rank's, of all ranks that there are."""
    transport = world_transport(CPU, asked)
    return Engine.load(model_of(decoder(config)), options, mode="tensor_parallel", transport=transport)


def serve_together(
    config: DecoderConfig, options: EngineOptions, rounds: Sequence[list[Request]], asked: TransportName = "auto"
) -> Served:
    """All rounds, one after the other, by one engine a rank."""
    it = engine_together(config, options, asked)
    done = {name: c.tokens for round_ in rounds for name, c in it.generate(round_).items()}
    check_idle(it)
    it._weights.close()
    return Served(done, it.metrics())


def serve_alone(config: DecoderConfig, options: EngineOptions, rounds: Sequence[list[Request]]) -> Served:
    it = Engine.load(model_of(decoder(config)), options)
    return Served({name: c.tokens for round_ in rounds for name, c in it.generate(round_).items()}, it.metrics())


# --- the same tokens ---


@pytest.mark.parametrize("name", CUT)
def test_ranks_together_draw_the_tokens_of_one_alone(name: str) -> None:
    config, options, texts = ARCHITECTURES[name], replace(OPTIONS, kv_nbytes=1 << 20), prompts(8)
    results = run_ranks(serve_together, config, options, [requests(texts)])
    assert [served.ids for served in results] == [serve_alone(config, options, [requests(texts)]).ids] * 2
    assert results[0].ids == {str(i): expected(config, text) for i, text in enumerate(texts)}
    assert all(served.metrics.num_chunks > 0 for served in results)


@pytest.mark.parametrize(
    ("config", "world_size"),
    [(IN_THREE, 3), (EVERYTHING, 2), (EXPERTS, 2)],
    ids=["three ranks", "everything", "experts"],
)
def test_other_numbers_of_ranks_and_all_options_at_once_do_too(config: DecoderConfig, world_size: int) -> None:
    options, texts = replace(OPTIONS, kv_nbytes=1 << 20), prompts(5, seed=2)
    results = run_ranks(serve_together, config, options, [requests(texts)], world_size=world_size)
    wanted = {str(i): expected(config, text) for i, text in enumerate(texts)}
    assert [served.ids for served in results] == [wanted] * world_size


@pytest.mark.slow(unless=lambda name, lookahead: lookahead or name == "grouped queries")
@pytest.mark.parametrize("name", ["grouped queries", "windows in one layer of three"])
@pytest.mark.parametrize("costs", [SWAPPING, RECOMPUTING], ids=["swap", "recompute"])
@pytest.mark.parametrize("lookahead", [True, False], ids=["ahead", "in step"])
def test_tokens_are_the_same_after_preemptions(name: str, costs: Costs, lookahead: bool) -> None:
    """Pages of fewer heads are smaller: as many as one rank alone would have take half of the bytes."""
    config = ARCHITECTURES[name]
    options = replace(OPTIONS, kv_nbytes=pages_nbytes(share_of(config, 2), 16), costs=costs, lookahead=lookahead)
    texts = prompts(8, longest=22)
    results = run_ranks(serve_together, config, options, [requests(texts, max_tokens=20)])
    wanted = {str(i): expected(config, text, 20) for i, text in enumerate(texts)}
    assert [served.ids for served in results] == [wanted] * 2
    metrics = results[0].metrics
    assert metrics == results[1].metrics
    assert (metrics.num_swapped_out if costs is SWAPPING else metrics.num_recomputed) > 0


def serve_drafted(config: DecoderConfig, options: EngineOptions, rounds: Sequence[list[Request]]) -> Served:
    """On ranks of which only the first finds that rows of drafts cost nothing."""
    times = {1: 1.0, 128: 1.0 if dist.get_rank() == 0 else 1e3}
    with mock.patch.object(Runner, "measure_decoding", lambda self: times):
        return serve_together(config, options, rounds)


def test_ranks_draft_alike_by_the_first_ones_measurement() -> None:
    options, texts = replace(OPTIONS, kv_nbytes=1 << 20, speculate="prompt-lookup"), [(5, 6, 7, 8) * 5, (1, 2) * 9]
    results = run_ranks(serve_drafted, TINY, options, [requests(texts, max_tokens=24)])
    wanted = {str(i): expected(TINY, text, 24) for i, text in enumerate(texts)}
    assert [served.ids for served in results] == [wanted] * 2
    assert results[0].metrics == results[1].metrics
    assert results[0].metrics.num_tokens_drafted > 0


def serve_with_other_times(config: DecoderConfig, options: EngineOptions, rounds: Sequence[list[Request]]) -> Served:
    """As measured by ranks of which the first is fast and the others are slow."""
    times = {128: 1e-4 if dist.get_rank() == 0 else 10.0}
    with mock.patch.object(Runner, "measure_steps", lambda runner: times):
        return serve_together(config, options, rounds)


def test_ranks_choose_the_chunks_of_a_target_by_the_first_ones_times() -> None:
    """Prevents: ranks that compute together, and steps of different sizes, by clocks of their own."""
    options = replace(OPTIONS, kv_nbytes=1 << 20, max_batch_tokens=128, max_seq_len=128, tpot_ms=1.0)
    texts = [text * 4 for text in prompts(8, longest=28, seed=7)]
    first, second = run_ranks(serve_with_other_times, TINY, options, [requests(texts)])
    assert first.ids == second.ids == {str(i): expected(TINY, text) for i, text in enumerate(texts)}
    assert first.metrics == second.metrics and first.metrics.num_chunks > 0


def test_a_shared_beginning_is_computed_once_on_all_ranks() -> None:
    start = prompts(1, longest=1)[0] * 21
    texts = [(*start, i) for i in range(4)]
    first, rest = requests(texts[:1]), [replace(r, id=f"again {r.id}") for r in requests(texts)]
    for served in run_ranks(serve_together, TINY, OPTIONS, [first, rest]):
        assert [served.ids[f"again {i}"] for i in range(4)] == [expected(TINY, text) for text in texts]
        assert served.metrics.num_tokens_cached == 80


def test_drawn_tokens_and_their_log_probabilities_are_the_same_on_all_ranks() -> None:
    """To the last bit between ranks, who must never part; to rounding with one rank alone."""
    asked = [
        Request(str(i), text, replace(DRAWN, seed=i), 12, num_logprobs=i) for i, text in enumerate(prompts(5, seed=4))
    ]
    first, second = run_ranks(serve_together, TINY, OPTIONS, [asked])
    assert first == second
    alone = serve_alone(TINY, OPTIONS, [asked])
    assert first.ids == alone.ids
    for name, tokens in first.tokens.items():
        assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in alone.tokens[name]], abs=1e-4)


def test_any_transport_of_all_ranks_will_do() -> None:
    rounds = [requests(prompts(2))]
    results = run_ranks(serve_together, TINY, OPTIONS, rounds, "peer")
    assert [served.ids for served in results] == [serve_alone(TINY, OPTIONS, rounds).ids] * 2


def test_every_token_of_the_vocabulary_is_of_one_rank() -> None:
    for vocab_size in (1, 97, 512, 49_152):
        for num_ranks in (2, 3, 8):
            found = [range(vocab_size)[_range_of(vocab_size, rank, num_ranks)] for rank in range(num_ranks)]
            assert [token for tokens in found for token in tokens] == [*range(vocab_size)]


# --- what ranks decide alike ---


def costs_that_differ() -> tuple[Costs, dict[str, list[int]]]:
    """What an engine takes for its costs, and what it then serves; each rank measures, all together, something else."""
    rank, measure = dist.get_rank(), Runner.measure

    def measured(it: Runner) -> Costs:
        assert measure(it).prefill_tokens_per_s > 0
        return Costs(1.0 + rank, 2.0 + rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "measure", measured)
        it = engine_together(TINY, replace(OPTIONS, costs=None))
    return it.cache.costs, ids(it.generate(requests(prompts(3))))


def test_costs_are_those_that_the_first_rank_has_measured() -> None:
    wanted = {str(i): expected(TINY, text) for i, text in enumerate(prompts(3))}
    assert run_ranks(costs_that_differ) == [(Costs(1.0, 2.0), wanted)] * 2


def serve_by_clocks_that_differ(seconds: float) -> tuple[dict[str, FinishReason], dict[str, int], int]:
    """Ends, numbers of tokens, and how often the clock was told; "a" has a deadline so many seconds from now on."""
    rank, rounds = dist.get_rank(), 0
    it = engine_together(TINY, OPTIONS)
    first = world_tp_group().broadcast

    def told(value: Any) -> Any:
        nonlocal rounds
        rounds += 1
        return first(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module.time, "monotonic", lambda now=time.monotonic: now() + 1e6 * rank)
        patch.setattr(it.tp_group, "broadcast", told)
        text = prompts(1)[0]
        deadline = time.monotonic() + seconds
        asked = [Request("a", text, GREEDY, 8, deadline=deadline), Request("b", text, GREEDY, 8)]
        done = it.generate(asked)
    check_idle(it)
    return {n: c.finish for n, c in done.items()}, {n: len(c.tokens) for n, c in done.items()}, rounds


@pytest.mark.parametrize(
    ("seconds", "finish", "num_tokens"), [(-1.0, FinishReason.DEADLINE, 0), (3600.0, FinishReason.LENGTH, 8)]
)
def test_deadlines_go_by_the_first_ranks_clock(seconds: float, finish: FinishReason, num_tokens: int) -> None:
    """Prevents: a rank that drops a request which the others still compute, and then waits for them forever."""
    first, second = run_ranks(serve_by_clocks_that_differ, seconds)
    assert first == second
    assert first[:2] == ({"a": finish, "b": FinishReason.LENGTH}, {"a": num_tokens, "b": 8})
    assert first[2] > 1


def step_with_cancellations() -> list[tuple[str, int, FinishReason | None]]:
    """Requests come and go between steps, in the same places on all ranks; no clock is asked."""
    it = engine_together(TINY, OPTIONS)
    assert it.tp_group is not None
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(it.tp_group, "broadcast", lambda value: pytest.fail("a step without deadlines must not meet"))
        for number, request in enumerate(requests(prompts(6), max_tokens=9)):
            it.add(request)
            told += [(e.request_id, len(e.tokens), e.finish) for e in it.step()]
            if number % 2:
                it.cancel(request.id)
        while it.has_work:
            told += [(e.request_id, len(e.tokens), e.finish) for e in it.step()]
    check_idle(it)
    return told


def test_requests_may_come_and_go_between_steps() -> None:
    first, second = run_ranks(step_with_cancellations)
    assert first == second
    finished = {name: finish for name, _, finish in first if finish is not None}
    assert [finished[str(i)] for i in range(6)] == [FinishReason.LENGTH, FinishReason.CANCELLED] * 3


def serve_different(what: str) -> None:
    rank = dist.get_rank()
    options = replace(OPTIONS, policy="gdsf" if what == "options" and rank else "lru")
    text = (1, 2, 3 + rank) if what == "requests" else (1, 2, 3)
    engine_together(TINY, options).generate([Request("a", text, GREEDY)])


@pytest.mark.parametrize("what", ["options", "requests"])
def test_what_must_be_the_same_on_all_ranks_is_compared(what: str) -> None:
    """Prevents: ranks that wait for each other in different sums."""
    with pytest.raises(RankError) as failed:
        run_ranks(serve_different, what)
    assert len(failed.value.errors) == 2
    for kind, message in failed.value.errors.values():
        assert kind == "RuntimeError"
        assert f"{what} " in message.replace("options of engines", "options") and "those of [1] differ" in message


# --- the cut ---


def part_of(tensor: Tensor, dim: int) -> Tensor:
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def differences(weights: Weights, module: Decoder) -> list[str]:
    """Of this rank's layers, embedding and head from its parts of ``module``."""
    whole, found = test_weights, []
    if not torch.equal(weights.embedding(), module.embed_tokens.weight.to(weights.dtype)):
        found.append("embedding")
    for index, layer in enumerate(module.layers):
        attention, ffn, wanted = layer.self_attn, layer.mlp, whole.expected(module, index)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        mine = replace(
            wanted,
            qkv=torch.cat([part_of(p.weight, 0) for p in projections]),
            o=part_of(attention.o_proj.weight, 1),
            gate_up=torch.cat([part_of(p.weight, 0) for p in (ffn.gate_proj, ffn.up_proj)]),
            down=part_of(ffn.down_proj.weight, 1),
            qkv_bias=torch.cat([part_of(p.bias, 0) for p in projections]) if module.config.qkv_bias else None,
            gate_up_bias=torch.cat([part_of(p.bias, 0) for p in (ffn.gate_proj, ffn.up_proj)])
            if module.config.ffn_bias
            else None,
        )
        there = weights.layer(index)
        found += [
            f"{index} {f.name}" for f in fields(mine) if not whole.same(getattr(there, f.name), getattr(mine, f.name))
        ]
        weights.release(index)
    norm, head = weights.head()
    if not (whole.same(norm, module.norm.weight) and whole.same(head, module.lm_head.weight)):
        found.append("head")
    return found


def load_parts(model: Any, config: DecoderConfig, dtype: torch.dtype) -> tuple[list[str], Any]:
    """What differs from the parts of a decoder of the same values; of "preset:tiny", from its first ones."""
    module = Decoder(config) if isinstance(model, str) and model.startswith("preset:") else test_weights.decoder(config)
    model = model_of(module) if model is None else model
    weights = load(model, LIMITS, dtype=dtype, mode="tensor_parallel", transport=world_transport(CPU))
    assert weights.arena.nbytes == weights.plan.memory.nbytes
    return differences(weights, module), (weights.graphable, weights.lockstep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [TINY, EVERYTHING], ids=["plain", "everything"])
def test_a_rank_keeps_rows_of_what_leads_into_heads_and_columns_of_what_leads_out(
    config: DecoderConfig, dtype: torch.dtype
) -> None:
    assert run_ranks(load_parts, None, config, dtype) == [([], (True, True))] * 2


def test_parts_come_out_of_files_and_random_values(tmp_path: Path) -> None:
    biased = replace(TINY, qkv_bias=True, tie_embeddings=True)
    save_hf(test_weights.decoder(biased), tmp_path, max_file_nbytes=20_000)
    for model, config in ((str(tmp_path), biased), ("preset:tiny", PRESETS["tiny"])):
        assert [found for found, _ in run_ranks(load_parts, model, config, torch.float32)] == [[], []]


def train_both_ways(config: DecoderConfig) -> tuple[float, dict[str, float], dict[str, tuple[int, int]]]:
    """The largest difference of logits, of each gradient, and how parameters of the first block are cut."""
    assert cuts_of(config, dist.get_world_size())
    plain, cut = decoder(config), Decoder(config)
    cut.load_state_dict(plain.state_dict())
    parallelize(cut, init_device_mesh("cpu", (dist.get_world_size(),)))
    tokens = torch.arange(24).view(2, 12) * 7 % VOCAB_SIZE
    plain.zero_grad()
    for model in (plain, cut):
        model(tokens, tokens.roll(1)).backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    worst = {n: float((whole(p.grad) - gradients[n]).abs().max()) for n, p in cut.named_parameters()}
    placed = {name: p for name, p in cut.layers[0].named_parameters() if isinstance(p, DTensor)}
    dims = {n: (p.placements[0].dim, p.to_local().numel()) for n, p in placed.items() if p.placements[0].is_shard()}
    with torch.no_grad():
        return float((cut(tokens) - plain(tokens)).abs().max()), worst, dims


def whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.redistribute(placements=[Replicate()]).to_local() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize("config", [TINY, EVERYTHING, ALL_EXPERTS], ids=["plain", "everything", "experts"])
def test_the_plan_that_cuts_served_weights_cuts_the_training_module_too(config: DecoderConfig) -> None:
    """The same logits and gradients as uncut, and the same parts as served ones.

    Prevents: a mesh that cannot send, of the integers, taken for the module's.
    """
    shapes = {name: p.shape for name, p in Decoder(config).layers[0].named_parameters()}
    cuts = {name: (cut.dim, torch.Size(cut.part(shapes[name])).numel()) for name, cut in cuts_of(config, 2).items()}
    assert len(cuts) == (12 if config.qkv_bias else 7)
    for logits, gradients, dims in run_ranks(train_both_ways, config):
        assert logits < 1e-4 and max(gradients.values()) < 1e-4
        assert dims == cuts


# --- the plan ---

CHAIN = DecoderConfig(64, 12, 4, 2, 176, vocab_size=4096, qkv_bias=True)


def test_the_plan_is_that_of_a_decoder_of_fewer_heads_but_for_embedding_and_head() -> None:
    whole_plan, plan = (
        plan_serving(CHAIN, LIMITS, Site(num_ranks=2), mode)
        for mode in ("resident", "tensor_parallel")  # type: ignore[arg-type]
    )
    d, f, v = 64, 176, 4096
    qkv, o, gate_up, down = 2 * 64 * d, 2 * d * 32, 2 * f * d, 2 * d * f // 2  # bytes: half of the heads, half of F
    layer = aligned(2 * d) + qkv + aligned(2 * 64) + o + aligned(2 * d) + gate_up + down  # with norms and biases
    assert plan.placement.packed_units[1].nbytes == layer
    assert plan.memory.nbytes_of("weights") == 12 * layer + 2 * (2 * v * d) + aligned(2 * d)
    page, whole_page = plan.groups[0].shape.nbytes, whole_plan.groups[0].shape.nbytes
    assert (plan.groups[0].shape.num_kv_heads, page) == (1, whole_page // 2)
    assert plan.num_context_tokens == 2 * whole_plan.num_context_tokens
    shapes = {name: plan.buffers.buffers[name].shape for name in ("hidden", "qkv", "attended", "gate_up", "logits")}
    assert shapes == {"hidden": (32, d), "qkv": (32, 64), "attended": (32, 32), "gate_up": (32, f), "logits": (4, v)}
    kinds = ("weights", "kv slabs", "workspace", "logits", "tables")
    assert plan.memory.nbytes == sum(plan.memory.nbytes_of(kind) for kind in kinds)


def test_the_plan_says_the_mode_and_why_and_is_never_chosen_by_itself() -> None:
    site = Site(num_ranks=2, hardware=H200)
    limits = EngineOptions(memory_limit_nbytes=140 << 30, max_batch_size=4, max_batch_tokens=64)
    assert plan_serving(PRESETS["8b"], limits, site).mode == "resident"
    plan = plan_serving(PRESETS["8b"], limits, site, "tensor_parallel")
    assert plan.reasons[0] == (
        "tensor_parallel: 2 ranks compute every step together, as asked for: each has 16 of 32 heads, 4 of 8 of keys "
        "and values, 7,168 of 14,336 of the feed-forward, and 9,081,200,640 of 16,060,522,496 bytes of weights"
    )
    assert "over process group: sums" in str(plan)
    assert "all ranks serve the same requests in the same steps" in str(plan)
    layers_and_half_a_head = 9_081_200_640 - 128_256 * 4096 * 2 * 3 // 2
    assert f"takes {1e3 * layers_and_half_a_head / 4.25e12:.1f} ms at least" in str(plan)


def test_what_does_not_fit_says_what_would() -> None:
    limits = EngineOptions(memory_limit_nbytes=8 << 30, max_seq_len=4096)
    with pytest.raises(ValueError, match=r"9,081,200,640 for weights \(tensor_parallel\)"):
        plan_serving(PRESETS["8b"], limits, Site(num_ranks=2), "tensor_parallel")


@pytest.mark.parametrize(
    ("config", "num_ranks", "told"),
    [
        (TINY, 1, "at least two ranks, found one"),
        (ARCHITECTURES["multi-query"], 2, "multiples of 2, found num_kv_heads 1; use fewer ranks"),
        (TINY, 4, "multiples of 4, found num_kv_heads 2"),
        (replace(TINY, num_heads=3, num_kv_heads=3, dim=36), 2, "found num_heads 3"),
        (replace(TINY, ffn_dim=63), 2, "found ffn_dim 63"),
        (replace(EXPERTS, dense_ffn_dim=25), 2, "found dense_ffn_dim 25"),
    ],
)
def test_what_cannot_be_cut_evenly_is_refused(config: DecoderConfig, num_ranks: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plan_serving(config, LIMITS, Site(num_ranks=num_ranks), "tensor_parallel")


def reserve_by_other_ranks() -> list[str]:
    told = []
    transport = transport_of(world_group(), CPU, "process_group")
    alone = transport_of(dist.new_group([dist.get_rank()], use_local_synchronization=True), CPU, "process_group")
    for num_ranks, offered in ((2, None), (2, alone), (4, transport)):
        site = replace(site_of(CPU, None, transport), num_ranks=num_ranks)
        plan = plan_serving(replace(TINY, num_heads=8, num_kv_heads=4), LIMITS, site, "tensor_parallel")
        with pytest.raises(ValueError, match=r".") as refused:
            reserve(plan, CPU, offered)
        told.append(str(refused.value))
    return told


def world_group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def test_a_transport_of_other_ranks_is_refused() -> None:
    for none, alone, other in run_ranks(reserve_by_other_ranks):
        assert "a tensor_parallel plan needs the transport of its ranks" in none
        assert "takes all 2 ranks, found those of 1" in alone
        assert "the plan is for 4 ranks" in other and "of 2" in other


# --- on GPUs ---


def serve_on_gpus(graphs: bool) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
    """Together, alone, and how many sizes of steps are recorded."""
    device = torch.device("cuda", torch.cuda.current_device())
    options = replace(OPTIONS, kv_nbytes=1 << 20, graphs=graphs)
    transport = world_transport(device)
    engines = [
        Engine.load(model_of(decoder(TINY)), options, device=device, dtype=torch.float32, **how)
        for how in ({"mode": "tensor_parallel", "transport": transport}, {"mode": "resident"})
    ]
    together, alone = (ids(it.generate(requests(prompts(8)))) for it in engines)
    return together, alone, len(engines[0]._runner._recordings)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_gpus_together_draw_the_tokens_of_one_alone(graphs: bool) -> None:
    """With graphs, the sums are in them."""
    for together, alone, num_recorded in run_ranks(serve_on_gpus, graphs, device="cuda", timeout=120):
        assert together == alone
        assert bool(num_recorded) == graphs
