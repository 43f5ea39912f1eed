"""Compare sharding runtimes on one training step: same model, data and dtypes, one process group, one call.

    torchrun --nproc-per-node 2 scripts/bench_train.py --model 8b --impl unsharded,ours,fsdp2

Run it where the package is installed, or with PYTHONPATH=. in a checkout.

Owns the measurement and the list of implementations; knows nothing of how any of them works. To add one,
write a function that builds a `Trainee` and register it with `@implementation(name)`.

Method. Two 8B models with optimizer state do not fit on one GPU together, so implementations take turns: one
is built on the meta device, sharded, initialised to the same values as the others, measured at every sequence
length in ascending order, and freed; then comes the next. The whole list is gone through `--rounds` times
(A B C A B C), so that drift of clocks and temperature hits all alike. Within a round a time is the median
over steps, of the slowest rank; a row holds the median over rounds, and the smallest and the largest round.

Every step ends with a synchronisation, as in a loop that logs its loss; `--free-running` leaves it out.
Memory peaks cover warm-up too; allocator counts start after the second step at a sequence length. `unsharded`
is the floor: the same layers on each GPU alone, bf16 weights, gradients accumulating in place, no optimizer.

An implementation that runs out of memory gets rows that say so, at that sequence length and the longer ones.
Ranks do the same work and so run out at the same place; were one to fail alone, the process group's timeout
ends the run. The last line of output is one JSON object, see `scripts/results/README.md`.
"""

import argparse
import dataclasses
import datetime
import gc
import gzip
import importlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile, schedule

from yafsdp_like.models import PRESETS, Decoder, DecoderConfig

GIB = 2**30
FIRST_COUNTED_STEP = 2  # from here on an allocator that has settled asks the device for nothing
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TIMEOUT = datetime.timedelta(minutes=5)

Metrics = dict[str, float]  # one measurement; what a device cannot tell is left out
Row = dict[str, Any]
Result = TypeVar("Result")


# --- what to run, and where ---


@dataclass(frozen=True)
class Options:
    """The command line."""

    model: str
    num_layers: int | None
    impls: tuple[str, ...]
    seq_lens: tuple[int, ...]  # ascending
    batch_size: int
    reduce_dtype: str
    compile: bool
    device: str
    rounds: int
    warmup: int
    steps: int
    free_running: bool
    profile: Path | None
    out: Path | None

    @property
    def config(self) -> DecoderConfig:
        config = PRESETS[self.model]
        return config if self.num_layers is None else dataclasses.replace(config, num_layers=self.num_layers)


def parse_options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PRESETS, default="8b")
    parser.add_argument("--num-layers", type=int, help="fewer blocks than the model has")
    parser.add_argument(
        "--impl", dest="impls", default="unsharded,ours,fsdp2", help="; ".join(IMPLEMENTATIONS)
    )
    parser.add_argument("--seq-len", dest="seq_lens", default="1024,2048,4096,8192")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per rank")
    parser.add_argument("--reduce-dtype", choices=DTYPES, default="fp32")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile each block, for each length anew"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="times the list of implementations is gone through"
    )
    parser.add_argument(
        "--warmup", type=int, default=3, help="steps at each length that are not timed, at least 2"
    )
    parser.add_argument("--steps", type=int, default=8, help="timed steps at each length")
    parser.add_argument("--free-running", action="store_true", help="do not synchronise after each step")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="one profiled step of each; rank 0's traces"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the final JSON object here too")
    values = vars(parser.parse_args(arguments))
    values["impls"] = tuple(values["impls"].split(","))
    values["seq_lens"] = tuple(sorted(int(seq_len) for seq_len in values["seq_lens"].split(",")))
    options = Options(**values)
    if unknown := set(options.impls) - set(IMPLEMENTATIONS):
        parser.error(f"--impl: unknown {sorted(unknown)}, expected some of {sorted(IMPLEMENTATIONS)}")
    if options.warmup < FIRST_COUNTED_STEP or options.steps < 1 or options.rounds < 1:
        parser.error(f"--warmup must be at least {FIRST_COUNTED_STEP}, --steps and --rounds at least 1")
    return options


