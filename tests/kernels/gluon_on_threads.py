"""Runs the Gluon kernel of prefill attention on a CPU: partitions are threads, copies and products are late.

Triton's interpreter does not know Gluon. This module gives `hopper_warps.py` and `prefill_hopper.py` another language:
tensors are torch's, pointers are flat tensors and offsets, and shared memory begins as NaN. Copies are done at random
times by a thread of their own, and asynchronous products read their operands only when they are waited for, so that a
wait that is missing, or one of the wrong parity, gives a wrong result or none at all.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from yafsdp_like.kernels.paged_attention import AttentionBatch, KVPages

TIMEOUT_S = 20.0
_thread = threading.local()  # program, num_programs, products


class Pointer:
    """An address: elements of a flat tensor, at offsets of any shape."""

    def __init__(self, flat: Tensor, offset: Any = 0) -> None:
        self.flat, self.offset = flat, torch.as_tensor(offset)
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.offset + offset)

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        """To the first element; others are at their strides."""
        numel = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
        return cls(tensor.as_strided((numel,), (1,)))


def load(pointer: Pointer, mask: Any = True, other: float = 0) -> Tensor:
    """Elements where `mask` is true; elsewhere no address is looked at."""
    offset, mask = torch.broadcast_tensors(pointer.offset, torch.as_tensor(mask))
    return torch.where(mask, pointer.flat[torch.where(mask, offset, 0).long()], other).to(pointer.flat.dtype)


def store(pointer: Pointer, values: Tensor, mask: Any = True) -> None:
    """Write where `mask` is true."""
    offset, values, mask = torch.broadcast_tensors(pointer.offset, values, torch.as_tensor(mask))
    pointer.flat[offset[mask].long()] = values[mask]


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    def index(self, i: Any) -> Any:
        return Shared(self.memory[int(i)])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.memory.narrow(dim, start, length))

    def load(self, layout: object = None) -> Tensor:
        return self.memory.clone()

    def store(self, values: Tensor) -> None:
        self.memory.copy_(values)


class Tile:
    """A matrix in shared memory, read when used: boxes of 64 columns (BLOCK_N, H / 64, 64), or their transpose."""

    def __init__(self, boxes: Tensor, transposed: bool = False) -> None:
        self.boxes, self.transposed = boxes, transposed

    def index(self, i: Any) -> Tile:
        return Tile(self.boxes[int(i)])

    def permute(self, order: tuple[int, int]) -> Tile:
        assert order == (1, 0)
        return Tile(self.boxes, transposed=True)

    @property
    def memory(self) -> Tensor:
        matrix = self.boxes.flatten(1)
        return matrix.T if self.transposed else matrix


def seen_as(slots: Shared, dtype: torch.dtype, shape: list[int], layout: object) -> Tile:
    """See boxes (STAGES * H / 64 * boxes, 1, BOX, 1, 64) as tiles (STAGES, BLOCK_N, H)."""
    stages, block_n, head_dim = shape
    return Tile(slots.memory.view(stages, head_dim // 64, block_n, 64).permute(0, 2, 1, 3))


class Barrier:
    """An mbarrier: completed once its arrivals and the bytes that they announced are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.arrived = self.nbytes = self.completed = 0

    def change(self, arrived: int, nbytes: int) -> None:
        with self.changed:
            self.arrived, self.nbytes = self.arrived + arrived, self.nbytes + nbytes
            assert self.arrived <= self.count, "more arrivals than a barrier has"
            if self.arrived == self.count and self.nbytes == 0:
                self.completed, self.arrived = self.completed + 1, 0
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.completed & 1 != parity, TIMEOUT_S):
                raise TimeoutError(f"a barrier that was completed {self.completed} times is waited for")


class Barriers:
    """As many as a ring has slots."""

    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


