"""Simulate many models on few devices: how many keep their targets, by a policy of turns, on traces made from a seed.

    python scripts/simulate_pool.py --models 4,7,10,12,14 --policy all --seeds 4 --out scripts/results/<date>-NAME.json
    python scripts/simulate_pool.py --models 300 --gpus 30 --zipf 0.8 --admission 1.0
    python scripts/simulate_pool.py --gpus 1,2,4,8,64 --models 11 --per-gpu --routing all --seconds 300
    python scripts/simulate_pool.py --gpus 8,32 --models 10,12 --per-gpu --prefill-gpus 0,1,2

Run it with PYTHONPATH=. in a checkout; it needs no GPU. It makes the calls of `yafsdp_like/inference/fleet` that a
server makes, with the step times, memory and links that `bench/sim_tables.py` names with their sources; time goes from
event to event. The same options give the same figures to the byte.

A row is one number of models and devices, policy, routing and kind of switches; its figures are means over seeds,
spread is the least and most share of time. `share_of_time`: how much of the time from its arrival to its last token a
request's reader was not stalled, on average (`fleet/reader.py` says how, and where that is published).
`share_of_requests`: requests without a late token. Refused requests count as 0 in both, `..._admitted` leaves them out.
Counted is what arrives in the middle 70 % of a trace. Policies: `ours`; `first come`, which switches by request; `round
robin`, 16 steps each; `published quotas`, round robin by Aegaeon's formula. All of them compute prompts on the same
device, where Aegaeon has others for it, and all prefetch. Routing: `ours`, the rule of a fleet's router
(`fleet/routing.py`), up to three devices; `two choices`, as Ray Serve does; `home`, one device for each model.
`--prefill-gpus` has some devices compute prompts only, and the others decode what these send them. The last line of
output is one JSON object.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.help import HelpAsWritten
from bench.sim_baselines import POLICIES
from bench.sim_routing import ROUTERS
from bench.sim_run import Scenario, Simulation
from bench.sim_tables import LENGTHS, OWN_SWITCHES, PLATFORMS, PUBLISHED_SWITCHES
from bench.sim_traces import popularity, trace
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.fleet.schedule import ScheduleOptions

Row = dict[str, Any]


class SimCase(NamedTuple):
    """What differs between the rows of a report."""

    switches: str
    policy: str
    routing: str
    num_gpus: int
    num_prefill_gpus: int
    num_models: int


def cases(options: argparse.Namespace) -> Iterator[SimCase]:
    """Yield all cases that options ask for."""
    names = "switches", "policy", "routing", "gpus", "prefill_gpus", "models"
    for case in itertools.starmap(SimCase, itertools.product(*(getattr(options, name) for name in names))):
        yield case._replace(num_models=case.num_models * case.num_gpus) if options.per_gpu else case


def scenario_of(options: argparse.Namespace, case: SimCase) -> Scenario:
    """Return models on devices; kinds of models are those of the platform, again and again."""
    platform = PLATFORMS[options.platform]
    kinds = [platform.mix[index % len(platform.mix)] for index in range(case.num_models)]
    models = {f"{index:03d} {kind}": platform.models[kind] for index, kind in enumerate(kinds)}
    return Scenario(
        models,
        platform.hardware[case.switches],
        Targets(options.ttft_ms / 1e3, options.tpot_ms / 1e3),
        case.policy,
        ScheduleOptions(admission_load=options.admission),
        case.num_gpus,
        options.retries,
        routing=case.routing,
        num_prefill=case.num_prefill_gpus,
        kv_link=options.kv_link_gb * 1e9,
    )


def figures(options: argparse.Namespace, scenario: Scenario, seed: int) -> Row:
    """Return what readers saw in one trace."""
    shares = popularity(len(scenario.models), options.zipf)
    total = options.rate * len(scenario.models)
    rates = {name: share * total for name, share in zip(scenario.models, shares, strict=True)}
    tenants = [f"tenant {index}" for index in range(options.tenants)]
    asked = trace(rates, options.seconds, LENGTHS[options.lengths], seed, options.cv, tenants)
    return Simulation(scenario, asked).run().figures()


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each case."""
    for case in cases(options):
        scenario = scenario_of(options, case)
        found = [figures(options, scenario, seed) for seed in range(options.seed, options.seed + options.seeds)]
        shares = [each["share_of_time"] for each in found]
        yield {
            **case._asdict(),
            "models_per_gpu": round(case.num_models / case.num_gpus, 3),
            **averaged(found),
            "share_of_time_spread": [min(shares), max(shares)],
        }


