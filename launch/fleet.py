"""Serve one pool of models on many GPUs or hosts, by Ray Serve: a replica of the pool on each, one address for all.

    python -m launch.fleet configs/serve_pool.yaml --max-replicas=8            # on a running Ray cluster, or alone
    serve run launch.fleet:build pool=configs/serve_pool.yaml max_replicas=8   # by Ray's own command

Owns the options, and checks them before Ray is imported. The pool's file is read by every replica, and so must be where
each finds it; of its server's options those of connections, port and access log are Ray's here. docs/fleet.md says how
to run it on Kubernetes and SLURM. Needs Ray, and what a server needs (`pip install 'yafsdp_like[serve,fleet]'`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch.command_line import exit_status
from launch.options import FLEET, FleetOptions


def build(arguments: Mapping[str, Any]) -> Any:
    """Return the application, for `serve run launch.fleet:build` and the files of `serve deploy`.

    ``arguments`` are fields of ``FleetOptions``, as values or as text; host and port are Ray's then. Raises ValueError
    for what is none of them, and ImportError without Ray.
    """
    check_packages()
    from pydantic import TypeAdapter

    from launch.ray_fleet import application

    return application(TypeAdapter(FleetOptions).validate_python(dict(arguments)))


def check_packages() -> None:
    """Raise ImportError where Ray Serve is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError("a fleet needs a package that is not here: pip install 'yafsdp_like[serve,fleet]' (no ray)")


def run(options: FleetOptions) -> None:
    """Deploy, and serve until a signal comes."""
    check_packages()
    from launch.ray_fleet import serve_fleet

    serve_fleet(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    options = FLEET.answer([*sys.argv[1:]] if arguments is None else [*arguments])
    return options if isinstance(options, int) else exit_status(run, options)


if __name__ == "__main__":
    sys.exit(main())
