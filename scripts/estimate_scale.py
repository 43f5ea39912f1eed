"""Estimate on paper, from measurements on two GPUs, forward and backward over the unsharded floor on 4 to 1,024.

    python scripts/estimate_scale.py --out scripts/results/<date>-scale-estimate.json

Run it with PYTHONPATH=. in a checkout; it needs no GPU. The model, the unsharded times and the memory taken beside
weights are read from reports of `bench_train.py` on two GPUs (`--reports`), the rest is named with its source in
`bench/scale.py`, which also says how a step is put together. Memory is the runtime's own plan for that many ranks.

Two cases (easy and hard) stand for what is not known. What is estimated for two GPUs is compared with what the reports
measured, as one CUDA graph, since only that is not bound by the CPU at T 1024. `from measured` puts what an estimate
differs by from that for two GPUs on top of what two GPUs measured. The last line of output is one JSON object.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.help import HelpAsWritten

RESULTS = Path(__file__).parent / "results"
REPORTS = [RESULTS / "2026-11-23-h200x2-8b-eager.json", RESULTS / "2026-11-23-h200x2-8b-eager-t8192.json"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Estimate, print the tables, and print and write the JSON object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpAsWritten)
    parser.add_argument("--reports", type=Path, nargs="+", default=REPORTS, help="of bench_train.py on two GPUs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the final JSON object here too")
    options = parser.parse_args(arguments)
    from bench.scale_report import run  # takes seconds

    run(options.reports, options.out, arguments)


if __name__ == "__main__":
    main()
