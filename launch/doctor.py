"""Measure this machine in half a minute: what is there, how fast it is, and what is set up badly.

    python -m launch.doctor                                   # this process's GPU, or the processor
    torchrun --nproc-per-node 2 -m launch.doctor --json=doctor.json      # collectives between ranks too

Prints what it finds, stores rates where plans read them (see [Note: where measurements are kept] in
``yafsdp_like/hardware.py``), and ends with a status for schedulers: 0 where all is well, 1 where a problem was found, 2
where nothing could be measured. torchrun turns any other status than 0 into 1, so a scheduler that tells 1 from 2 reads
``status`` in the JSON. What cannot be measured is a line, never a crash: no GPU, no nvidia-smi, no Triton.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from launch.command_line import Command, check_directory

USAGE = "usage: [torchrun --nproc-per-node N] -m launch.doctor [--json=FILE] [--out=FILE]"
NOTES = "Exit status: 0 all is well, 1 a problem was found, 2 nothing could be measured.\n"
FINE, PROBLEM, UNMEASURED, INTERRUPTED = 0, 1, 2, 130  # exit status
SECONDS = 24.0  # after which no probe is begun any more
ESSENTIAL = ("memory_nbytes", "product_flops")  # without which nothing can be predicted
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)


@dataclass(frozen=True)
class DoctorOptions:
    """Where measurements go, and what is measured."""

    json: str | None = None  # write all that was found to this file
    out: str | None = None  # the file of rates that plans read; null: $YAFSDP_MACHINE, or one in the user's cache
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs where the host has one for each of its ranks

    def __post_init__(self) -> None:
        if self.json is not None and os.environ.get("RANK", "0") == "0":  # which writes it
            check_directory(Path(self.json))


COMMAND = Command(USAGE, DoctorOptions, NOTES, positionals=(), flat=True)


@dataclass
class Probed:
    """What probes have found so far, by the names of `MachineRates`, and why the others have not."""

    values: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    begin: float = field(default_factory=time.perf_counter)

    def probe(self, name: str, measure: Callable[[], Any], asks_all: Callable[[bool], bool] = bool) -> None:
        """Keep what `measure` returns, or why it fails; no probe begins after `SECONDS`.

        `asks_all` is given whether this rank has time, and returns whether all have: for probes of several ranks.
        """
        if not asks_all(time.perf_counter() - self.begin < SECONDS):
            self.failures[name] = f"left out after {SECONDS:.0f} s"
            return
        try:
            self.values[name] = measure()
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"


def measure(world: Any) -> tuple[Any, dict[str, str]]:
    """Return this rank's `MachineRates`, and why what is missing is not there; called by all ranks together."""
    from launch import host_cost, probes
    from yafsdp_like.comm.consistency import all_gather_object
    from yafsdp_like.hardware import MachineRates

    device, found = world.device, Probed()

    def on_all(has_time: bool) -> bool:
        return all(all_gather_object(has_time))

    if device.type == "cuda":
        found.values["context_nbytes"] = probes.used_nbytes(device)  # asking makes the context, which counts itself
    found.probe("communicator_nbytes", lambda: probes.communicator_nbytes(world), on_all)
    found.probe("collectives", lambda: probes.collective_rates(world), on_all)
    found.probe("memory_nbytes", lambda: probes.copy_rate(device))
    large = probes.LARGE_PRODUCT[device.type]
    found.probe("product_flops", lambda: probes.product_rate(device, large, seconds=probes.SUSTAINED_S[device.type]))
    found.probe("attention_flops", lambda: probes.attention_rate(device))
    found.probe("kernel_s", lambda: probes.kernel_seconds(device))
    found.probe("launch_s", lambda: probes.launch_seconds(device))
    found.probe("python_s", probes.python_seconds)
    found.probe("products", lambda: probes.product_rates(device))
    found.probe("eager", lambda: host_cost.eager_cost(world), on_all)
    if (eager := found.values.pop("eager", None)) is not None:
        for name, seconds in (("operation_s", eager.operation), ("unit_s", eager.unit)):
            if seconds > 0:
                found.values[name] = seconds
            else:
                found.failures[name] = "less than what this machine's times vary by"
    if device.type == "cuda":
        measure_host_link(device, found)
    name = probes.device_name(device)
    source = f"measured on {platform.node()} on {datetime.date.today()} by launch.doctor"
    return MachineRates(name, source, world.size, **found.values), found.failures


