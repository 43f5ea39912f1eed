"""Served weights: the same values as the decoder's, wherever they lie between, from every source, in stream order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.clocks import RaceDetector, VectorClocks
from tests.ranks import RankError, run_ranks
from yafsdp_like.comm.choice import transport_of
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.serving_plan import ServingPlan, plan_serving
from yafsdp_like.inference.weights import store as weights_module
from yafsdp_like.inference.weights.loading import load, load_planned, model_of, site_of
from yafsdp_like.inference.weights.store import LayerWeights, Weights, reserve
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.memory.layout import Segment
from yafsdp_like.memory.streams import COMPUTE, GATHER
from yafsdp_like.models import Decoder, DecoderConfig, ExpertsConfig

if TYPE_CHECKING:
    from yafsdp_like.comm.transport import Transport

CPU = torch.device("cpu")
LIMITS = EngineOptions(kv_nbytes=1 << 20, max_batch_size=2, max_batch_tokens=8, max_seq_len=32)
CONFIG = DecoderConfig(48, 5, 4, 2, 40, vocab_size=301, max_seq_len=64)
CONFIGS = {
    "grouped-query": CONFIG,
    "multi-head": replace(CONFIG, num_kv_heads=4),
    "multi-query, biases": replace(CONFIG, num_kv_heads=1, qkv_bias=True),
    "normed, wide heads": replace(CONFIG, custom_head_dim=18, qk_norm=True),
    "tied": replace(CONFIG, tie_embeddings=True),
    "one layer, tied": replace(CONFIG, num_layers=1, tie_embeddings=True),
    "experts": replace(CONFIG, experts=ExpertsConfig(3, 2), dense_layers=(1,), dense_ffn_dim=20),
    "two layers, large vocabulary": replace(CONFIG, num_layers=2, vocab_size=2000),
}


def decoder(config: DecoderConfig = CONFIG) -> Decoder:
    """Every value another: none of them would do in another's place."""
    module = Decoder(config)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) % 1021 + 1021 * index)
    return module


def expected(module: Decoder, index: int) -> LayerWeights:
    """What ``layer(index)`` must hold, by concatenation."""
    layer, attention, ffn = module.layers[index], module.layers[index].self_attn, module.layers[index].mlp
    config, names = module.config.of_layer(index), ("gate_proj", "up_proj", "down_proj")
    feed = [getattr(ffn, name).weight if config.experts is None else getattr(ffn.experts, name) for name in names]
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return LayerWeights(
        layer.input_layernorm.weight,
        torch.cat([p.weight for p in projections]),
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        torch.cat(feed[:2]),
        feed[2],
        torch.cat([p.bias for p in projections]) if config.qkv_bias else None,
        attention.q_norm.weight if config.qk_norm else None,
        attention.k_norm.weight if config.qk_norm else None,
        None if config.experts is None else ffn.gate.weight,
        attention.o_proj.bias,
        torch.cat([ffn.gate_proj.bias, ffn.up_proj.bias]) if config.ffn_bias else None,
        ffn.down_proj.bias if config.ffn_bias else None,
    )


