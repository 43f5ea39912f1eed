"""How fast this machine is: copies, matrix products, collectives, pinning, launches and the processor, each measured.

Every function measures one thing, in well under two seconds, and raises where it cannot. They work on CPUs too, with
smaller sizes. Knows nothing of files, of what is printed, or of what the figures are used for.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

from launch.world import World
from yafsdp_like.comm.process_group import ProcessGroupTransport
from yafsdp_like.comm.transport import Reduction
from yafsdp_like.hardware import CollectiveRate, ProductRate
from yafsdp_like.memory.pinned import pin
from yafsdp_like.memory.streams import Recording, Timer

COPY_NBYTES = {"cuda": 1 << 30, "cpu": 1 << 24}
NUM_COPIES = 10
PAGEABLE_NBYTES = {"cuda": 256 << 20, "cpu": 1 << 22}
PIN_NBYTES = 1 << 30
PEER_NBYTES = 256 << 20
SUSTAINED_S = {"cuda": 1.5, "cpu": 0.0}  # of one product, until clocks have settled
LARGE_PRODUCT = {"cuda": (8192, 4096, 14336), "cpu": (256, 256, 256)}  # rows, inner, columns
SQUARES = {"cuda": (1024, 2048, 4096, 8192), "cpu": (64, 256)}
ROWS = {"cuda": (1024, 4096, 8192), "cpu": (64,)}  # tokens, of a decoder layer's products
LAYER = {"cuda": ((4096, 6144), (4096, 4096), (4096, 14336), (14336, 4096)), "cpu": ((64, 96), (64, 256))}
PRODUCTS_AT_ONCE = 20
ATTENTION = {"cuda": (32, 4096, 128), "cpu": (2, 128, 16)}  # heads, tokens, head dim
COLLECTIVE_NBYTES = {"cuda": (16 << 20, 64 << 20, 256 << 20), "cpu": (1 << 16, 1 << 20, 1 << 22)}
NUM_SMALL = 1000  # launches, or kernels of a recording
LOOP_LENGTH = 200_000


def median_seconds(work: Callable[[], object], device: torch.device, number: int) -> float:
    """Return the median of `number` runs of `work` behind a first one, by events on the device's stream."""
    timer = Timer(device)
    work()
    marks = [timer.mark()]
    for _ in range(number):
        work()
        marks.append(timer.mark())
    _wait(device)
    return statistics.median(timer.seconds(*pair) for pair in pairwise(marks))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- copies, in bytes per second ---


def copy_rate(device: torch.device, number: int = NUM_COPIES) -> float:
    """Measure a large copy inside the device's memory: bytes read and those written, per second."""
    source = torch.zeros(COPY_NBYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device, number)


def to_device_rate(device: torch.device, pinned: bool, number: int = NUM_COPIES) -> float:
    """Measure copies from host memory to the device."""
    host = _host_bytes(device, pinned)
    there = torch.empty_like(host, device=device)
    return len(host) / median_seconds(lambda: there.copy_(host, non_blocking=pinned), device, number)


def to_host_rate(device: torch.device, pinned: bool, number: int = NUM_COPIES) -> float:
    """Measure copies from the device to host memory."""
    host = _host_bytes(device, pinned)
    there = torch.zeros_like(host, device=device)
    return len(host) / median_seconds(lambda: host.copy_(there, non_blocking=pinned), device, number)


def _host_bytes(device: torch.device, pinned: bool) -> torch.Tensor:
    sizes = COPY_NBYTES if pinned else PAGEABLE_NBYTES
    return torch.zeros(sizes[device.type], dtype=torch.uint8, pin_memory=pinned and device.type == "cuda")