@dataclass(frozen=True)
class World:
    """This rank's place and device, and the mesh of all ranks."""

    rank: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def size(self) -> int:
        return self.mesh.size()

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


def join_world(options: Options) -> World:
    """Start the process group that torchrun describes."""
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=TIMEOUT)
    mesh = init_device_mesh(options.device, (dist.get_world_size(),), mesh_dim_names=("shard",))
    return World(dist.get_rank(), device, mesh)


# --- implementations ---


@dataclass
class Trainee:
    """A model ready to train; override a method where a runtime brings its own."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None

    def forward_backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Run both on (B, T) tokens and targets, and return the loss."""
        loss: Tensor = self.model(tokens, targets)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Apply and clear the gradients; without an optimizer, zero them in place."""
        if self.optimizer is None:
            self.model.zero_grad(set_to_none=False)
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()


Builder = Callable[[Options, World], Trainee]
IMPLEMENTATIONS: dict[str, Builder] = {}


def implementation(name: str) -> Callable[[Builder], Builder]:
    """Register a function that builds a `Trainee` under the name that `--impl` takes."""

    def register(build: Builder) -> Builder:
        IMPLEMENTATIONS[name] = build
        return build

    return register


@implementation("unsharded")
def build_unsharded(options: Options, world: World) -> Trainee:
    model = meta_model(options).to(torch.bfloat16)
    return Trainee(materialized(model, world), optimizer=None)


@implementation("ours")
def build_ours(options: Options, world: World) -> Trainee:
    return build_fully_sharded("yafsdp_like", options, world)


@implementation("fsdp2")
def build_fsdp2(options: Options, world: World) -> Trainee:
    return build_fully_sharded("torch.distributed.fsdp", options, world)


def build_fully_sharded(module_name: str, options: Options, world: World) -> Trainee:
    """Shard each block, then the root, with the `fully_shard` of `module_name`."""
    runtime = importlib.import_module(module_name)
    policy = runtime.MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=DTYPES[options.reduce_dtype]
    )
    model = meta_model(options)
    for layer in model.layers:
        runtime.fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    runtime.fully_shard(model, mesh=world.mesh, mp_policy=policy)
    materialized(model, world)
    return Trainee(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))


def meta_model(options: Options) -> Decoder:
    with torch.device("meta"):
        model = Decoder(options.config)
    if options.compile:
        for layer in model.layers:
            layer.compile(dynamic=False)
    return model


def materialized(model: Decoder, world: World) -> Decoder:
    model.to_empty(device=world.device)
    model.init_weights()
    return model


# --- one measurement ---

Mark = torch.cuda.Event | float


def mark(device: torch.device) -> Mark:
    """A point in time: of the compute stream on a GPU, of the clock elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return (end - begin) * 1e3
    return begin.elapsed_time(end)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_batch(options: Options, world: World, seq_len: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T), a function of the sequence length and the rank."""
    generator = torch.Generator().manual_seed(1_000_003 * seq_len + world.rank)
    shape = (options.batch_size, seq_len + 1)
    tokens = torch.randint(options.config.vocab_size, shape, generator=generator).to(world.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def measure(trainee: Trainee, options: Options, world: World, seq_len: int) -> Metrics:
    """Steps at one sequence length: this rank's times in ms (medians over steps), memory and last loss."""
    batch = make_batch(options, world, seq_len)
    release_cached_memory(world)
    marks: list[tuple[Mark, Mark, Mark]] = []
    before: Metrics = {}
    for step_index in range(options.warmup + options.steps):
        if step_index == FIRST_COUNTED_STEP:
            before = allocator_counts(world)
        begin = mark(world.device)
        loss = trainee.forward_backward(*batch)
        middle = mark(world.device)
        trainee.update()
        marks.append((begin, middle, mark(world.device)))
        if not options.free_running:
            synchronize(world.device)
    synchronize(world.device)
    num_counted_steps = options.warmup + options.steps - FIRST_COUNTED_STEP
    memory = memory_metrics(before, allocator_counts(world), num_counted_steps, world)
    return {**times_of(marks[options.warmup :], trainee), **memory, "loss": loss.item()}