def same(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return found.shape == wanted.shape and torch.equal(found, wanted.to(found.device, found.dtype))


def differences(weights: Weights, module: Decoder) -> list[str]:
    """One forward: every unit is compared while it may be read, and nothing else may be."""
    found = []
    if not same(weights.embedding(), module.embed_tokens.weight):
        found.append("embedding")
    for index in range(module.config.num_layers):
        layer, wanted = weights.layer(index), expected(module, index)
        found += [
            f"{index} {f.name}" for f in fields(layer) if not same(getattr(layer, f.name), getattr(wanted, f.name))
        ]
        weights.release(index)
    norm, head = weights.head()
    if not (same(norm, module.norm.weight) and same(head, module.lm_head.weight)):
        found.append("head")
    return found


def with_moved(plan: ServingPlan, moved: Sequence[int]) -> ServingPlan:
    """The plan with these units moved, whichever it chose."""
    return replace(plan, placement=replace(plan.placement, non_resident=frozenset(moved)))


def streamed(config: DecoderConfig, moved: Sequence[int] | None = None) -> ServingPlan:
    plan = plan_serving(config, LIMITS, site_of(CPU), "streamed")
    return with_moved(plan, range(len(plan.placement.packed_units)) if moved is None else moved)


# --- resident ---


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_weights_are_the_decoders(name: str, dtype: torch.dtype) -> None:
    module = decoder(CONFIGS[name])
    weights = load(model_of(module), LIMITS, dtype=dtype)
    assert differences(weights, module) == []
    assert (weights.graphable, weights.lockstep, weights.dtype) == (True, False, dtype)
    assert weights.arena.nbytes == weights.plan.memory.nbytes


def test_the_plans_buffers_lie_in_the_arena_and_apart_from_the_weights() -> None:
    module = decoder()
    weights = load(model_of(module), LIMITS)
    tensors = weights.plan.buffers.tensors(weights.arena.place)
    found = {name: tensor for group in vars(tensors).values() for name, tensor in vars(group).items()}
    assert found.keys() == weights.plan.buffers.buffers.keys()
    for name, buffer in weights.plan.buffers.buffers.items():
        tensor = found[name]
        assert (tensor.shape, tensor.dtype) == (buffer.shape, buffer.dtype)
        tensor.fill_(1)
    weights.arena.place("kv slabs").tensor(torch.uint8, (weights.plan.grid.region_nbytes,)).fill_(1)
    assert differences(weights, module) == []


# --- streamed ---


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_weights_are_the_decoders_in_every_forward(name: str) -> None:
    module = decoder(CONFIGS[name])
    weights = load_planned(model_of(module), streamed(module.config), CPU)
    assert [differences(weights, module) for _ in range(3)] == [[], [], []]
    assert (weights.graphable, weights.lockstep) == (True, False)
    assert weights.arena.nbytes == weights.plan.memory.nbytes
    assert weights.host.nbytes == weights.plan.host.nbytes


@pytest.mark.parametrize("moved", [[3], [1, 4], [2, 4], [0, 3], [0, 6], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]])
def test_some_units_may_stay_while_others_are_streamed(moved: list[int]) -> None:
    module = decoder()
    weights = load_planned(model_of(module), streamed(CONFIG, moved), CPU)
    assert [differences(weights, module) for _ in range(3)] == [[], [], []]


class Prefetched(TorchDispatchMode):
    """The names of operations, while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_forward_brings_each_moved_unit_once_by_one_copy_and_does_nothing_else() -> None:
    """Prevents: an allocation in a step, and a tied head that is prefetched a second time as the embedding."""
    for config, num_moved in ((CONFIG, 7), (replace(CONFIG, tie_embeddings=True), 6)):
        module = decoder(config)
        weights = load_planned(model_of(module), streamed(config), CPU)
        differences(weights, module)
        with Prefetched() as prefetched:
            run_forward(weights)
        assert prefetched.operations == ["aten.copy_.default"] * num_moved


def run_forward(weights: Weights, read: Callable[[Tensor], Any] = lambda tensor: None) -> None:
    read(weights.embedding())
    for index in range(weights.config.num_layers):
        read(weights.layer(index).qkv)
        read(weights.layer(index).down)
        weights.release(index)
    for tensor in weights.head():
        read(tensor)


@pytest.mark.parametrize("moved", [range(7), [1, 2, 3, 4, 5], [1, 2, 4, 5], [0, 2, 3, 5]])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("same_residency", [False, True])
def test_every_access_to_a_slot_is_ordered_by_an_event(moved: Sequence[int], tied: bool, same_residency: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    found = raced(streamed(config, [unit for unit in moved if unit < 6 or not tied]), same_residency=same_residency)
    assert found.races == []
    assert found.num_copies >= 4 * 3, "the detector has seen no copies"


@pytest.mark.parametrize("forgotten", [(COMPUTE, GATHER), (GATHER, COMPUTE)])
def test_a_wait_that_is_left_out_is_found(forgotten: tuple[str, str]) -> None:
    assert raced(streamed(CONFIG), [forgotten]).races


@dataclass(frozen=True)
class Raced:
    """What one run under vector clocks showed."""

    races: list[str]
    num_copies: int


def raced(plan: ServingPlan, forgets: Sequence[tuple[str, str]] = (), same_residency: bool = False) -> Raced:
    """Three forwards, after one that warms up; perhaps from the same residency to the same."""
    clocks = VectorClocks(forgets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "streams_of", lambda device: clocks)
        weights = load_planned(model_of(decoder(plan.config)), plan, CPU)
    detector, prefetched = RaceDetector(clocks), Prefetched()
    slots = weights.arena.place("weight slots")
    detector.watch(slots.tensor(torch.uint8, (slots.segment.nbytes,)))
    with detector:
        run_forward(weights, torch.Tensor.sum)
        with prefetched:
            for _ in range(3):
                if same_residency:
                    weights.reset_residency()
                run_forward(weights, torch.Tensor.sum)
    return Raced(detector.races, prefetched.operations.count("aten.copy_.default"))


def test_units_are_brought_as_soon_as_their_bytes_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is issued, as a literal list: beside the head two layers of the next forward are prefetched."""
    plan = streamed(replace(CONFIG, num_layers=4), [1, 2, 3, 4])
    weights = load_planned(model_of(decoder(plan.config)), plan, CPU)
    issued: list[str] = []
    for unit, slot in weights._slots.items():
        monkeypatch.setattr(slot, "copy_in", lambda unit=unit: issued.append(f"prefetch {unit}"))
    for _ in range(2):
        weights.embedding()
        for index in range(4):
            weights.layer(index)
            issued.append(f"layer {1 + index}")
            weights.release(index)
        weights.head()
        issued.append("head")
    forward = [
        "layer 1",
        "prefetch 3",
        "layer 2",
        "prefetch 4",
        "layer 3",
        "prefetch 1",
        "layer 4",
        "prefetch 2",
        "head",
    ]
    assert issued == ["prefetch 1", "prefetch 2", *forward, *forward]


