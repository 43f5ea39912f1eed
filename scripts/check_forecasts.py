r"""Put what is planned of measured training runs beside what was measured: nothing is measured, and no GPU is needed.

    python scripts/check_forecasts.py scripts/results/<date>-h200x2-8b-whole.json ... \
        --out scripts/results/<date>-forecasts.json

Run it with PYTHONPATH=. in a checkout. Every row of this package in reports of `bench_train.py` is forecast as
`launch.plan` would, with the rate of copies that the report's machine was measured to have and published figures for
the rest. What is older than a change that a forecast knows is left out, with the reason (`bench/forecasts.py`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from bench.forecasts import IN_GIB, IN_MS, Forecasts, runs_of
from bench.help import HelpAsWritten
from bench.report import Row, write

KIND = "planned beside what was measured before; nothing was measured anew"


def line_of(row: Row) -> str:
    """Return one row as text: planned / measured, and their ratio."""
    cells = [
        f"{row['report'][11:]:36} {row['impl']:44} {row['checkpointing']:5} {row['batch_size']} x {row['seq_len']:5}"
    ]
    for name in (*IN_GIB, *IN_MS):
        if name in row:
            planned, measured = row[name]["planned"], row[name]["measured"]
            cells.append(f"{name} {planned:.2f} / {measured:.2f} ({planned / measured:.3f})" if measured else name)
    return "  ".join(cells) + ("  fitted" if row["fitted"] else "")


def main() -> None:
    """Read reports, forecast their runs, print a line of each; `--out` gets all as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpAsWritten)
    parser.add_argument("reports", nargs="+", type=Path, help="of bench_train.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all rows as JSON")
    options = parser.parse_args()
    forecasts, rows = Forecasts(), list[Row]()
    for path in options.reports:
        for run in runs_of(path.stem, json.loads(path.read_text())):
            rows.append(forecasts.beside(run))
            print(line_of(rows[-1]), flush=True)
            if options.out is not None:
                write({"command": f"python {shlex.join(sys.argv)}", "kind": KIND, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