def times_of(marks: list[tuple[Mark, Mark, Mark]], trainee: Trainee) -> Metrics:
    times = {
        "forward_backward_ms": statistics.median(elapsed_ms(begin, middle) for begin, middle, _ in marks)
    }
    if trainee.optimizer is not None:
        times["optimizer_ms"] = statistics.median(elapsed_ms(middle, end) for _, middle, end in marks)
        times["step_ms"] = statistics.median(elapsed_ms(begin, end) for begin, _, end in marks)
    return times


def allocator_counts(world: World) -> Metrics:
    if world.device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(world.device)
    return {
        "allocator_requests": stats["allocation.all.allocated"],
        "device_allocs": stats["num_device_alloc"],
        "alloc_retries": stats["num_alloc_retries"],
    }


def memory_metrics(before: Metrics, after: Metrics, num_steps: int, world: World) -> Metrics:
    """Peaks since cached memory was last released, and what the allocator did in `num_steps` steps."""
    if world.device.type != "cuda":
        return {}
    delta = {name: after[name] - before[name] for name in after}
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(world.device)
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(world.device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(world.device) / GIB,
        "device_used_gib": (total_nbytes - free_nbytes) / GIB,
        "allocator_requests_per_step": delta["allocator_requests"] / num_steps,
        "device_allocs": delta["device_allocs"],
        "alloc_retries": delta["alloc_retries"],
    }


def release_cached_memory(world: World) -> None:
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    dist.barrier()


# --- one round of one implementation ---


def run_round(name: str, options: Options, world: World, traces: Path | None) -> dict[int, Metrics | None]:
    """Build, and measure at each sequence length. None: out of memory, at that length or a shorter one."""
    results: dict[int, Metrics | None] = dict.fromkeys(options.seq_lens)
    trainee = unless_out_of_memory(partial(IMPLEMENTATIONS[name], options, world), world)
    if trainee is None:
        return results
    for seq_len in options.seq_lens:
        metrics = unless_out_of_memory(partial(measure, trainee, options, world, seq_len), world)
        if metrics is None:
            return results
        results[seq_len] = over_ranks(metrics, world)
    if traces is not None:  # last, because these steps train too
        for seq_len in options.seq_lens:
            batch = make_batch(options, world, seq_len)
            world.say(profile_steps(trainee, batch, traces / f"{name}-T{seq_len}.json.gz", world))
    return results


def unless_out_of_memory(action: Callable[[], Result], world: World) -> Result | None:
    """The action's result, or None on every rank if one of them ran out of memory."""
    try:
        result = action()
    except torch.OutOfMemoryError:
        result = None  # the error, and the tensors that its traceback holds, end with this block
    succeeded = gathered(result is not None, world)
    return result if all(succeeded) else None


def gathered(value: Result, world: World) -> list[Result]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def over_ranks(metrics: Metrics, world: World) -> Metrics:
    """The mean loss, and of everything else the largest."""
    ranks = gathered(metrics, world)
    largest = {name: max(rank[name] for rank in ranks) for name in metrics}
    return {**largest, "loss": statistics.fmean(rank["loss"] for rank in ranks)}


# --- one profiled step ---


@dataclass(frozen=True)
class Kernel:
    """One piece of work on a GPU stream: a kernel, a copy or a fill."""

    name: str
    stream: int
    begin_ms: float
    end_ms: float

    @property
    def ms(self) -> float:
        return self.end_ms - self.begin_ms


