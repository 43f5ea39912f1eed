"""One server of ranks that compute together: the answers of one rank alone, and the same done on all, to the end."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import torch
import torch.distributed as dist

from launch import serve
from launch.inference import LoadedModel
from launch.options import SERVE
from tests.inference.engine.test_engine import check_idle
from tests.inference.http.servers import (
    COMPLETIONS,
    GREEDY,
    PROMPT,
    SECONDS,
    Running,
    Slow,
    make_decoder,
    make_engine,
    requests,
    serving,
)
from tests.inference.http.servers import drawn as drawn_from
from tests.inference.text.test_codec import write_tokenizer
from tests.ranks import PRELOADED, run_ranks
from yafsdp_like.comm.tp_group import TPGroup, world_tp_group
from yafsdp_like.inference.engine import tp_driver as together
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import FinishReason, QueueFullError, Request
from yafsdp_like.inference.engine.tp_driver import TPCommand, TPDriver, follow
from yafsdp_like.inference.http.service import Service, ServiceState
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.weights.loading import world_transport
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models.hf import save_hf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from yafsdp_like.inference.engine.metrics import Metrics

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
SMALL = ["--device=cpu", "--kv-memory=1MiB", "--max-batch-size=4", "--max-batch-tokens=64", "--port=0"]
LONG: dict[str, Any] = {**GREEDY, "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True}
FEW_PAGES = 1 << 15  # bytes on each rank, of 128 for a token's keys and values


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer, and the small decoder of `make_engine`."""
    made = tmp_path_factory.mktemp("model")
    save_hf(make_decoder(Codec.load(write_tokenizer(made))), made)
    return str(made)


@dataclass(frozen=True)
class Text:
    """What one rank alone says to a prompt, greedily."""

    prompt: tuple[int, ...]
    num_tokens: int
    text: str


@pytest.fixture(scope="module")
def texts(directory: str) -> list[Text]:
    """Of 40 tokens each, and the last one of 200."""
    codec = Codec.load(Path(directory))
    engine, ids = make_engine(codec), codec.encode(PROMPT * 3)

    def said(prompt: tuple[int, ...], num_tokens: int) -> Text:
        request = Request("x", prompt, SamplingParams(temperature=0), num_tokens)
        whole = codec.decode([*prompt, *engine.generate([request])["x"].ids])
        return Text(prompt, num_tokens, whole[len(codec.decode(prompt)) :])

    return [*(said(ids[: 3 + number], 40) for number in range(11)), said(codec.encode(PROMPT), 200)]


# --- in processes that stay ---


def with_server(directory: str, clients: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Metrics]:
    """What `clients(server, *arguments)` gives on the first rank, and the metrics of each, on which nothing is left."""
    codec, tp_group = Codec.load(Path(directory)), world_tp_group()
    timeout_s = options.pop("timeout_s", None)
    engine = make_engine(codec, world_transport(CPU), **options)
    result = None
    if tp_group.rank:
        follow(engine, tp_group)
    else:
        with contextlib.closing(TPDriver(engine, tp_group)) as leader:
            disturbed = leader if timeout_s is None else Slow(leader)  # type: ignore[arg-type]
            with serving(disturbed, codec, poll_interval_s=together.KEEP_ALIVE_S, timeout_s=timeout_s) as running:
                result = clients(running, *arguments)
                running.check_idle()
    check_idle(engine)
    engine._weights.close()
    return result, engine.metrics()


def said(running: Running, text: Text, stream: bool, num_pieces: int = 1000) -> str:
    """The text that follows, of a client that leaves after so many pieces."""
    body = {**GREEDY, "prompt": list(text.prompt), "max_tokens": text.num_tokens, "extra_body": {"ignore_eos": True}}
    answer = running.client().completions.create(stream=stream, **body)
    if not isinstance(answer, openai.Stream):
        return answer.choices[0].text
    with answer:
        return "".join(piece.choices[0].text for piece, _ in zip(answer, range(num_pieces), strict=False))


