"""Serve a model over HTTP, as OpenAI's clients expect it.

    python -m launch.serve runs/smollm2/base --port 8000
    torchrun --nproc-per-node 2 -m launch.serve MODEL --mode gathered     # rank r listens on port 8000 + r
    torchrun --nproc-per-node 2 -m launch.serve MODEL --mode tensor_parallel     # rank 0 listens, for all

Owns the command line, the port, and the order of things: options are checked and the port is taken before anything is
imported that takes time. SIGTERM and SIGINT close the port, let what runs end within the grace period, cancel the rest,
and exit with status 0. torchrun hands them to all ranks, and kills what is left 30 s later; of ranks that compute
together the first one ends, and the others with it. A server whose engine has failed answers 503 until it is told to
end; where ranks compute together it ends at once, with status 1, and so do the others. One whose engine is stuck in a
step ends with status 3, by itself after `--stuck-after`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET, socket

from launch.options import Parser, add_model_arguments, exit_status, opened, seconds, whole

PACKAGES = "fastapi", "uvicorn", "prometheus_client"  # of the extra `serve`
KEY_VARIABLE = "YAFSDP_LIKE_API_KEY"
BACKLOG = 1024  # connections that wait, until the model is loaded


def parser() -> argparse.ArgumentParser:
    made = Parser("python -m launch.serve", "Serve a model over HTTP.")
    add_model_arguments(made, max_batch_size=32, max_batch_tokens=2048)
    group = made.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all")
    group.add_argument(
        "--port", type=whole(0, 65535), default=8000, metavar="PORT", help="of the first rank; 0: any that is free"
    )
    group.add_argument("--name", help="what requests call the model; default: the last part of MODEL, or all of it")
    group.add_argument(
        "--api-key", default=os.environ.get(KEY_VARIABLE), help=f"asked of clients; default: ${KEY_VARIABLE}, or none"
    )
    group.add_argument("--max-waiting", type=whole(1), default=1024, metavar="REQUESTS", help="more are answered 429")
    group.add_argument(
        "--max-connections", type=whole(1), default=4096, metavar="CONNECTIONS", help="more are closed at once"
    )
    group.add_argument("--timeout", type=seconds, metavar="SECONDS", help="that a request may take; default: any time")
    group.add_argument("--grace", type=seconds, default=30.0, metavar="SECONDS", help="for what runs when told to end")
    group.add_argument(
        "--stuck-after",
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="that a step may take before the server ends with status 3; 0: any time",
    )
    group.add_argument("--access-log", action="store_true", help="a line for each request")
    return made


def bound(host: str, port: int) -> socket:
    """A socket that listens at this address, so that no other can; who connects now waits. Raises OSError where it
    cannot be had.
    """
    made = socket(AF_INET6 if ":" in host else AF_INET)
    try:
        made.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(BACKLOG)  # until then, another process may bind to it, too
    except (OSError, OverflowError) as error:
        made.close()
        raise OSError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return made


def check_packages() -> None:
    """Raises ImportError, before a model is loaded for nothing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"serving needs packages that are not here: pip install 'yafsdp_like[serve]' (no {', '.join(missing)})"
        )


def run(arguments: argparse.Namespace) -> None:
    """Everything that the command does."""
    rank = int(os.environ.get("RANK", "0"))
    check_packages()

    def say(plan: str) -> None:
        if rank == 0:
            print(plan, flush=True)

    if rank and arguments.mode == "tensor_parallel":  # this rank needs no port
        with opened(arguments, arguments.max_waiting, say) as model:
            from launch.listening import serve_behind

            serve_behind(model)
        return
    address = bound(arguments.host, arguments.port and arguments.port + rank)  # now: a model takes long to load
    with address, opened(arguments, arguments.max_waiting, say) as model:
        if model.lockstep and model.team is None:
            raise ValueError(
                "these ranks cannot map each other's memory, so they would have to step together, which requests over "
                "HTTP do not; serve from one rank, with --mode=streamed if the model does not fit"
            )
        from launch.listening import serve

        serve(model, arguments, address)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit status."""
    return exit_status(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