def test_a_layer_that_is_never_released_is_an_error_that_names_it() -> None:
    weights = load_planned(model_of(decoder()), streamed(CONFIG, range(1, 6)), CPU)
    weights.embedding()
    weights.layer(0)
    weights.layer(1)
    with pytest.raises(RuntimeError, match=r"'layers\.2' needs the bytes of 'layers\.0', which has not been released"):
        weights.layer(2)


@pytest.mark.parametrize("moved", [range(7), [1, 2, 3, 4, 5], [1, 3, 5], [0, 6], [3]])
@pytest.mark.parametrize(("tied", "vocab_size"), [(False, 301), (True, 301), (False, 60)])
def test_weights_same_residency_are_the_same_whatever_came_before(
    moved: Sequence[int], tied: bool, vocab_size: int
) -> None:
    """Prevents: a recorded forward that relies on a unit which another forward has left there, or has not.

    A small head may lie where nothing that is kept for the next forward does.
    """
    module = decoder(replace(CONFIG, tie_embeddings=tied, vocab_size=vocab_size))
    weights = load_planned(model_of(module), streamed(module.config, [u for u in moved if u < 6 or not tied]), CPU)
    found = set()
    for layers_done in (0, 2, 3, 5):  # a forward that failed there, or was whole
        weights.embedding()
        for index in range(layers_done):
            weights.layer(index)
            weights.release(index)
        if layers_done < 5:
            weights.layer(layers_done)
        else:
            weights.head()
        weights.reset_residency()
        found.add(tuple(slot.name for slot in weights._slots.values() if slot.is_resident))
        assert not any(slot.in_use for slot in weights._slots.values())
        assert differences(weights, module) == []
    assert len(found) == 1