def ask_all(running: Running, texts: list[Text]) -> None:
    """All at once; every third leaves early, and every second of the others reads a stream."""

    def ask(number: int) -> None:
        if number % 3 == 0:
            assert texts[number].text.startswith(said(running, texts[number], stream=True, num_pieces=3))
        else:
            assert said(running, texts[number], stream=number % 2 == 0) == texts[number].text

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(ask, range(len(texts))))


@pytest.mark.slow
def test_many_clients_get_what_one_rank_alone_says_while_others_leave(directory: str, texts: list[Text]) -> None:
    """With few pages, so that sequences are preempted; and in the end all ranks have done the same."""
    (_, first), (_, second) = run_ranks(with_server, directory, ask_all, texts, kv_nbytes=FEW_PAGES)
    assert first == second
    assert first.num_preempted > 0
    assert 40 * 7 + 200 <= first.num_tokens_drawn < 40 * 11 + 200


def ask_what_cannot_be(running: Running) -> list[int]:
    """Statuses of answers: no JSON, no prompt, an unknown token, too long, fine."""
    sent = [
        {"content": b"{"},
        {"body": {**GREEDY, "prompt": []}},
        {"body": {**GREEDY, "prompt": [10**6]}},
        {"body": {**GREEDY, "prompt": [1] * 10**4}},
        {"body": {**GREEDY, "prompt": PROMPT}},
    ]
    return [running.post(COMPLETIONS, **one).status_code for one in sent]


@pytest.mark.slow
def test_a_body_that_is_no_request_is_an_error_and_the_next_is_answered(directory: str) -> None:
    (statuses, first), (_, second) = run_ranks(with_server, directory, ask_what_cannot_be)
    assert statuses == [400, 400, 400, 400, 200]
    assert first == second


def ask_for_too_much(running: Running) -> list[int]:
    """Statuses of one that takes longer than it may, and of one that does not."""
    return [running.post(COMPLETIONS, {**LONG, "max_tokens": num}).status_code for num in (200, 5)]


def test_a_deadline_ends_a_request_on_all_ranks(directory: str) -> None:
    (statuses, first), (_, second) = run_ranks(with_server, directory, ask_for_too_much, timeout_s=1.5)
    assert statuses == [504, 200]
    assert first == second
    assert first.num_tokens_drawn < 100


def refuse(directory: str) -> tuple[list[str], dict[str, FinishReason], Metrics]:
    """What the first rank refuses, how what it took ends, and what was done; requests may be two that wait."""
    codec, tp_group = Codec.load(Path(directory)), world_tp_group()
    engine = make_engine(codec, world_transport(CPU), max_waiting=2)
    refused, done = [], {}
    if tp_group.rank:
        follow(engine, tp_group)
    else:
        leader, good = TPDriver(engine, tp_group), requests(2)
        long, unknown = Request("long", (1,), max_tokens=10**6), Request("unknown", (10**6,))
        for request in (good[0], good[0], long, unknown, good[1], Request("third", (1, 2))):
            try:
                leader.add(request)
            except (ValueError, QueueFullError) as error:
                refused.append(type(error).__name__)
        leader.cancel("r1")
        leader.cancel("nobody")
        done = finished(leader)
        leader.add(Request("late", (1, 2), deadline=time.monotonic() + 3600))
        done |= finished(leader)
        leader.close()
    check_idle(engine)
    return refused, done, engine.metrics()


def finished(leader: TPDriver) -> dict[str, FinishReason]:
    """How requests end, by id, once all have."""
    done = {}
    while leader.has_work:
        done |= {output.request_id: output.finish for output in leader.step() if output.finish is not None}
    return done


def test_what_one_rank_refuses_is_refused_by_all_and_raised_where_it_was_asked(directory: str) -> None:
    (refused, done, first), (_, _, second) = run_ranks(refuse, directory)
    assert refused == ["ValueError", "ValueError", "ValueError", "QueueFullError"]
    assert done == {"r0": FinishReason.LENGTH, "r1": FinishReason.CANCELLED, "late": FinishReason.LENGTH}
    assert first == second


# --- silence ---


