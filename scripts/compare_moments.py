r"""Train one configuration with moments in each format and with several seeds, and compare losses at the end.

    python scripts/compare_moments.py --out scripts/results/OUT.json --runs fp32:0,fp32:1,fp32:2,bf16:0,int8:0 \
        -- --model.preset=135m --num_steps=300

What stands behind ``--`` goes to every run of ``launch.train``, which this starts one after the other, each as one
process; ``--runs`` names each by its format and seed. A run that has ended already (below ``--directory``) is read, not
repeated. A difference between formats says something only beside the spread that runs in fp32 have among their seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from launch import config, metrics
from yafsdp_like.optim.moments import check_format

NUM_LAST = 20  # steps whose mean is a run's training loss
Run = tuple[str, int]  # format of moments, seed


def runs_of(text: str) -> list[Run]:
    """Read ``FORMAT:SEED`` pairs; ValueError for a format that there is not."""
    pairs = (item.partition(":") for item in text.split(","))
    return [(check_format(name), int(seed)) for name, _, seed in pairs]


def train(run: Run, options: list[str], directory: Path) -> list[metrics.Record]:
    """Return a run's records, after training it if there are not all of them."""
    moments, seed = run
    output = directory / f"{moments}-{seed}"
    own = [f"--optimizer.moments={moments}", f"--seed={seed}", f"--output_dir={output}", "--log.every=1"]
    arguments = [*options, *own, "--sample.num_tokens=0", "--checkpoint.export=false", "--checkpoint.every=0"]
    num_steps = config.load(arguments).num_steps
    if not (known := metrics.read_records(output)) or known[-1]["step"] < num_steps:
        command = [sys.executable, "-m", "launch.train", *arguments]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    return metrics.read_records(output)


def summary(run: Run, records: list[metrics.Record]) -> dict[str, Any]:
    """Return a run's losses, nats per token: each step's, the mean of the last ones, and on held-out text."""
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    held_out = {record["step"]: record["held_out_loss"] for record in records if "held_out_loss" in record}
    last = [losses[step] for step in sorted(losses)[-NUM_LAST:]]
    return {
        "moments": run[0],
        "seed": run[1],
        "last_loss": sum(last) / len(last),
        "held_out_loss": held_out,
        "losses": [losses[step] for step in sorted(losses)],
    }


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how far fp32's runs are from each other, and each other run from that of its seed in fp32; shares.

    Of the training loss at the end, and of the last one on held-out text.
    """

    def ends(row: dict[str, Any]) -> dict[str, float]:
        return {"last_loss": row["last_loss"], "held_out_loss": row["held_out_loss"][max(row["held_out_loss"])]}

    wide = {row["seed"]: ends(row) for row in rows if row["moments"] == "fp32"}
    found: dict[str, Any] = {}
    for name in ("last_loss", "held_out_loss"):
        values = [end[name] for end in wide.values()]
        found[f"fp32_spread_of_{name}"] = (max(values) - min(values)) / min(values) if len(values) > 1 else None
    found["from_fp32_of_the_seed"] = [
        {"moments": row["moments"], "seed": row["seed"]}
        | {name: value / wide[row["seed"]][name] - 1 for name, value in ends(row).items()}
        for row in rows
        if row["moments"] != "fp32" and row["seed"] in wide
    ]
    return found


def main(arguments: list[str]) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--runs", type=runs_of, default=runs_of("fp32:0,fp32:1,fp32:2,bf16:0,int8:0"))
    parser.add_argument("--directory", type=Path, default=Path("runs/compare_moments"), help="of the runs")
    parser.add_argument("--num-threads", type=int, help="of each run on a CPU")
    parser.add_argument("options", nargs="*", help="of launch.train, behind --")
    given = parser.parse_args(arguments)
    if given.num_threads is not None:
        torch.set_num_threads(given.num_threads)
    rows = []
    for run in given.runs:
        rows.append(summary(run, train(run, given.options, given.directory)))
        report = {
            "command": ["scripts/compare_moments.py", *arguments],
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **compared(rows),
            "runs": rows,
        }
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name != "runs"}))


if __name__ == "__main__":
    main(sys.argv[1:])
