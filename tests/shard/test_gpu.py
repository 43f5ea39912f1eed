"""What only a GPU can show: allocator counters, streams that overlap, compiled blocks. Two GPUs, NCCL."""

import gc
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from tests.ranks import run_ranks
from tests.training import Recipe, Run, assert_same_bits, world_mesh
from tests.training import train as train_specimen
from yafsdp_like import MixedPrecisionPolicy, fully_shard, update_in_backward
from yafsdp_like.memory.plan import MemoryPlan
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.runtime.gradient_shard import GradientShard
from yafsdp_like.shard.runtime.gradients import GradientLifecycle
from yafsdp_like.shard.runtime.params import ParamLifecycle
from yafsdp_like.shard.runtime.rebuild import Rebuild
from yafsdp_like.shard.runtime.unit_state import unit_of

pytestmark = pytest.mark.gpu

CONFIG = DecoderConfig(dim=1024, num_layers=8, num_heads=8, num_kv_heads=4, ffn_dim=4096, vocab_size=4096)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SLOW_CYCLES = 50_000_000  # of a GPU's clock: about 30 ms


def sharded_decoder(compiled: bool = False, transport: str = "auto", **options: Any) -> Any:
    with torch.device("meta"):
        model = Decoder(CONFIG)
    for layer in model.layers:
        if compiled:
            layer.compile(dynamic=False)
        fully_shard(layer, mesh=world_mesh("cuda"), mp_policy=BF16, transport=transport, **options)
    fully_shard(model, mesh=world_mesh("cuda"), mp_policy=BF16, transport=transport, **options)
    model.to_empty(device="cuda")
    model.init_weights()
    return model