@dataclass
class Copies:
    """Copies in flight, which end in any order."""

    waiting: list[Callable[[], None]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    closed: bool = False

    def issue(self, copy: Callable[[], None]) -> None:
        with self.changed:
            self.waiting.append(copy)
            self.changed.notify_all()

    def run(self, draw: random.Random) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if not self.waiting:
                    return
                copy = self.waiting.pop(draw.randrange(len(self.waiting)))
            copy()


def copy_box(boxes: Tensor, at: list[Any], full: Barrier, place: Shared) -> None:
    """Issue the copy of a box (1, BOX, 1, 64) of pages (P, page_size, K, H); zeros for what is outside."""
    page, token, head, col = (int(i) for i in at)
    rows = place.memory.shape[1]

    def copy() -> None:
        inside = 0 <= page < len(boxes)
        found = boxes[page, token : token + rows, head, col : col + 64] if inside else torch.zeros(rows, 64)
        place.memory[0, :, 0] = found
        full.change(0, -place.memory.numel() * place.memory.itemsize)

    _thread.copies.issue(copy)


@dataclass(eq=False)
class Product:
    """A product that is under way."""

    left: Any
    right: Any
    start: Tensor
    uses_start: bool
    result: Tensor | None = None

    def compute(self) -> Tensor:
        left, right = (x if isinstance(x, Tensor) else x.memory for x in (self.left, self.right))
        product = left.float() @ right.float()
        return product + self.start if self.uses_start else product


def warpgroup_mma(left: Any, right: Any, start: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(left, right, start, use_acc)
    if not is_async:
        return product.compute()
    _thread.products.append(product)
    return product


def warpgroup_mma_wait(num_left: int, deps: list[Any]) -> Any:
    products: list[Product] = _thread.products
    while len(products) > num_left:
        first = products.pop(0)
        first.result = first.compute()
    found = [dep.result if isinstance(dep, Product) and dep.result is not None else dep for dep in deps]
    return found[0] if len(found) == 1 else found


def warp_specialize(partitions: list[Any], num_warps: list[int], registers: list[int]) -> None:
    """Run the partitions of one program beside each other."""
    errors: list[BaseException] = []
    copies, program, num_programs = Copies(), _thread.program, _thread.num_programs

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _thread.program, _thread.num_programs, _thread.products, _thread.copies = program, num_programs, [], copies
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    engine = threading.Thread(target=copies.run, args=(random.Random(program),))
    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in (engine, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    with copies.changed:
        copies.closed = True
        copies.changed.notify_all()
    engine.join()
    if errors:
        raise errors[0]


def _as_it_is(value: Any, *layouts: object) -> Any:
    return value


def _language() -> SimpleNamespace:
    def allocate(dtype: Any, shape: list[int], layout: object) -> Any:
        if dtype is torch.int64:
            return Barriers(shape[0])
        return Shared(torch.full(shape, float("nan"), dtype=dtype))

    layouts = dict.fromkeys(
        ("NVMMASharedLayout", "SliceLayout", "BlockedLayout", "NVMMADistributedLayout", "DotOperandLayout"),
        lambda *_, **__: None,
    )
    return SimpleNamespace(
        **layouts,
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        int64=torch.int64,
        float32=torch.float32,
        constexpr=_as_it_is,
        load=load,
        store=store,
        where=lambda c, a, b: torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b)),
        cdiv=lambda a, b: (a + b - 1) // b,
        program_id=lambda axis: torch.tensor(_thread.program, dtype=torch.int32),
        num_programs=lambda axis: torch.tensor(_thread.num_programs, dtype=torch.int32),
        static_range=range,
        arange=lambda first, last, layout: torch.arange(first, last, dtype=torch.int32),
        expand_dims=torch.unsqueeze,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        zeros_like=torch.zeros_like,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        exp2=torch.exp2,
        max=torch.amax,
        sum=torch.sum,
        convert_layout=_as_it_is,
        allocate_shared_memory=allocate,
        warp_specialize=warp_specialize,
    )


@contextmanager
def _modules(**modules: ModuleType) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    return module


def _loaded(name: str) -> ModuleType:
    """Run a module of the package once more."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel() -> ModuleType:
    """Return `prefill_hopper`, in the language of this module."""
    gluon, hopper = "triton.experimental.gluon", "triton.experimental.gluon.language.nvidia.hopper"

    def jit(fn: Any = None, **_: object) -> Any:
        return fn or _as_it_is

    language = _language()
    language.shared_memory_descriptor = SimpleNamespace(reinterpret=seen_as)
    mbarrier = {
        "MBarrierLayout": lambda: None,
        "init": lambda barrier, count: setattr(barrier, "count", count),
        "wait": lambda barrier, parity: barrier.wait(int(parity)),
        "arrive": lambda barrier: barrier.change(1, 0),
        "expect": lambda barrier, nbytes: barrier.change(1, nbytes),
    }
    products = {"warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait}
    fakes = {
        "triton": _module("triton"),
        "triton.experimental": _module("triton.experimental", gluon=_module(gluon, jit=jit, language=language)),
        gluon: _module(gluon, jit=jit, language=language),
        f"{gluon}.language": language,
        hopper: _module(hopper, fence_async_shared=lambda: None, tma=SimpleNamespace(async_load=copy_box), **products),
        f"{hopper}.mbarrier": _module(f"{hopper}.mbarrier", **mbarrier),
        f"{gluon}.nvidia.hopper": _module(f"{gluon}.nvidia.hopper", TensorDescriptor=None),
    }
    with _modules(**fakes):  # type: ignore[arg-type]
        warps = _loaded("yafsdp_like.kernels.hopper_warps")
        with _modules(**{"yafsdp_like.kernels.hopper_warps": warps}):
            return _loaded("yafsdp_like.kernels.prefill_hopper")


def launch(
    hopper: ModuleType,
    arguments: tuple[Tensor, KVPages, AttentionBatch, Tensor],
    window: int | None,
    num_programs: int,
) -> None:
    """Launch so many programs, one after the other, with the arguments of `prefill_attention`."""
    q, pages, batch, out = arguments
    assert batch.tiles is not None
    group = q.shape[1] // pages.num_kv_heads
    for program in range(num_programs):
        _thread.program, _thread.num_programs = program, num_programs
        hopper._prefill_kernel(
            Pointer.to(out),
            Pointer.to(q),
            pages.keys,
            pages.values,
            Pointer.to(batch.page_table),
            Pointer.to(batch.tiles),
            torch.tensor(pages.num_kv_heads),
            *pages.scales,
            *q.stride()[:2],
            *out.stride()[:2],
            batch.page_table.stride(0),
            **hopper.constants(group, window or 0, pages.page_size, pages.head_dim),
        )
