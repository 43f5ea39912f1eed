"""Figures of GPUs: what their data sheets promise, and what was measured to be sustained. No other file states them.

[Note: where measurements are kept]
``python -m launch.doctor`` measures a machine and writes a ``MachineRates`` as JSON to
``$XDG_CACHE_HOME/yafsdp/machine/HOST-DEVICE-RANKS.json`` (``~/.cache`` without that variable), or to the file that the
environment variable ``YAFSDP_MACHINE`` names. Plans and predictions read it there; for what it does not have, and for
machines that nobody has measured, the published figures of this file stand in, and whoever predicts says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

# Dense bf16 TFLOP/s in NVIDIA's data sheets, by a part of the device's name.
PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.05,
    "L4": 121.0,
    "A10": 125.0,
}
SIZES = ("context_nbytes", "communicator_nbytes")  # of what a machine was measured to take, not rates
MACHINE_VARIABLE = "YAFSDP_MACHINE"  # names the file of this machine's measurements


@dataclass(frozen=True)
class Rates:
    """What a device sustains, per second: for explanations, and no place depends on it."""

    flops: float  # of whole layers in bf16
    memory_nbytes: float  # read from its own memory, or copied inside it: read and written
    host_nbytes: float  # from pinned host memory
    peer_nbytes: float  # from another device


@dataclass(frozen=True)
class Hardware:
    """A kind of device."""

    name: str
    num_multiprocessors: int
    rates: Rates | None = None  # None: not measured

    @classmethod
    def of(cls, device: torch.device) -> Hardware | None:
        """Return what ``device`` is; None for a CPU."""
        if device.type != "cuda":
            return None
        found = torch.cuda.get_device_properties(device)
        return cls(found.name, found.multi_processor_count, H200_RATES if "H200" in found.name else None)


H200_RATES = Rates(500e12, 4.25e12, 52.7e9, 390e9)
H200 = Hardware("H200", 132, H200_RATES)


@dataclass(frozen=True)
class ProductRate:
    """A matrix product, (rows, inner) by (inner, columns), and its operations per second, back to back."""

    rows: int
    inner: int
    columns: int
    flops: float

    @property
    def num_operations(self) -> int:
        """Count the operations of the product: a multiplication and an addition each."""
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class CollectiveRate:
    """A collective over the ranks that were there: its full size, and what crosses each rank's link per second."""

    name: str  # "all_gather" or "reduce_scatter"
    nbytes: int  # of the whole, on one rank
    bus_nbytes: float  # nbytes * (ranks - 1) / ranks / seconds