def averaged(found: Sequence[Row]) -> Row:
    """Return the means of equal figures of several runs; of those that some have not, over the others."""
    result: Row = {}
    for name in found[0]:
        values = [each[name] for each in found if each[name] is not None]
        if not values:
            result[name] = None
        elif isinstance(values[0], dict):
            result[name] = {key: round(sum(v[key] for v in values) / len(values), 5) for key in values[0]}
        else:
            result[name] = round(sum(values) / len(values), 5)
    return result


def format_rows(found: Sequence[Row]) -> str:
    """Format rows as a table of text."""
    head = (
        "switches",
        "policy",
        "routing",
        "GPUs (for prompts)",
        "models/GPU",
        "in time",
        "requests",
        "refused",
        "first p50/p99 s",
        "switches/s",
        "busy",
    )
    lines = [head]
    for row in found:
        first, use = row["first_token_s"] or {"p50": float("nan"), "p99": float("nan")}, row["utilization"]
        lines.append(
            (
                row["switches"],
                row["policy"],
                row["routing"],
                f"{row['num_gpus']}" + f" ({row['num_prefill_gpus']})" * bool(row["num_prefill_gpus"]),
                f"{row['models_per_gpu']:g}",
                f"{row['share_of_time']:.3f}",
                f"{row['share_of_requests']:.3f}",
                f"{row['num_refused'] / row['num_requests']:.3f}",
                f"{first['p50']:.2f} / {first['p99']:.2f}",
                f"{row['switches_per_s']:.2f}",
                f"{use['prefill'] + use['decode']:.2f} + {use['switching']:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(width) for c, width in zip(line, widths, strict=True)) for line in lines)


def at_90_percent(found: Sequence[Row]) -> dict[str, float]:
    """Return the most models per GPU of each way with 90 % of the time in targets, of those that were simulated.

    A way is named by its policy, its switches, and what else differs between the rows.
    """
    more = [name for name in SimCase._fields[2:5] if len({row[name] for row in found}) > 1]
    best: dict[str, float] = {}
    for row in found:
        if row["share_of_time"] >= 0.9:
            key = ", ".join([row["policy"], row["switches"], *(f"{name} {row[name]}" for name in more)])
            best[key] = max(best.get(key, 0.0), row["models_per_gpu"])
    return best


def _parser() -> argparse.ArgumentParser:
    def names(known: Sequence[str]) -> Any:
        def read(text: str) -> list[str]:
            found = list(known) if text == "all" else text.split(",")
            if unknown := [name for name in found if name not in known]:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, or all; found {unknown[0]!r}")
            return found

        return read

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpAsWritten)
    add = parser.add_argument
    add("--platform", choices=[*PLATFORMS], default="h800", help="models and device, see bench/sim_tables.py")
    add("--models", type=numbers, default=[12], help="numbers of models")
    add("--per-gpu", action="store_true", help="numbers of models are for each device")
    add("--policy", type=names([*POLICIES]), default=["ours"], help="some of ours, first come, ..., or all")
    add("--switches", type=names([OWN_SWITCHES, PUBLISHED_SWITCHES]), default=[OWN_SWITCHES], help="or all")
    add("--gpus", type=numbers, default=[1], help="numbers of devices, to which requests are routed")
    add("--routing", type=names([*ROUTERS]), default=["ours"], help="some of ours, two choices, ..., or all")
    add("--prefill-gpus", type=numbers, default=[0], help="of the devices, that only compute prompts for the others")
    add("--kv-link-gb", type=float, default=25.0, help="GB/s of keys and values from these to the others")
    add("--rate", type=float, default=0.1, help="requests a second of each model, on average")
    add("--zipf", type=float, default=0.0, help="exponent of the models' popularity; 0: equal")
    add("--cv", type=float, default=1.0, help="of the times between arrivals; 1: Poisson, more: bursts")
    add("--lengths", choices=[*LENGTHS], default="published", help="of prompts and outputs")
    add("--tenants", type=int, default=1, help="that ask alike")
    add("--ttft-ms", type=float, default=10_000.0, help="target of the time to the first token")
    add("--tpot-ms", type=float, default=100.0, help="target of the time for each later token")
    add("--admission", type=float, default=None, help="load above which requests are refused; default: none is")
    add("--retries", type=int, default=0, help="of refused requests, when they were told to come again")
    add("--seconds", type=float, default=600.0, help="that requests arrive")
    add("--seed", type=int, default=0, help="of the first trace")
    add("--seeds", type=int, default=1, help="traces, over which figures are averaged")
    add("--out", type=Path, metavar="FILE", help="write the final JSON object here too")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print the table, and print and write the JSON object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        found = list(rows(options))
    except ValueError as error:
        parser.error(str(error))
    report = {
        "kind": "a simulation, not a measurement",
        "command": f"python scripts/simulate_pool.py {shlex.join(arguments)}".rstrip(),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "models_per_gpu_at_90_percent": at_90_percent(found),
        "rows": found,
    }
    print(f"{format_rows(found)}\n")
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