def serve_after_silence(directory: str, silence_s: float, keep_alive_s: float) -> list[object]:
    """Serve, be silent, and serve again, where listening may take two seconds.

    Returns what the others were sent meanwhile, or how this rank has failed.
    """
    tp_group = TPGroup(dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=2)))
    engine = make_engine(Codec.load(Path(directory)), world_transport(CPU))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(together, "KEEP_ALIVE_S", keep_alive_s)
            return follow(engine, tp_group) or [] if tp_group.rank else asyncio.run(lead(engine, tp_group, silence_s))
    except RuntimeError as error:
        return [type(error).__name__]
    finally:
        engine.check_integrity()


async def lead(engine: Engine, tp_group: TPGroup, silence_s: float) -> list[object]:
    leader, told = TPDriver(engine, tp_group), list[Any]()
    service, first = Service(leader, poll_interval_s=together.KEEP_ALIVE_S), tp_group.broadcast

    def telling(order: Any) -> Any:
        told.append(order)
        return first(order)

    tp_group.broadcast = telling  # type: ignore[method-assign]
    await service.start()
    try:
        assert await drawn_from(await service.open(requests(1))) == {"r0": 3}
        told.clear()
        await asyncio.sleep(silence_s)
        meanwhile = list(told)
        assert await drawn_from(await service.open(requests(2))) == {"r0": 3, "r1": 3}
    except RuntimeError:
        until = time.monotonic() + SECONDS
        while service.state is not ServiceState.FAILED:
            assert time.monotonic() < until, "the service has not noticed"
            await asyncio.sleep(0.01)
        raise
    finally:
        await service.close()
    leader.close()
    return meanwhile


def test_silence_may_last_longer_than_a_collective(directory: str) -> None:
    meanwhile, _ = run_ranks(serve_after_silence, directory, 2.8, 0.3)
    assert {word for word in meanwhile if word is not TPCommand.STEP} == {TPCommand.LISTEN}
    assert 2 <= meanwhile.count(TPCommand.LISTEN) <= 10  # every 0.3 to 0.6 s on an idle machine, and not all the time


def test_without_a_word_now_and_then_it_could_not(directory: str) -> None:
    """What keeps alive is what the test before says it is; and a service learns that the others are gone."""
    first, second = run_ranks(serve_after_silence, directory, 2.8, 60.0)
    assert [first, second] == [["RuntimeError"], ["RuntimeError"]]


# --- the command ---


