"""What one streamed token costs a server's event loop, with clients in another process.

    PYTHONPATH=.:scripts python -m bench.serve_http_time [--connections 100] [--tokens 64]

The event loop shares Python's lock with the engine, so each of its microseconds is one that the engine may miss.
Method: an engine that has a token for each request in each step, and waits until the loop has written all of the step
before, so that no two tokens are sent as one. What is counted is the CPU's time of the loop's thread in each step; the
least of all steps is that of a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from typing import Any

import torch

from bench import serve_http
from bench.serve_http import Asked
from yafsdp_like.inference.engine.request import FinishReason, Request, RequestOutput, Token
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.models.decoder import DecoderConfig

CONFIG = DecoderConfig(16, 1, 2, 1, 32, vocab_size=1024, max_seq_len=4096)
NUM_TURNS = 20  # of the event loop, in which whatever waits for a token has its turn


class PacedEngine:
    """Gives each request one token in each step, once the event loop rests."""

    def __init__(self) -> None:
        self.max_seq_len, self.device = CONFIG.max_seq_len, torch.device("cpu")
        self._loop: asyncio.AbstractEventLoop | None = None
        self.options = EngineOptions(kv_nbytes=1 << 20, max_waiting=4096)
        self._left: dict[str, int] = {}
        self.seconds: list[tuple[int, float]] = []  # of the loop's thread, and tokens, of each step
        self._last = 0, 0.0

    @property
    def config(self) -> DecoderConfig:
        """What the server asks for first, on its event loop."""
        self._loop = asyncio.get_running_loop()
        return CONFIG

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._left)

    @property
    def rest_s(self) -> float:
        """A step is always due."""
        return 0.0

    def add(self, request: Request) -> None:
        """Take a request."""
        self._left[request.id] = request.max_tokens

    def cancel(self, request_id: str) -> None:
        """End a request, which has no last output."""
        self._left.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        """Return the next token of each request."""
        now = self._await_rest()
        num_tokens, before = self._last
        self.seconds.append((num_tokens, now - before))
        outputs = []
        for name, left in list(self._left.items()):
            self._left[name] = left - 1
            if left == 1:
                del self._left[name]
            finish = FinishReason.LENGTH if left == 1 else None
            outputs.append(RequestOutput(name, (Token(left % CONFIG.vocab_size),), finish))
        self._last = len(outputs), now
        return outputs

    def _await_rest(self) -> float:
        """Wait until the event loop has done all that it had to do, and return the CPU's seconds of its thread."""
        loop = self._loop
        assert loop is not None
        has_rested, found = threading.Event(), list[float]()

        def turn(left: int) -> None:
            if left:
                loop.call_soon(turn, left - 1)
            else:
                found.append(time.thread_time())
                has_rested.set()

        loop.call_soon_threadsafe(turn, NUM_TURNS)
        has_rested.wait()
        return found[0]

    def metrics(self) -> Any:
        """Nobody asks for any."""
        raise NotImplementedError


def token_us(num_connections: int, num_tokens: int) -> list[float]:
    """The CPU's us of the loop's thread for a token, of each step in the middle of all answers, in rising order."""
    engine: Any = PacedEngine()
    serve_http.play(engine, [Asked(0.0, (1, 2, 3), num_tokens)] * num_connections, num_connections)
    return sorted(1e6 * seconds / count for count, seconds in engine.seconds if count == num_connections)


def main() -> None:
    """Print the costs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    us = token_us(options.connections, options.tokens)
    print(f"us of the event loop's thread for a token: least {us[0]:.1f}, median {us[len(us) // 2]:.1f}")


if __name__ == "__main__":
    main()