def batch(seq_len: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(CONFIG.vocab_size, (1, seq_len + 1), generator=torch.Generator().manual_seed(0)).cuda()
    return tokens[:, :-1], tokens[:, 1:]


def train(model: Any, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    losses = []
    for _ in range(steps):
        loss = model(*batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_no_device_memory_is_asked_for_once_the_allocator_has_settled() -> None:
    """That takes the 8B shape two steps (scripts/results) and this small one three."""
    for mallocs, retries, overhead in run_ranks(count_device_allocations, device="cuda", timeout=120):
        assert mallocs == retries == 0
        assert overhead < 1.10  # small blocks round up; the 8B shape is measured in scripts/results


def count_device_allocations() -> tuple[int, int, float]:
    model = sharded_decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for number in range(8):
        if number == 3:
            before = torch.cuda.memory_stats()
        model(*batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = torch.cuda.memory_stats()
    mallocs, retries = (after[name] - before[name] for name in ("num_device_alloc", "num_alloc_retries"))
    return mallocs, retries, after["reserved_bytes.all.peak"] / after["allocated_bytes.all.peak"]


@pytest.mark.parametrize("transport", ["process_group", "peer"])
def test_updating_in_backward_reserves_no_memory_for_gradients(transport: str) -> None:
    """Also while the CPU is ahead of the device, and in the first step, which allocates the moments.

    What stays: gradients of the root and of two blocks of eight (0.28 of all), and activations, which peak elsewhere.
    """
    for reserved, gradients in run_ranks(peaks_of_updates, transport, device="cuda", timeout=120):
        assert reserved[True] < reserved[False] - 0.4 * gradients, (reserved, gradients)


def peaks_of_updates(transport: str) -> tuple[dict[bool, int], int]:
    """Bytes that the allocator reserves at most, by whether backwards update, and those of all gradients."""
    reserved, gradients, inputs = {}, 0, batch(seq_len=128)
    for in_backward in (False, True, False, True):  # once so that communicators and workspaces are there
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        model = sharded_decoder(transport=transport, split_master=True)
        optimizer = AdamW(model.parameters(), lr=1e-4)
        if in_backward:
            update_in_backward(optimizer)
        for layer in model.layers:
            layer.register_forward_hook(lambda *_: torch.cuda._sleep(SLOW_CYCLES))
        for _ in range(3):
            model(*inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        reserved[in_backward] = torch.cuda.max_memory_reserved() - before
        gradients = sum(4 * p.to_local().numel() for p in model.parameters())
        del model, optimizer, layer
    return reserved, gradients


ENGINE_WORK: dict[type, Sequence[str]] = {
    Rebuild: ["if_changed"],
    ParamLifecycle: ["begin", "all_gather", "prefetch", "unshard", "release"],
    GradientLifecycle: ["view", "arrived", "reduce_scatter", "wait_for_reductions"],
}


def test_the_runtime_itself_allocates_nothing_on_the_gpu_after_warm_up() -> None:
    """But for the memory of gradients, which is given back at each forward: one request a parameter and step."""
    for requests, of_gradients, num_params in run_ranks(count_runtime_allocations, device="cuda", timeout=120):
        assert requests == [0] * len(requests) and len(requests) > 100
        assert 0 < of_gradients <= 2 * num_params


def count_runtime_allocations() -> tuple[list[int], int, int]:
    """Requests to the CUDA allocator inside each call of the engine's, in two steps after the first.

    Those for gradients' memory are counted apart; then comes the number of parameters.
    """
    model = sharded_decoder()
    train(model, 2)
    requests: list[int] = []
    of_gradients, take = 0, GradientShard.take

    def num_requests() -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])

    def counted_take(shard: GradientShard) -> None:
        nonlocal of_gradients
        before = num_requests()
        take(shard)
        of_gradients += num_requests() - before

    def counted(work: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = num_requests() - of_gradients
            result = work(*args, **kwargs)
            requests.append(num_requests() - of_gradients - before)
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ENGINE_WORK.items():
            for name in names:
                patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(GradientShard, "take", counted_take)
        train(model, 2)
    return requests, of_gradients, len(list(model.parameters()))


GRANULARITY = 2 << 20  # in which a GPU's memory is handed out, in bytes


@pytest.mark.parametrize("transport", ["process_group", "peer"])
def test_the_plan_is_what_the_gpu_holds(transport: str) -> None:
    """In the allocator, and outside of it what lies in granules, which it does not count."""
    for plan, allocated, elsewhere in run_ranks(compare_plan_with_gpu, transport, device="cuda", timeout=120):
        in_granules = sum(region.nbytes for region in plan.regions if region.mapped or region.granule_nbytes)
        rest = plan.nbytes - in_granules
        assert bool(in_granules) is (transport == "peer")
        assert 0 <= allocated - rest < 0.01 * rest  # the allocator rounds blocks up
        assert -GRANULARITY < elsewhere - in_granules <= GRANULARITY  # what else the driver keeps


def compare_plan_with_gpu(transport: str) -> tuple[MemoryPlan, int, int]:
    """The plan, and the bytes that a model and its arenas take in the allocator and beside it."""
    first = sharded_decoder(transport=transport)  # contexts, communicators and signals are there now
    train(first, 1)
    del first
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), _used_outside_the_allocator()
    model = sharded_decoder(transport=transport)
    model.unshard()  # makes the arena
    model.reshard()
    after = torch.cuda.memory_allocated(), _used_outside_the_allocator()
    return model.memory_plan(), after[0] - before[0], after[1] - before[1]


def _used_outside_the_allocator() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def test_initialization_from_meta_stays_near_the_shards() -> None:
    for peak, shards, largest_unit in run_ranks(peak_of_initialization, device="cuda", timeout=120):
        assert peak <= shards + 2 * largest_unit


def peak_of_initialization() -> tuple[int, int, int]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = sharded_decoder()
    peak = torch.cuda.max_memory_allocated() - before
    shards = [region.nbytes for region in model.memory_plan().regions if region.kind == "main_shard"]
    return peak, sum(shards), max(shards)


Spans = list[tuple[float, float]]  # start and end, in microseconds
Event = dict[str, Any]  # of a Chrome trace


def events_of_a_step(transport: str, directory: Path) -> list[Event]:
    """What this rank's GPU did in a forward and backward that waited in its queues when it began.

    So streams and their events alone say what ran beside what, and not how fast the CPU issues it.
    """
    model, inputs = sharded_decoder(transport=transport), batch()
    train(model, 2)
    trace = directory / f"{transport}-{dist.get_rank()}.json"
    with profile(
        activities=[ProfilerActivity.CUDA],
        schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        acc_events=True,
    ) as profiler:
        for _ in range(2):
            torch.cuda._sleep(8 * SLOW_CYCLES)
            model(*inputs).backward()
            torch.cuda.synchronize()
            model.zero_grad()
            profiler.step()
    events: list[Event] = json.loads(trace.read_text())["traceEvents"]
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy")]


def spans(events: Sequence[Event], category: str, *words: str) -> Spans:
    """When work of a category ran whose name has all the words."""
    return [
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e["cat"] == category and all(word in e["name"] for word in words)
    ]


def spans_of_compute(events: Sequence[Event]) -> Spans:
    """When kernels ran but those of NCCL, and the one that let work queue up."""
    others = [event for event in events if "nccl" not in event["name"] and "spin_kernel" not in event["name"]]
    return spans(others, "kernel")


def num_overlapped(some: Spans, others: Spans) -> int:
    return sum(any(begin < end and start < finish for begin, finish in others) for start, end in some)


def test_gathers_and_reductions_run_beside_compute(tmp_path: Path) -> None:
    """Counts collectives during which a kernel of another stream runs; says nothing of speed."""
    events = run_ranks(events_of_a_step, "process_group", tmp_path, device="cuda", timeout=120)[0]
    compute = spans_of_compute(events)
    assert num_overlapped(spans(events, "kernel", "nccl", "AllGather"), compute) >= CONFIG.num_layers
    assert num_overlapped(spans(events, "kernel", "nccl", "ReduceScatter"), compute) >= CONFIG.num_layers // 2


def test_copies_from_peers_run_beside_compute(tmp_path: Path) -> None:
    """Each gather and each reduction is copies between GPUs, and no kernel of NCCL moves parameters or gradients."""
    events = run_ranks(events_of_a_step, "peer", tmp_path, device="cuda", timeout=120)[0]
    assert num_overlapped(spans(events, "gpu_memcpy", "PtoP"), spans_of_compute(events)) >= 2 * CONFIG.num_layers
    assert spans(events, "kernel", "nccl", "AllGather") == spans(events, "kernel", "nccl", "ReduceScatter") == []


def test_between_gpus_of_one_host_memory_is_mapped_unless_said_otherwise() -> None:
    for description in run_ranks(describe_transport, device="cuda", timeout=120):
        assert description == "peer: 2 GPUs of one host"


def describe_transport() -> str:
    return unit_of(sharded_decoder()).transport.description


@pytest.mark.parametrize("name", ["decoder", "nested", "tied", "frozen", "reused"])
def test_both_transports_give_the_same_bits_on_gpus(name: str) -> None:
    """In bf16 reduced in fp32, where two ranks' sum has one order and its half is exact."""
    for over_peers, over_nccl in run_ranks(train_over_both, name, device="cuda", timeout=120):
        assert_same_bits(over_peers, over_nccl)


def train_over_both(name: str) -> tuple[Run, Run]:
    precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    peer, nccl = (
        train_specimen(name, "ours", Recipe(steps=4, precision=precision, device="cuda", transport=transport))
        for transport in ("peer", "process_group")
    )
    return peer, nccl


def test_compiled_blocks_train_as_eager_ones_do() -> None:
    for eager, compiled in run_ranks(train_both_ways, device="cuda", timeout=300):
        assert compiled == pytest.approx(eager, rel=2e-3)


def train_both_ways() -> tuple[list[float], list[float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler itself warns, of what it imports and looks at
        return train(sharded_decoder(), 4), train(sharded_decoder(compiled=True), 4)