@dataclass
class Commands:
    """launch.serve on two ranks, a process each."""

    processes: list[Any]
    logs: list[Path]
    http: httpx.Client

    def end(self) -> list[int]:
        """Exit statuses, in order of rank, of processes that end by themselves."""
        for process in self.processes:
            process.join(SECONDS)
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def serve_rank(rank: int, port: int, log: str, arguments: list[str], failing: int | None) -> None:
    """One rank of the command; with `failing` that rank's fifth step raises."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    store = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ.update({name: str(value) for name, value in {**world, **store}.items()})
    if rank == failing:
        plant_failure()
    sys.exit(serve.main(arguments))


def plant_failure() -> None:
    steps, step = iter(range(5)), Engine.step

    def failing_step(it: Engine) -> Any:
        if next(steps) == 4:
            raise ZeroDivisionError("planted")
        return step(it)

    Engine.step = failing_step  # type: ignore[method-assign]


def commands(
    directory: str, logs: Path, *arguments: str, failing: int | None = None
) -> contextlib.AbstractContextManager[Commands]:
    return rank_commands([directory, "--name=tiny", "--mode=tensor_parallel", *SMALL, *arguments], logs, failing)


@contextlib.contextmanager
def rank_commands(told: list[str], logs: Path, failing: int | None = None) -> Iterator[Commands]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    paths = [logs / f"rank{rank}.log" for rank in range(2)]
    processes = [
        context.Process(target=serve_rank, args=(rank, store.port, str(paths[rank]), told, failing), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        with httpx.Client(base_url=url_in(paths[0]), timeout=SECONDS, verify=False) as http:
            yield Commands(processes, paths, http)
    finally:
        for process in processes:
            process.kill()
            process.join()


def url_in(log: Path) -> str:
    """Where the first rank says that it listens."""
    until = time.monotonic() + 2 * SECONDS
    while "serving on " not in (text := log.read_text() if log.exists() else ""):
        assert time.monotonic() < until, text
        time.sleep(0.05)
    return text.split("serving on ")[1].split()[0]


def asked(text: Text) -> dict[str, Any]:
    return {**LONG, "prompt": list(text.prompt), "max_tokens": text.num_tokens}


def data_of(answer: httpx.Response) -> Iterator[str]:
    """What the lines of a stream say."""
    return (line.removeprefix("data: ") for line in answer.iter_lines() if line)


@pytest.mark.slow
def test_the_command_serves_and_a_signal_to_all_ranks_ends_them_after_what_runs(
    directory: str, texts: list[Text], tmp_path: Path
) -> None:
    with commands(directory, tmp_path, "--grace=30") as running:
        whole = running.http.post(COMPLETIONS, json=asked(texts[0])).json()
        assert whole["choices"][0]["text"] == texts[0].text
        with running.http.stream("POST", COMPLETIONS, json={**asked(texts[-1]), "stream": True}) as answer:
            lines = data_of(answer)
            first = next(lines)
            for process in running.processes:
                os.kill(process.pid, signal.SIGTERM)
            *rest, end = lines
        assert "".join(json.loads(line)["choices"][0]["text"] for line in [first, *rest]) == texts[-1].text
        assert end == "[DONE]"
        assert running.end() == [0, 0], running.said()
        assert running.said().count("serving on ") == 1
        assert "rror" not in running.said()


@pytest.mark.slow(unless=lambda failing: failing == 1)
@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_that_fails_on_one_rank_ends_all_with_an_error(directory: str, tmp_path: Path, failing: int) -> None:
    """Prevents: ranks that wait for one that is gone, and a first rank that answers 503 for ever."""
    with commands(directory, tmp_path, failing=failing) as running:
        with running.http.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as answer:
            *_, error, last = data_of(answer)
        assert "the engine has failed" in json.loads(error)["error"]["message"]
        assert last == "[DONE]"
        assert running.end() == [1, 1]
        assert "ZeroDivisionError: planted" in running.logs[failing].read_text()


@pytest.mark.slow
def test_who_cannot_wait_for_what_runs_may_say_so_twice(directory: str, tmp_path: Path) -> None:
    """Prevents: an engine that is still used when its ranks leave each other."""
    with commands(directory, tmp_path, "--grace=1") as running:
        with running.http.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as answer:
            lines = data_of(answer)
            next(lines)
            for _ in range(2):
                for process in running.processes:
                    os.kill(process.pid, signal.SIGINT)
                time.sleep(0.2)
            list(lines)
        assert running.end() == [0, 0], running.said()


@pytest.mark.slow
def test_torchrun_serves_and_hands_on_the_signal(directory: str, texts: list[Text], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launch.serve"]
    words += [directory, "--name=tiny", "--mode=tensor_parallel", *SMALL]
    log = tmp_path / "log"
    with open(log, "w") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        url, body = url_in(log), {**asked(texts[-1]), "stream": True}
        with httpx.stream("POST", f"{url}{COMPLETIONS}", json=body, timeout=SECONDS, verify=False) as answer:
            lines = data_of(answer)
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            *rest, _ = lines
        assert "".join(json.loads(line)["choices"][0]["text"] for line in [first, *rest]) == texts[-1].text
        process.wait(SECONDS)
        assert log.read_text().count("closing signal SIGTERM") == 2  # and nobody had to be killed
        assert "SIGKILL" not in log.read_text()
    finally:
        process.kill()
        process.wait()


# --- what is refused ---


def test_ranks_that_only_share_weights_over_a_process_group_serve_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would have requests of its own, and a step is of all."""

    @contextlib.contextmanager
    def load_model(*_: Any) -> Iterator[LoadedModel]:
        nothing: Any = None
        engine: Any = SimpleNamespace(lockstep=True, tp_group=None)
        yield LoadedModel(nothing, nothing, engine)

    monkeypatch.setattr("launch.inference.load_model", load_model)
    with pytest.raises(ValueError, match="they would have to step together"):
        serve.run(SERVE.load(["preset:tiny", "--port=0", "--mode=gathered"]))
