"""How the doctor's report reads: lines of text from what it found. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launch.surroundings import Gpu, Surroundings
from yafsdp_like.hardware import MachineRates
from yafsdp_like.memory.plan import readable

RATES = {  # names of rates: what they are, what one of a unit is, and the unit
    "product_flops": ("bf16 products, sustained", 1e12, "TFLOP/s"),
    "attention_flops": ("causal attention, forward and backward", 1e12, "TFLOP/s"),
    "memory_nbytes": ("copy inside the device, read and written", 1e9, "GB/s"),
    "to_device_nbytes": ("host to device, pinned", 1e9, "GB/s"),
    "to_host_nbytes": ("device to host, pinned", 1e9, "GB/s"),
    "pageable_to_device_nbytes": ("host to device, pageable", 1e9, "GB/s"),
    "pageable_to_host_nbytes": ("device to host, pageable", 1e9, "GB/s"),
    "peer_nbytes": ("from another GPU, by the copy engine", 1e9, "GB/s"),
    "pinning_nbytes": ("pinning host memory", 2**30, "GiB/s"),
    "kernel_s": ("an empty kernel, on the device", 1e-6, "us"),
    "launch_s": ("launching one, on the CPU", 1e-6, "us"),
    "operation_s": ("an operation with gradients, on the CPU", 1e-6, "us"),
    "unit_s": ("sharding of a unit, on the CPU", 1e-6, "us"),
    "python_s": ("a fixed loop in Python", 1e-3, "ms"),
    "context_nbytes": ("used before anything is allocated", 2**20, "MiB"),
    "communicator_nbytes": ("the communicator", 2**20, "MiB"),
}


def as_text(report: dict[str, Any], seconds: float) -> str:
    """Return the whole report, after `seconds`."""
    first: Surroundings = report["ranks"][0]
    lines = [", ".join(f"{name} {value}" for name, value in first.versions.items() if value)]
    lines += [gpu_words(index, gpu) for index, gpu in enumerate(first.gpus)] or ["no GPU: the processor is measured"]
    lines.append(f"{len(report['ranks'])} ranks, {first.num_cores} cores here; transport 'auto': {report['transport']}")
    lines += rate_lines(report["rates"])
    lines += [f"  not measured: {name}: {words}" for name, words in report["not_measured"].items()]
    lines += [str(finding) for finding in report["findings"]] or ["nothing is set up badly"]
    lines.append(f"status {report['status']} after {seconds:.1f} s")
    return "\n".join(lines)


def gpu_words(index: int, gpu: Gpu) -> str:
    """Return one line on a GPU."""
    parts = [f"{readable(gpu.total_nbytes)}, {readable(gpu.free_nbytes)} free"]
    if gpu.clock_mhz:
        parts.append(f"{gpu.clock_mhz} of {gpu.max_clock_mhz} MHz")
    if gpu.ecc:
        parts.append(f"ECC {gpu.ecc}")
    if gpu.links:
        parts.append(f"links {gpu.links}")
    if gpu.numa_node is not None:
        parts.append(f"NUMA node {gpu.numa_node}")
    parts.append(f"reads GPU {', '.join(map(str, gpu.reads))}" if gpu.reads else "reads no other GPU")
    return f"GPU {index}: {gpu.name}; {'; '.join(parts)}"


def rate_lines(rates: MachineRates) -> Iterator[str]:
    """Yield a line for each rate that was measured."""
    for name, (words, one, unit) in RATES.items():
        value = getattr(rates, name)
        if value is not None:
            yield f"  {words:<42} {_three_digits(value / one):>10} {unit}"
    for product in rates.products:
        sizes = f"product {product.rows} x {product.inner} x {product.columns}"
        yield f"  {sizes:<42} {_three_digits(product.flops / 1e12):>10} TFLOP/s"
    for rate in rates.collectives:
        yield f"  {f'{rate.name} of {readable(rate.nbytes)}':<42} {_three_digits(rate.bus_nbytes / 1e9):>10} GB/s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
