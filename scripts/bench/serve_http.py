"""Requests over HTTP: a server in this process, as ``launch.serve`` runs it, and its clients in another.

The model's tokenizer is not needed: every token is a word of its own.
"""

import asyncio
import contextlib
import importlib.util
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from yafsdp_like.inference.engine.engine import Engine

PACKAGES = "fastapi", "uvicorn", "prometheus_client", "tokenizers", "transformers"
CLIENT = Path(__file__).with_name("serve_client.py")
MODEL = "bench"


@dataclass(frozen=True)
class Asked:
    """A request, and when it is sent, in seconds after the start."""

    at: float
    prompt: tuple[int, ...]
    max_tokens: int


def obstacle() -> str | None:
    """Why it cannot be measured here, or None."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"no {', '.join(missing)}" if missing else None


def play(engine: Engine, asked: Sequence[Asked], num_connections: int) -> list[list[float]]:
    """When the tokens of each request came, in seconds after the start, by the clients' clock.

    Raises RuntimeError where a client failed, or an answer is not as long as was asked for.
    """
    times = asyncio.run(_play(engine, asked, num_connections))
    for one, tokens_at in zip(asked, times, strict=True):
        if len(tokens_at) != one.max_tokens:
            raise RuntimeError(f"a request for {one.max_tokens} tokens was answered by {len(tokens_at)}")
    return times


async def _play(engine: Engine, asked: Sequence[Asked], num_connections: int) -> list[list[float]]:
    async with _serving(engine) as port:
        arguments = [sys.executable, str(CLIENT), str(port), MODEL, str(num_connections)]
        pipe = asyncio.subprocess.PIPE
        client = await asyncio.create_subprocess_exec(*arguments, stdin=pipe, stdout=pipe)
        answer, _ = await client.communicate(json.dumps([asdict(one) for one in asked]).encode())
        if client.returncode:
            raise RuntimeError(f"the clients ended with status {client.returncode}")
    times: list[list[float]] = json.loads(answer)
    return times


@contextlib.asynccontextmanager
async def _serving(engine: Engine) -> AsyncIterator[int]:
    """Serve while the context is open, which has the port."""
    import uvicorn

    from launch.server import serving_switches
    from yafsdp_like.inference.http.protocol import ServerOptions
    from yafsdp_like.inference.http.server import create_app
    from yafsdp_like.inference.http.service import Service

    service = Service(engine, prepare=lambda _: _use(engine.device))
    vocab_size = engine.config.vocab_size
    options = ServerOptions(model_name=MODEL, vocab_size=vocab_size, max_seq_len=engine.max_seq_len)
    app = create_app(service, words(vocab_size), options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
        if serving.done():
            serving.result()
            raise RuntimeError("the server ended before it had started")
    try:
        with serving_switches():
            yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


def words(vocab_size: int) -> Any:
    """A codec of so many words, the n-th of which is token n."""
    import tokenizers
    import transformers

    from yafsdp_like.inference.text.codec import Codec

    vocab = {f"w{number}": number for number in range(vocab_size)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    return Codec(transformers.PreTrainedTokenizerFast(tokenizer_object=model))


def _use(device: torch.device) -> None:
    """Each thread has a current GPU of its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