class Recorded(TorchDispatchMode):
    """What was done while entered, to be done again without Python, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._done.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        for operation in self._done:
            operation()


@pytest.mark.parametrize("moved", [range(7), [1, 2, 3, 4, 5], [1, 3, 5], [0, 6], [3]])
@pytest.mark.parametrize("tied", [False, True])
def test_a_replayed_forward_reads_the_right_values_whatever_came_before(moved: Sequence[int], tied: bool) -> None:
    """Bytes of units that are not resident then are lost before a replay: it must not rely on them."""
    module = decoder(replace(CONFIG, tie_embeddings=tied))
    weights = load_planned(model_of(module), streamed(module.config, [u for u in moved if u < 6 or not tied]), CPU)
    read: list[Tensor] = []
    run_forward(weights, lambda tensor: read.append(tensor.clone()))
    found = [torch.empty_like(tensor) for tensor in read]
    weights.reset_residency()
    recorded, place = Recorded(), iter(found)
    with recorded:
        run_forward(weights, lambda tensor: next(place).copy_(tensor))
        weights.reset_residency()
    for layers_done in (5, 2, 0):
        weights.embedding()
        for index in range(layers_done):
            weights.layer(index)
            weights.release(index)
        weights.reset_residency()
        for slot in weights._slots.values():
            if not slot.is_resident and not any(other.is_resident for other in slot.neighbours):
                slot.extent.tensor(torch.uint8, (slot.extent.segment.nbytes,)).fill_(0xFF)
        for tensor in found:
            tensor.zero_()
        recorded.replay()
        assert all(torch.equal(again, once) for again, once in zip(found, read, strict=True))


def test_a_forward_from_rest_to_rest_brings_each_unit_once() -> None:
    """So that a recording costs no copy more than a forward that is not recorded."""
    for config, num_moved in ((CONFIG, 7), (replace(CONFIG, tie_embeddings=True), 6)):
        weights = load_planned(model_of(decoder(config)), streamed(config), CPU)
        weights.reset_residency()
        with Prefetched() as prefetched:
            run_forward(weights)
            weights.reset_residency()
            weights.reset_residency()
        assert prefetched.operations == ["aten.copy_.default"] * num_moved


def test_a_forward_after_one_that_failed_reads_the_right_values() -> None:
    module = decoder()
    for failing in range(5):
        weights = load_planned(model_of(module), streamed(CONFIG), CPU)
        weights.embedding()
        for index in range(failing + 1):
            weights.layer(index)
            if index < failing:
                weights.release(index)
        assert differences(weights, module) == []


# --- gathered ---


def gathered_differences(name: str, asked: Any, moved: list[int] | None, forwards_by_rank: list[int]) -> Any:
    """On each rank: what differs, and what the weights say of themselves."""
    module = decoder(CONFIGS[name])
    transport = transport_of(group(), CPU, asked)
    plan = plan_serving(module.config, LIMITS, site_of(CPU, None, transport), "gathered")
    plan = with_moved(plan, range(len(plan.placement.packed_units)) if moved is None else moved)
    weights = load_planned(model_of(module), plan, CPU, transport)
    found = [differences(weights, module) for _ in range(forwards_by_rank[transport.rank])]
    weights.close()
    assert weights.arena.nbytes == plan.memory.nbytes
    return found, weights.lockstep, weights.graphable


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@pytest.mark.parametrize("asked", ["process_group", "peer"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", ["grouped-query", "normed, wide heads", "tied", "experts"])
def test_gathered_weights_are_the_decoders_in_every_forward(name: str, world_size: int, asked: str) -> None:
    """Cut wherever a part ends, also in the middle of a row, and whole again: q rows, k rows, v rows."""
    results = run_ranks(gathered_differences, name, asked, None, [2] * world_size, world_size=world_size)
    lockstep = asked == "process_group"
    assert results == [([[], []], lockstep, not lockstep)] * world_size


def test_ranks_that_map_memory_each_go_at_their_own_pace() -> None:
    """Prevents: a meeting in a gather, at which a rank without requests would let the others wait forever."""
    results = run_ranks(gathered_differences, "grouped-query", "peer", [1, 3, 5], [4, 0])
    assert results == [([[]] * 4, False, True), ([], False, True)]


LARGE = replace(CONFIG, dim=128, num_layers=4, ffn_dim=384)  # parts of granules, on the small granules of tests


def gathered_in_granules() -> Any:
    """What differs in three forwards, copies of a forward, and whether each slot aliases this rank's shard."""
    module = decoder(LARGE)
    transport = transport_of(group(), CPU, "peer")
    weights = load(model_of(module), LIMITS, mode="gathered", transport=transport)
    found = [differences(weights, module) for _ in range(3)]
    with Prefetched() as prefetched:
        run_forward(weights)
    rank, part = transport.rank, weights.plan.placement.part_nbytes(1)
    slot, shard = (weights.arena.place(f"layers.0.{name}") for name in ("aliased_slot", "shard"))
    own = slot.part(Segment(rank * part, part)).tensor(torch.uint8, (part,))
    of_rank = shard.tensor(torch.uint8, (part,))
    weights.close()
    before = own[:9].tolist()
    of_rank[:9].add_(1)
    return found, prefetched.operations, [(b + 1) % 256 for b in before] == own[:9].tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_slot_aliases_this_ranks_part_and_receives_the_others(world_size: int) -> None:
    for found, operations, is_aliased in run_ranks(gathered_in_granules, world_size=world_size):
        assert found == [[], [], []]
        assert operations == ["aten.copy_.default"] * 4 * (world_size - 1)
        assert is_aliased


