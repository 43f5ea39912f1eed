"""Clients of a server, in a process of their own: requests from standard input, times of tokens to standard output.

    python serve_client.py PORT MODEL NUM_CONNECTIONS < requests.json > times.json

Imports the standard library only, so that it starts at once and the clients' work is small beside the server's.
"""

import asyncio
import json
import sys
import time
from typing import Any


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, start: float) -> list[float]:
    """Send one request on an open connection: when each word of the answer came, which is a token each.

    Raises RuntimeError for an answer that is no stream of events.
    """
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    writer.write(head.encode() + b"\r\n\r\n" + body)
    status = await reader.readline()
    head_lines = [status]
    while (line := await reader.readline()) not in (b"\r\n", b""):
        head_lines.append(line.lower())
    if b" 200 " not in status or not any(line.startswith(b"transfer-encoding: chunked") for line in head_lines):
        raise RuntimeError(f"expected a stream of events, found {status!r}")
    times: list[float] = []
    while size := int(await reader.readline(), 16):
        data = await reader.readexactly(size + 2)
        now = time.perf_counter() - start
        events = (line[6:] for line in data.splitlines() if line.startswith(b"data: {"))
        texts = (choice["text"] for event in events for choice in json.loads(event)["choices"])
        times += [now] * sum(len(text.split()) for text in texts)
    await reader.readline()  # behind the last part
    return times


async def work(port: int, left: list[tuple[int, float, bytes]], times: list[list[float]], start: float) -> None:
    """Take one request after the other, each from its time on; a server closes connections that wait for long."""
    writer: asyncio.StreamWriter | None = None
    while left:
        index, at, body = left.pop()
        wait_s = at - (time.perf_counter() - start)
        await asyncio.sleep(wait_s)
        if writer is None or wait_s > 0:
            if writer is not None:
                writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        times[index] = await ask(reader, writer, body, start)
    if writer is not None:
        writer.close()


async def work_all(port: int, model: str, num_connections: int, asked: list[dict[str, Any]]) -> list[list[float]]:
    """When the tokens of each request came, in seconds after the start."""
    more = {"model": model, "temperature": 0, "stream": True}
    bodies = [json.dumps({"prompt": one["prompt"], "max_tokens": one["max_tokens"], **more}).encode() for one in asked]
    left = [(index, asked[index]["at"], bodies[index]) for index in reversed(range(len(asked)))]
    times: list[list[float]] = [[] for _ in asked]
    start = time.perf_counter()
    await asyncio.gather(*(work(port, left, times, start) for _ in range(num_connections)))
    return times


if __name__ == "__main__":
    port, model, num_connections = sys.argv[1:]
    answers = asyncio.run(work_all(int(port), model, int(num_connections), json.load(sys.stdin)))
    json.dump(answers, sys.stdout)
