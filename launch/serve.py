"""Serve a model over HTTP, as OpenAI's clients expect it.

    python -m launch.serve runs/smollm2/base --port 8000
    torchrun --nproc-per-node 2 -m launch.serve MODEL --mode gathered     # rank r listens on port 8000 + r
    torchrun --nproc-per-node 2 -m launch.serve MODEL --mode tensor_parallel     # rank 0 listens, for all

Owns the process: its options, its port, and its end. SIGTERM and SIGINT close the port, let what runs end within the
grace period, cancel the rest, and exit with status 0. torchrun hands them to all ranks, and kills what is left 30 s
later; of ranks that compute together the first one ends, and the others with it. A server whose engine has failed
answers 503 until it is told to end; where ranks compute together it ends at once, with status 1, and so do the others.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET, socket
from typing import Any

import torch

from launch.opening import Opened, opened
from launch.options import add_model_arguments, exit_status
from launch.world import rank_from_environment
from yafsdp_like.inference.service import Service, State, Stepped
from yafsdp_like.inference.together import KEEP_ALIVE_S, Leader, follow

try:
    import uvicorn

    from yafsdp_like.inference.protocol import ServerOptions
    from yafsdp_like.inference.server import create_app
except ImportError as error:  # the extra `serve`
    sys.exit(f"error: serving needs packages that are not here: pip install 'yafsdp_like[serve]' ({error})")

KEY_VARIABLE = "YAFSDP_LIKE_API_KEY"
LAST_WORDS_S = 5  # for answers to be written after the grace period
SIGNALS = signal.SIGTERM, signal.SIGINT


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m launch.serve", description="Serve a model over HTTP.")
    add_model_arguments(made, max_batch_size=32, max_batch_tokens=2048)
    made.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all")
    made.add_argument("--port", type=int, default=8000, help="of the first rank; 0: any that is free")
    made.add_argument("--name", help="what requests call the model; default: MODEL as it is given here")
    made.add_argument(
        "--api-key", default=os.environ.get(KEY_VARIABLE), help=f"asked of clients; default: ${KEY_VARIABLE}, or none"
    )
    made.add_argument("--max-waiting", type=int, default=1024, metavar="REQUESTS", help="more are answered 429")
    made.add_argument("--timeout", type=float, metavar="SECONDS", help="that a request may take; default: any time")
    made.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="for what runs when told to end")
    made.add_argument("--access-log", action="store_true", help="a line for each request")
    return made


class Server(uvicorn.Server):
    """Says where it listens, and ends what it serves before its connections."""

    def __init__(self, config: uvicorn.Config, service: Service[Any], grace_s: float, outlives_engine: bool) -> None:
        super().__init__(config)
        self._service, self._grace_s, self._outlives_engine = service, grace_s, outlives_engine

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Whether it is to end."""
        return await super().on_tick(counter) or (not self._outlives_engine and self._service.state is State.FAILED)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        draining = asyncio.create_task(self._service.drain(self._grace_s))
        await super().shutdown(sockets)
        await draining


def bound(host: str, port: int) -> socket:
    """A socket at this address that does not listen yet. Raises OSError where it cannot be had."""
    made = socket(AF_INET6 if ":" in host else AF_INET)
    try:
        made.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return made


def serve(model: Opened, arguments: argparse.Namespace, address: socket) -> None:
    """Until a signal comes, on one rank, or on the first of those that compute together. Raises RuntimeError if the
    engine has failed."""
    leader = None if model.team is None else Leader(model.engine, model.team)
    options = ServerOptions(
        model_name=arguments.name or arguments.model,
        vocab_size=model.model.config.vocab_size,
        max_seq_len=model.max_seq_len,
        api_key=arguments.api_key,
        timeout_s=arguments.timeout,
        sampling=model.sampling,
    )
    engine: Stepped = model.engine if leader is None else leader
    service = Service(engine, prepare=lambda _: _use(model.device), look_s=None if leader is None else KEEP_ALIVE_S)
    config = uvicorn.Config(
        create_app(service, model.codec, options),
        log_level="info" if arguments.access_log else "warning",
        access_log=arguments.access_log,
        ws="none",
        timeout_graceful_shutdown=int(arguments.grace) + LAST_WORDS_S,
    )
    for number in SIGNALS:  # uvicorn raises again what it was ended by
        signal.signal(number, lambda *_: None)
    Server(config, service, arguments.grace, outlives_engine=leader is None).run([address])
    if service.error is not None:
        raise RuntimeError("the engine has failed") from service.error
    if leader is not None:
        assert service.state is State.CLOSED, f"the service is {service.state.value}, and may still use the engine"
        leader.close()


def serve_behind(model: Opened) -> None:
    """On the other ranks: until the first one ends, who has requests to finish after a signal that all are sent. Raises
    RuntimeError if it has failed."""
    assert model.team is not None
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    follow(model.engine, model.team)


def _use(device: torch.device) -> None:
    """Each thread has a current GPU of its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def run(arguments: argparse.Namespace) -> None:
    """Everything that the command does."""
    rank = rank_from_environment()

    def say(plan: str) -> None:
        if rank == 0:
            print(plan, flush=True)

    if rank and arguments.mode == "tensor_parallel":  # this rank needs no port
        with opened(arguments, arguments.max_waiting, say) as model:
            serve_behind(model)
        return
    address = bound(arguments.host, arguments.port and arguments.port + rank)  # now: a model takes long to load
    with address, opened(arguments, arguments.max_waiting, say) as model:
        if model.lockstep and model.team is None:
            raise ValueError(
                "these ranks cannot map each other's memory, so they would have to step together, which requests over "
                "HTTP do not; serve from one rank, with --mode=streamed if the model does not fit"
            )
        serve(model, arguments, address)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit status."""
    return exit_status(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