def load_by_unequal_plans() -> None:
    transport = transport_of(group(), CPU, "process_group")
    limits = replace(LIMITS, kv_nbytes=(1 + transport.rank) << 20)
    load(model_of(decoder()), limits, mode="gathered", transport=transport)


def load_with_one_failing() -> None:
    transport = transport_of(group(), CPU, "process_group")
    module = decoder(CONFIG if transport.rank else replace(CONFIG, dim=24, custom_head_dim=12))
    model = replace(model_of(module), config=CONFIG)
    load(model, LIMITS, mode="gathered", transport=transport)


def test_ranks_whose_plans_differ_all_say_so() -> None:
    with pytest.raises(RankError, match=r"first difference is entry 1: rank 0: .* tokens of context fit") as failed:
        run_ranks(load_by_unequal_plans)
    assert {name for name, _ in failed.value.errors.values()} == {"RuntimeError"}
    assert len(failed.value.errors) == 2


def test_a_rank_that_cannot_read_its_values_fails_all() -> None:
    with pytest.raises(RankError) as failed:
        run_ranks(load_with_one_failing)
    assert len(failed.value.errors) == 2


def plans_that_do_not_fit_the_transport() -> list[str]:
    told = []
    transport: Transport = transport_of(group(), CPU, "process_group")
    plan = plan_serving(CONFIG, LIMITS, replace(site_of(CPU, None, transport), num_ranks=3), "gathered")
    for offered in (None, transport):
        with pytest.raises(ValueError, match=r".") as refused:
            reserve(plan, CPU, offered)
        told.append(str(refused.value))
    return told


def test_a_transport_of_other_ranks_is_refused() -> None:
    for none, other in run_ranks(plans_that_do_not_fit_the_transport):
        assert "needs the transport of its ranks" in none
        assert "the plan is for 3 ranks" in other and "of 2" in other


# --- on GPUs ---


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_weights_come_out_of_pinned_memory_into_a_gpu(name: str) -> None:
    module = decoder(CONFIGS[name])
    weights = load(model_of(module), LIMITS, device="cuda", mode="streamed")
    assert all(store.values.is_pinned() for store in weights.stores() if not store.values.is_cuda)
    assert [differences(weights, module) for _ in range(3)] == [[], [], []]
    assert weights.host.nbytes == weights.plan.host.nbytes > 0


def gathered_on_gpus(asked: Any, forwards_by_rank: list[int]) -> Any:
    module = decoder()
    device = torch.device("cuda", torch.cuda.current_device())
    transport = transport_of(group(), device, asked)
    plan = plan_serving(CONFIG, LIMITS, site_of(device, None, transport), "gathered")
    weights = load_planned(model_of(module), with_moved(plan, range(7)), device, transport)
    found = [differences(weights, module) for _ in range(forwards_by_rank[transport.rank])]
    weights.close()
    return found, weights.lockstep


@pytest.mark.gpu
@pytest.mark.parametrize(("asked", "forwards"), [("auto", [5, 1]), ("process_group", [3, 3])])
def test_weights_are_gathered_from_gpus(asked: str, forwards: list[int]) -> None:
    """Over peers at each rank's own pace."""
    results = run_ranks(gathered_on_gpus, asked, forwards, device="cuda")
    assert results == [([[]] * number, asked == "process_group") for number in forwards]