@dataclass(frozen=True)
class MachineRates:
    """What one machine was measured to sustain; rates are bytes or operations per second. None: not measured.

    ``launch.doctor`` makes and stores it, ``machine_rates`` reads it, and ``shard/forecast/step_time.py`` predicts
    steps from it.
    """

    device: str  # the GPU's name, or the CPU's architecture
    source: str  # "measured ..." or "published ...": what predictions say that they rest on
    num_ranks: int = 1  # that were measured together
    product_flops: float | None = None  # of large bf16 matrix products, sustained
    product_s: float | None = None  # what each takes beyond that, to fill and empty the device; see ``product_seconds``
    attention_flops: float | None = None  # of causal attention in bf16, counting what is not masked
    memory_nbytes: float | None = None  # copied inside the device: read and written
    to_device_nbytes: float | None = None  # from pinned host memory
    to_host_nbytes: float | None = None  # to pinned host memory
    pageable_to_device_nbytes: float | None = None
    pageable_to_host_nbytes: float | None = None
    peer_nbytes: float | None = None  # from another device, by the copy engine
    pinning_nbytes: float | None = None  # of host memory pinned
    kernel_s: float | None = None  # the least that a kernel keeps the device busy, one behind another
    launch_s: float | None = None  # of the CPU: launching a small kernel from Python
    operation_s: float | None = None  # of the CPU: a torch operation, views aside, in an eager forward and backward
    unit_s: float | None = None  # of the CPU: the sharding of one unit, in the same
    python_s: float | None = None  # of the CPU: a fixed loop in Python, to compare machines
    context_nbytes: int | None = None  # of the device: CUDA's context
    communicator_nbytes: int | None = None  # of the device: NCCL's, after an all-gather and a reduce-scatter
    products: tuple[ProductRate, ...] = ()
    collectives: tuple[CollectiveRate, ...] = ()

    def or_else(self, other: MachineRates) -> MachineRates:
        """Return the same, with ``other``'s figures where this has none."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        missing = [name for name, value in values.items() if value is None or value == ()]
        found = {name: getattr(other, name) for name in missing}
        if not any(found.values()):
            return self
        return dataclasses.replace(self, **found, source=f"{self.source}; where it has none, {other.source}")

    def slowest(self, everyone: Sequence[MachineRates]) -> MachineRates:
        """Return the least rates, and the longest times and largest sizes, of all ranks' measurements."""
        found: dict[str, Any] = {}
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith(("_flops", "_nbytes", "_s"))):
            values = [value for there in everyone if (value := getattr(there, name)) is not None]
            is_rate = not name.endswith("_s") and name not in SIZES
            found[name] = (min if is_rate else max)(values) if values else None
        for name, rate in (("products", "flops"), ("collectives", "bus_nbytes")):
            rows = zip(*(getattr(there, name) for there in everyone), strict=False)
            found[name] = tuple(min(row, key=lambda one: getattr(one, rate)) for row in rows)
        return dataclasses.replace(self, **found)

    def product_seconds(self, num_operations: float, num_products: int) -> float | None:
        """Return the seconds of so many matrix products of so many operations together; None where no rate is known.

        By the rate of the measured product nearest in size, if sustained: a product is measured for a few milliseconds,
        in which clocks may be higher than ``product_flops`` sustains. Where no sizes were measured, by that rate and
        ``product_s``.
        """
        each = num_operations / max(1, num_products)
        nearest = min(
            self.products,
            key=lambda p: max(p.num_operations, each) / max(1.0, min(p.num_operations, each)),
            default=None,
        )
        flops = min((rate for rate in (self.product_flops, nearest and nearest.flops) if rate), default=None)
        if flops is None:
            return None
        beyond = self.product_s if nearest is None else self.kernel_s
        return num_operations / flops + num_products * (beyond or 0.0)

    def collective_nbytes(self, name: str, nbytes: int) -> float | None:
        """Return the bus rate of a collective of ``nbytes``, from the size measured that is nearest; None without."""
        sizes = [rate for rate in self.collectives if rate.name == name]
        nearest = min(sizes, key=lambda rate: max(rate.nbytes, nbytes) / max(1, min(rate.nbytes, nbytes)), default=None)
        return None if nearest is None else nearest.bus_nbytes

    def save(self, path: Path) -> None:
        """Write JSON; a reader sees the old file or the new one. Raises ``OSError`` where there is no place for it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        aside.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)

    @classmethod
    def load(cls, path: Path) -> MachineRates:
        """Read what ``save`` wrote. Raises ``ValueError``, with the path and the fix, for what is no such file."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for name, kind in (("products", ProductRate), ("collectives", CollectiveRate)):
                found[name] = tuple(kind(**row) for row in found.get(name, ()))
            rates = cls(**found)
            _check_numbers(rates)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no measurements of a machine ({error}): run python -m launch.doctor, or remove the file"
            ) from error
        return rates


def _check_numbers(rates: MachineRates) -> None:
    """Raise ``ValueError`` for a rate or a time that is no positive number."""
    records: tuple[Any, ...] = (rates, *rates.products, *rates.collectives)
    for record in records:
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            is_text = field.name in ("device", "source", "name")
            if is_text != isinstance(value, str) and value is not None:
                raise ValueError(f"{field.name} is {value!r}")
            if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
                raise ValueError(f"{field.name} is {value}")


