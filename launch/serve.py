"""Serve a model over HTTP, as OpenAI's clients expect it.

    python -m launch.serve runs/smollm2/base --port 8000
    python -m launch.serve --pool configs/serve_pool.yaml                 # several models, which take turns
    torchrun --nproc-per-node 2 -m launch.serve --pool pool.yaml         # each cut in two; rank 0 listens, for all
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

import contextlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET, socket

from launch.command_line import exit_status
from launch.options import SERVE, SERVE_POOL, ServeOptions, ServePoolOptions, check_model

PACKAGES = "fastapi", "uvicorn", "prometheus_client"  # of the extra `serve`
BACKLOG = 1024  # connections that wait, until the model is loaded


def bind(host: str, port: int) -> socket:
    """Return a socket that listens at this address; connections wait in its backlog until the model is loaded.

    Raises OSError where the address cannot be bound.
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


def run(options: ServeOptions) -> None:
    """Take the port, load the model, and serve it until a signal comes."""
    rank = int(os.environ.get("RANK", "0"))
    check_packages()

    def say(plan: str) -> None:
        if rank == 0:
            print(plan, flush=True)

    is_follower = rank > 0 and options.load.mode == "tensor_parallel"  # needs no port
    with contextlib.ExitStack() as stack:
        if not is_follower:  # now: a model takes long to load
            address = stack.enter_context(bind(options.host, options.port and options.port + rank))
        check_model(options.model)
        from launch import inference, server

        model = stack.enter_context(inference.load_model(options, say))
        if is_follower:
            server.follow_first_rank(model)
            return
        if model.engine.lockstep and model.engine.tp_group is None:
            raise ValueError(
                "these ranks cannot map each other's memory, so they would have to step together, which requests over "
                "HTTP do not; serve from one rank, with --mode=streamed if the model does not fit"
            )
        server.serve(model, options, address)


def run_pool(options: ServePoolOptions) -> None:
    """Take the port, load the models of a pool, and serve them until a signal comes."""
    is_follower = os.environ.get("RANK", "0") != "0"  # needs no port
    check_packages()
    with contextlib.ExitStack() as stack:
        if not is_follower:
            address = stack.enter_context(bind(options.host, options.port))
        from launch import pool, server, world

        stack.callback(world.leave)
        loaded = pool.load_pool(options)
        if is_follower:
            server.follow_first_pool(loaded)
        else:
            server.serve_pool(loaded, options, address)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    given = [*sys.argv[1:]] if arguments is None else [*arguments]
    if given and given[0].partition("=")[0] == "--pool":
        words = given[1:] if given[0] == "--pool" else [given[0].partition("=")[2], *given[1:]]
        pool_options = SERVE_POOL.answer(words)
        return pool_options if isinstance(pool_options, int) else exit_status(run_pool, pool_options)
    options = SERVE.answer(given)
    return options if isinstance(options, int) else exit_status(run, options)


if __name__ == "__main__":
    sys.exit(main())