WIDE = replace(CONFIG, dim=1024, num_layers=4, ffn_dim=4096, max_seq_len=64)  # parts of pages on a GPU


def recorded_on_gpu(mode: Any) -> Any:
    """Return tokens of recorded steps, from weights that move and from weights that stay.

    Each with the number of sizes of steps that were recorded.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    transport = transport_of(group(), device, "auto") if mode == "gathered" else None
    module, drawn = Decoder(WIDE), []
    for how in ({"mode": mode, "transport": transport}, {"mode": "resident"}):
        weights = load(model_of(module), OPTIONS, device=device, dtype=torch.float32, **how)  # type: ignore[arg-type]
        engine = Engine(weights)
        rank = 0 if transport is None else transport.rank
        for _ in range(2):  # the second finds what the first has left
            drawn.append({name: done.ids for name, done in engine.generate(requests(rank)).items()})
        drawn.append(len(engine._runner._recordings))
        weights.close()
    return drawn[:3], drawn[3:]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["streamed", "gathered"])
def test_recorded_steps_draw_the_same_tokens_from_weights_that_move(mode: str) -> None:
    for moving, staying in run_ranks(recorded_on_gpu, mode, device="cuda", timeout=120):
        assert moving == staying
        assert moving[2] >= 2


# --- in an engine ---

OPTIONS = EngineOptions(kv_nbytes=1 << 20, max_batch_size=4, max_batch_tokens=16, max_seq_len=48)
NUM_STEPS = 16  # more than any rank needs


def requests(rank: int = 0) -> list[Request]:
    """Of several lengths, some in more than one chunk."""
    prompts = [[(7 * i + 31 * n + 101 * rank) % 301 for i in range(length)] for n, length in enumerate((3, 20, 9))]
    greedy = SamplingParams(temperature=0.0)
    return [Request(f"{n}", tuple(prompt), greedy, max_tokens=8) for n, prompt in enumerate(prompts)]


def served(weights: Weights, asked: list[Request], num_steps: int) -> dict[str, list[int]]:
    """The tokens of all requests after so many steps; the engine must then be idle."""
    engine = Engine(weights)
    for request in asked:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in asked}
    for _ in range(num_steps):
        for output in engine.step():
            tokens[output.request_id] += [token.id for token in output.tokens]
    assert not engine.has_work
    engine.check_integrity()
    return tokens


def resident_tokens(rank: int) -> dict[str, list[int]]:
    tokens = served(load(model_of(Decoder(CONFIG)), OPTIONS), requests(rank), NUM_STEPS)
    assert all(len(drawn) == 8 for drawn in tokens.values())
    return tokens


@pytest.mark.parametrize("moved", [None, [1, 2, 3, 4, 5], [2, 4, 6]])
def test_an_engine_draws_the_same_tokens_from_streamed_weights(moved: list[int] | None) -> None:
    plan = plan_serving(CONFIG, OPTIONS, site_of(CPU), "streamed")
    plan = with_moved(plan, range(7) if moved is None else moved)
    weights = load_planned(model_of(Decoder(CONFIG)), plan, CPU)
    assert served(weights, requests(), NUM_STEPS) == resident_tokens(0)


def served_by_ranks(asked: Any) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """What each rank drew for its own requests; the last one has none. Where ranks need not keep step, they do not."""
    transport = transport_of(group(), CPU, asked)
    weights = load(model_of(Decoder(CONFIG)), OPTIONS, mode="gathered", transport=transport)
    idle = transport.rank == transport.world_size - 1
    num_steps = NUM_STEPS if weights.lockstep else NUM_STEPS + 5 * transport.rank
    tokens = served(
        weights, [] if idle else requests(transport.rank), 0 if idle and not weights.lockstep else num_steps
    )
    weights.close()
    return tokens, {} if idle else resident_tokens(transport.rank)


@pytest.mark.parametrize("asked", ["process_group", "peer"])
def test_every_rank_serves_its_own_requests_from_gathered_weights(asked: str) -> None:
    results = run_ranks(served_by_ranks, asked, world_size=3)
    assert [tokens == resident for tokens, resident in results] == [True] * 3
    assert results[0][0] != results[1][0]