def machine_path(device: str, num_ranks: int = 1) -> Path:
    """Return where this machine's measurements are: see [Note: where measurements are kept]."""
    if given := os.environ.get(MACHINE_VARIABLE):
        return Path(given).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{platform.node()}-{device}")
    return cache / "yafsdp" / "machine" / f"{name}-{num_ranks}.json"


def machine_rates(device: str | None = None, num_ranks: int = 1) -> MachineRates:
    """Return this machine's measured rates, or published ones; ``source`` says which.

    ``device``: the name of a GPU, as ``torch.cuda.get_device_name`` returns it, or of a processor; None: this machine's
    first GPU, and without one an H200, since plans are drawn on machines that have none. Measurements of another number
    of ranks serve where there are none of ``num_ranks``. Raises ``ValueError`` for a file that cannot be read as
    measurements, and for one that ``YAFSDP_MACHINE`` names and that is not there.
    """
    name = device or (torch.cuda.get_device_name(0) if torch.cuda.is_available() else H200_MACHINE.device)
    published = published_rates(name, num_ranks)
    path = machine_path(name, num_ranks)
    if not path.exists() and os.environ.get(MACHINE_VARIABLE):
        raise ValueError(f"{MACHINE_VARIABLE} names {path}, and there is no such file: run python -m launch.doctor")
    others = sorted(path.parent.glob(f"{path.stem.rpartition('-')[0]}-*.json"), reverse=True)
    found = next((there for there in (path, *others) if there.exists()), None)
    return published if found is None else MachineRates.load(found).or_else(published)


def published_rates(device: str, num_ranks: int = 1) -> MachineRates:
    """Return what is known of a device by its name: an H200's figures, with its own data sheet's product rate.

    Other devices' products are taken to reach the same share of their data sheet's peak as an H200's; everything else
    is an H200's, which ``source`` says.
    """
    base = H200_ALONE if num_ranks == 1 else H200_MACHINE
    if "H200" in device:
        return base
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in device), None)
    scale = 1.0 if peak is None else peak / PEAK_TFLOPS["H200"]
    known = "nothing is known" if peak is None else "only the peak of matrix products is known"
    assert base.product_flops is not None and base.attention_flops is not None
    return dataclasses.replace(
        base,
        source=f"{base.source}, since {known} of {device}",
        product_flops=scale * base.product_flops,
        attention_flops=scale * base.attention_flops,
    )


# Rates of products, and the CPU's times of an operation and of a unit, are fitted to measured steps and were checked on
# others (scripts/results/2026-11-30-forecasts.json). One rank's units read no other rank's memory.
H200_MACHINE = MachineRates(
    device="NVIDIA H200",
    source="published figures of two NVIDIA H200",
    num_ranks=2,
    product_flops=644e12,
    product_s=9.8e-6,
    attention_flops=500e12,
    memory_nbytes=H200_RATES.memory_nbytes,
    to_device_nbytes=H200_RATES.host_nbytes,
    to_host_nbytes=52.4e9,
    peer_nbytes=H200_RATES.peer_nbytes,
    pinning_nbytes=1.6e9,
    kernel_s=2e-6,
    launch_s=5e-6,
    operation_s=27e-6,
    unit_s=1.6e-3,
    context_nbytes=552468480,
    collectives=tuple(
        CollectiveRate(name, mib << 20, rate * 1e9)
        for name, sizes in (
            ("all_gather", ((16, 138), (64, 209), (256, 245), (512, 256))),
            ("reduce_scatter", ((16, 160), (64, 198), (256, 229), (512, 246))),
        )
        for mib, rate in sizes
    ),
)
H200_ALONE = dataclasses.replace(
    H200_MACHINE, source="published figures of one NVIDIA H200", num_ranks=1, unit_s=0.4e-3
)