def measure_host_link(device: Any, found: Probed) -> None:
    """Measure what a GPU exchanges with its host and with the next GPU; that last, since it makes a context there."""
    from launch import probes

    for name, rate in (("to_device", probes.to_device_rate), ("to_host", probes.to_host_rate)):
        found.probe(f"{name}_nbytes", partial(rate, device, True))
        found.probe(f"pageable_{name}_nbytes", partial(rate, device, False))
    found.probe("pinning_nbytes", partial(probes.pinning_rate, device))
    found.probe("peer_nbytes", partial(probes.peer_rate, device))


def transport_words(world: Any) -> tuple[str, str | None]:
    """Return which transport `auto` takes and why; and what keeps GPUs of one host from reading each other's memory."""
    from yafsdp_like.comm.choice import transport_of
    from yafsdp_like.comm.peer import Obstacle, obstacle

    group = world.mesh.get_group()
    chosen = transport_of(group, world.device, "auto").description
    if world.size == 1 or world.device.type != "cuda":
        return chosen, None
    why = obstacle(group, world.device)
    return chosen, None if why == Obstacle.SEVERAL_HOSTS else why


def report_of(world: Any) -> dict[str, Any]:
    """Return all that was found, on every rank the same; called by all ranks together."""
    from launch.findings import findings_of
    from launch.surroundings import surroundings
    from yafsdp_like.comm.consistency import all_gather_object

    rates, failures = measure(world)
    here = surroundings(world.rank)  # afterwards: looking at another GPU makes a context there
    transport, why_not = transport_words(world)
    everyone = all_gather_object((here, rates, failures))
    slowest = rates.slowest([there for _, there, _ in everyone])
    found = findings_of([there for there, _, _ in everyone], slowest, why_not)
    missing = {name: f"{words} (rank {rank})" for rank, (_, _, f) in enumerate(everyone) for name, words in f.items()}
    is_measured = all(getattr(slowest, name) is not None for name in ESSENTIAL)
    status = UNMEASURED if not is_measured else PROBLEM if any(f.level == "problem" for f in found) else FINE
    return {
        "status": status,
        "rates": slowest,
        "transport": transport,
        "findings": found,
        "not_measured": missing,
        "ranks": [there for there, _, _ in everyone],
    }


def run(options: DoctorOptions) -> int:
    """Measure, print on the first rank, store, and return the exit status."""
    from launch import doctor_words
    from launch.world import join, leave
    from yafsdp_like.hardware import machine_path

    begin = time.perf_counter()
    world = join(options.device, COLLECTIVE_TIMEOUT)
    report = report_of(world)
    rates = report["rates"]
    path = Path(options.out) if options.out else machine_path(rates.device, rates.num_ranks)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0 and report["status"] != UNMEASURED:
        try:
            rates.save(path)
        except OSError as error:
            report["not_measured"]["file of rates"] = f"cannot be written: {error}"
    if world.is_first:
        print(doctor_words.as_text(report, time.perf_counter() - begin), flush=True)
        if report["status"] != UNMEASURED:
            print(f"rates are in {path}, where plans find them", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
    leave()
    return int(report["status"])


def as_json(report: dict[str, Any]) -> dict[str, Any]:
    """Return plain values."""
    plain = {name: report[name] for name in ("status", "transport", "not_measured")}
    plain["rates"] = dataclasses.asdict(report["rates"])
    return plain | {name: [dataclasses.asdict(one) for one in report[name]] for name in ("findings", "ranks")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status; what stops it altogether is one line, and status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = COMMAND.answer(given or ["--device=auto"])
    if isinstance(options, int):
        return options
    try:
        return run(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        print(f"error: nothing could be measured: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return UNMEASURED


if __name__ == "__main__":
    sys.exit(main())