def profile_steps(trainee: Trainee, batch: tuple[Tensor, Tensor], trace: Path, world: World) -> str:
    """Run three steps; on rank 0 write the trace of the last, and tell what the GPU's streams did in it."""
    if world.rank != 0:
        run_steps(trainee, batch, world, after_each=lambda: None)
        return ""
    trace.parent.mkdir(parents=True, exist_ok=True)
    with profile(
        activities=[ProfilerActivity.CUDA if world.device.type == "cuda" else ProfilerActivity.CPU],
        schedule=schedule(wait=1, warmup=1, active=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        acc_events=True,
    ) as profiler:
        run_steps(trainee, batch, world, after_each=profiler.step)
    with gzip.open(trace, "rt") as file:
        return f"profile {trace.name}: {describe_kernels(kernels_of(json.load(file)))}"


def run_steps(
    trainee: Trainee, batch: tuple[Tensor, Tensor], world: World, after_each: Callable[[], None]
) -> None:
    for _ in range(3):
        trainee.forward_backward(*batch)
        trainee.update()
        synchronize(world.device)
        after_each()


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """The device work of a Chrome trace (times in microseconds), by its beginning."""
    kernels = [
        Kernel(event["name"], event["args"]["stream"], event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)
        for event in trace["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(kernels, key=lambda kernel: kernel.begin_ms)


def describe_kernels(kernels: list[Kernel]) -> str:
    """Busy and idle time of the compute stream, its longest gaps, and the busiest kernels of all streams."""
    if not kernels:
        return "no work on a GPU"
    compute_ms: dict[int, float] = defaultdict(float)
    for kernel in kernels:
        compute_ms[kernel.stream] += 0.0 if "nccl" in kernel.name else kernel.ms  # those may spin for a peer
    stream = max(compute_ms, key=lambda stream: compute_ms[stream])
    work = [kernel for kernel in kernels if kernel.stream == stream]
    busy_ms, span_ms = sum(kernel.ms for kernel in work), work[-1].end_ms - work[0].begin_ms
    lines = [f"stream {stream} busy {busy_ms:.2f} ms, idle {span_ms - busy_ms:.2f} ms of {span_ms:.2f} ms"]
    gaps = sorted(pairwise(work), key=lambda pair: pair[0].end_ms - pair[1].begin_ms)
    for before, after in gaps[:5]:
        gap = f"{after.begin_ms - before.end_ms:8.3f} ms at {before.end_ms - work[0].begin_ms:9.3f} ms"
        lines.append(f"  idle {gap}: {before.name[:40]} -> {after.name[:40]}")
    by_name: dict[tuple[int, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.stream, kernel.name].append(kernel.ms)
    for (index, name), times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]:
        lines.append(f"  {sum(times):9.3f} ms {len(times):5d} x  stream {index:3d}  {name[:80]}")
    return "\n".join(lines)


# --- the report ---

TIMES = ("forward_backward_ms", "optimizer_ms", "step_ms")
MEMORY = (
    "peak_allocated_gib",
    "peak_reserved_gib",
    "device_used_gib",
    "allocator_requests_per_step",
    "device_allocs",
    "alloc_retries",
)
COLUMNS = {  # of the printed table: field of a row -> heading and format
    "impl": ("impl", ""),
    "seq_len": ("T", "d"),
    "forward_backward_ms": ("fwd+bwd ms", ".1f"),
    "ratio_to_floor": ("x floor", ".3f"),
    "optimizer_ms": ("opt ms", ".1f"),
    "step_ms": ("step ms", ".1f"),
    "tokens_per_second_per_rank": ("tok/s/rank", ".0f"),
    "tflops": ("TFLOP/s", ".0f"),
    "peak_allocated_gib": ("alloc GiB", ".2f"),
    "peak_reserved_gib": ("reserved", ".2f"),
    "device_used_gib": ("device", ".2f"),
    "allocator_requests_per_step": ("requests/step", ".0f"),
    "device_allocs": ("cudaMallocs", "d"),
    "alloc_retries": ("retries", "d"),
    "loss": ("loss", ".4f"),
}


def make_row(name: str, seq_len: int, rounds: list[Metrics | None], options: Options) -> Row:
    """One implementation at one sequence length; fields that the device cannot tell are None."""
    row: Row = {"impl": name, "seq_len": seq_len, "status": "ok", "rounds": len(rounds)}
    done = [metrics for metrics in rounds if metrics is not None]
    if len(done) < len(rounds):
        return {**row, "status": "OOM"}
    for field in TIMES:
        row[field] = spread([metrics[field] for metrics in done if field in metrics])
    for field in MEMORY:
        row[field] = max((metrics[field] for metrics in done if field in metrics), default=None)
    row["loss"] = statistics.median(metrics["loss"] for metrics in done)
    row["tokens_per_second_per_rank"] = row["ratio_to_floor"] = None
    seconds = row["forward_backward_ms"]["median"] / 1e3
    row["tflops"] = options.config.train_flops(options.batch_size, seq_len) / seconds / 1e12
    if row["step_ms"] is not None:
        row["tokens_per_second_per_rank"] = options.batch_size * seq_len / (row["step_ms"]["median"] / 1e3)
    return row


def spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def add_ratios(rows: list[Row]) -> None:
    """Relate each row's forward and backward to the floor's at the same sequence length, where both ran."""
    ran = [row for row in rows if row["status"] == "ok"]
    floors = {
        row["seq_len"]: row["forward_backward_ms"]["median"] for row in ran if row["impl"] == "unsharded"
    }
    for row in ran:
        if row["seq_len"] in floors:
            row["ratio_to_floor"] = row["forward_backward_ms"]["median"] / floors[row["seq_len"]]


def format_table(rows: list[Row]) -> str:
    """Rows by sequence length, medians of times, blanks where there is no figure."""
    lines = [[heading for heading, _ in COLUMNS.values()]]
    for row in sorted(rows, key=lambda row: row["seq_len"]):
        lines.append([format_cell(row, field, spec) for field, (_, spec) in COLUMNS.items()])
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def format_cell(row: Row, field: str, spec: str) -> str:
    if field == "forward_backward_ms" and row["status"] != "ok":
        return str(row["status"])
    value = row.get(field)
    if value is None:
        return ""
    return format(value["median"] if isinstance(value, dict) else value, spec)


def format_metrics(metrics: Metrics | None) -> str:
    if metrics is None:
        return "OOM"
    return ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())


def make_report(options: Options, world: World, rows: list[Row], arguments: Sequence[str]) -> Row:
    on_gpu = world.device.type == "cuda"
    return {
        "command": f"torchrun --nproc-per-node {world.size} scripts/bench_train.py {shlex.join(arguments)}",
        "hardware": {
            "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
            "device_memory_gib": torch.cuda.mem_get_info(world.device)[1] / GIB if on_gpu else None,
            "ranks": world.size,
            "cpu_cores": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        },
        "model": {**dataclasses.asdict(options.config), "num_params": options.config.num_params},
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(arguments)
    world = join_world(options)
    rounds: dict[tuple[str, int], list[Metrics | None]] = defaultdict(list)
    report: Row = {}
    for round_index in range(options.rounds):
        for name in options.impls:
            results = run_round(name, options, world, options.profile if round_index == 0 else None)
            for seq_len, metrics in results.items():
                rounds[name, seq_len].append(metrics)
                world.say(f"round {round_index} {name} T {seq_len}: {format_metrics(metrics)}")
            torch.compiler.reset()
            release_cached_memory(world)
        rows = [make_row(name, seq_len, metrics, options) for (name, seq_len), metrics in rounds.items()]
        add_ratios(rows)
        report = make_report(options, world, rows, arguments)
        if (
            world.rank == 0 and options.out is not None
        ):  # after each round: a run cut short leaves what it has
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()
    world.say(format_table(report["rows"]))
    world.say(json.dumps(report))


if __name__ == "__main__":
    main()