def peer_rate(device: torch.device) -> float:
    """Measure copies from the next GPU that this process sees, which it makes a context on.

    Raises RuntimeError where there is none whose memory this device can read.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    own = device.index or 0
    peers = [(own + step) % count for step in range(1, count)]
    peer = next((peer for peer in peers if torch.cuda.can_device_access_peer(own, peer)), None)
    if peer is None:
        raise RuntimeError(f"no other of {count} visible GPUs whose memory this one can read")
    source = torch.zeros(PEER_NBYTES, dtype=torch.uint8, device=torch.device("cuda", peer))
    _wait(source.device)
    target = torch.empty_like(source, device=device)
    return source.numel() / median_seconds(lambda: target.copy_(source, non_blocking=True), device, NUM_COPIES)


def pinning_rate(device: torch.device) -> float:
    """Measure how fast host memory is pinned that has just been taken from the system, in bytes per second.

    Raises RuntimeError without a GPU, and where the system refuses.
    """
    if device.type != "cuda":
        raise RuntimeError("host memory is pinned for GPUs only")
    torch.zeros(1, device=device)
    owner = torch.empty(PIN_NBYTES, dtype=torch.uint8)
    begin = time.perf_counter()
    pin(owner.untyped_storage(), owner, device)
    return PIN_NBYTES / (time.perf_counter() - begin)


# --- products, in operations per second ---


def product_rate(
    device: torch.device, sizes: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16, seconds: float = 0.0
) -> float:
    """Measure a product of (rows, inner) and (inner, columns), over at least `seconds`: the median of the second half.

    Clocks fall under load, so a second is needed where the sustained rate is asked for.
    """
    rows, inner, columns = sizes
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=device)

    def products() -> None:
        for _ in range(PRODUCTS_AT_ONCE):
            torch.mm(a, b, out=out)

    times, end = [median_seconds(products, device, 3)], time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(median_seconds(products, device, 1))
    return 2 * rows * inner * columns * PRODUCTS_AT_ONCE / statistics.median(times[len(times) // 2 :])


def product_rates(device: torch.device) -> tuple[ProductRate, ...]:
    """Measure square products and those of a decoder layer at several numbers of tokens."""
    squares = [(size, size, size) for size in SQUARES[device.type]]
    layer = [(rows, *shape) for rows in ROWS[device.type] for shape in LAYER[device.type]]
    return tuple(ProductRate(*sizes, product_rate(device, sizes)) for sizes in [*squares, *layer])


def attention_rate(device: torch.device) -> float:
    """Measure causal attention in bf16, forward and backward, by the operations that the mask leaves.

    Two products of forward, and five of backward, of half of all pairs of tokens.
    """
    heads, tokens, dim = ATTENTION[device.type]
    q, k, v, gradient = torch.randn(4, 1, heads, tokens, dim, device=device).to(torch.bfloat16)
    for part in (q, k, v):
        part.requires_grad_()

    def step() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient)

    return 7 * heads * tokens * tokens * dim / median_seconds(step, device, 5)


# --- what is small, in seconds ---


def kernel_seconds(device: torch.device) -> float:
    """Measure how long the device is busy with a kernel that has nothing to do, one behind another in a recording."""
    x = torch.zeros(1, device=device)

    def work() -> None:
        for _ in range(NUM_SMALL):
            x.add_(1.0)

    aside = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    with aside:  # CUDA records no graph on its default stream
        return median_seconds(Recording(device, [work]), device, 5) / NUM_SMALL


def launch_seconds(device: torch.device) -> float:
    """Measure the CPU's time for one small operation without gradients, from Python to the device's queue."""
    x = torch.zeros(1, device=device)
    times = []
    for _ in range(5):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(NUM_SMALL // 4):  # fewer than the device's queue holds
            x.add_(1.0)
        times.append((time.perf_counter() - begin) / (NUM_SMALL // 4))
    return min(times)


def python_seconds() -> float:
    """Measure a fixed loop in Python: the speed of one thread, to compare machines."""
    times = []
    for _ in range(5):
        begin, total = time.perf_counter(), 0
        for i in range(LOOP_LENGTH):
            total += i & 7
        times.append(time.perf_counter() - begin)
        assert total
    return min(times)


# --- between ranks ---


def collective_rates(world: World) -> tuple[CollectiveRate, ...]:
    """Measure all-gathers and reduce-scatters in bf16 over all ranks; called by all. Empty for one rank."""
    if world.size == 1:
        return ()
    return tuple(
        _collective_rate(name, nbytes, world)
        for name in ("all_gather", "reduce_scatter")
        for nbytes in COLLECTIVE_NBYTES[world.device.type]
    )


def _collective_rate(name: str, nbytes: int, world: World) -> CollectiveRate:
    transport = ProcessGroupTransport(world.mesh.get_group(), "measured")
    whole = torch.zeros(nbytes // 2 // world.size * world.size, dtype=torch.bfloat16, device=world.device)
    part = torch.zeros(len(whole) // world.size, dtype=torch.bfloat16, device=world.device)
    gather = transport.all_gather([whole], [part])
    reduce = transport.reduce_scatter([part], [whole], [torch.bfloat16], whole[:0])
    run = gather if name == "all_gather" else partial(reduce, Reduction(), False)
    seconds = median_seconds(run, world.device, 5)
    return CollectiveRate(name, whole.nbytes, whole.nbytes * (world.size - 1) / world.size / seconds)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture of the processor: what measurements are kept under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def used_nbytes(device: torch.device) -> int:
    """Return what a GPU counts as used, by contexts, NCCL and other processes too; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(device)
    return total_nbytes - free_nbytes


def communicator_nbytes(world: World) -> int:
    """Measure what the device has less after the first collectives, the allocator's own aside; called by all."""
    before = _outside_nbytes(world.device)
    part = torch.zeros(1 << 20, dtype=torch.bfloat16, device=world.device)
    parts = [torch.zeros_like(part) for _ in range(world.size)]
    dist.all_gather(parts, part)
    dist.reduce_scatter(part, parts)
    dist.all_reduce(part)
    world.synchronize()
    return max(0, _outside_nbytes(world.device) - before)


def _outside_nbytes(device: torch.device) -> int:
    return used_nbytes(device) - torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
