"""Figures of GPUs: what their data sheets promise, and what was measured to be sustained. No other file states them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
