"""launch.fleet: its options, its document, and two replicas of a pool behind one address, of which one dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from launch import fleet
from launch.options import FLEET, FleetOptions
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.fleet.standing import ModelStanding, Standing
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.models.hf import save_hf

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SECONDS = 240.0  # that nothing here should take, on the slowest machine
POOL = "ServeReplica:yafsdp_like:Pool"  # in the title of a replica's process
MANY = 8192  # tokens, which take longer than a process takes to die
FILE = """
device: cpu
grace_s: 2
models:
  one: {path: %(directory)s, %(targets)s engine: {max_batch_size: 4, max_batch_tokens: 64}}
  two: {path: %(directory)s, %(targets)s engine: {max_batch_size: 4, max_batch_tokens: 64}}
pool: {memory_limit_nbytes: 32MiB}
"""


# --- options ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--min-replicas=3"], "1 <= min_replicas <= max_replicas, found 3 and 1"),
        (["--aim-load=0.9"], "0 < aim_load < high_load"),
        (["--gpus=-1"], "nothing below 0"),
        (["--port=0"], "a port from 1 to 65535"),
        (["--replicas=3"], "unknown"),
    ],
)
def test_mistakes_in_options_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet.main(["pool.yaml", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_fleet_without_ray_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fleet.main(["pool.yaml"]) != 0
    assert "pip install 'yafsdp_like[serve,fleet]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of what Ray imports
def test_options_of_a_deployed_file_are_values_or_text_and_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_fleet = pytest.importorskip("launch.ray_fleet", exc_type=ImportError)
    monkeypatch.setattr(ray_fleet, "application", lambda options: options)
    text = {"pool": "pool.yaml", "max_replicas": "8", "gpus": "0.5"}
    assert fleet.build(text) == fleet.build({"pool": "pool.yaml", "max_replicas": 8, "gpus": 0.5})
    assert fleet.build(text) == FleetOptions("pool.yaml", max_replicas=8, gpus=0.5)
    for wrong, words in (
        ({"replicas": 8}, "replicas"),
        ({"max_replicas": "many"}, "max_replicas"),
        ({"min_replicas": 3}, "found 3 and 1"),
    ):
        with pytest.raises(ValueError, match=words):
            fleet.build({"pool": "pool.yaml", **wrong})


def test_what_is_installed_for_a_fleet_is_enough_for_its_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    assert set(setup["SERVE"]) < set(setup["FLEET"])


# --- two replicas ---


class Fleet:
    """A process of launch.fleet, the Ray that it began, and what it has said."""

    def __init__(self, file: Path, *arguments: str) -> None:
        self.home = tempfile.mkdtemp(prefix="fleet")  # short: Ray makes sockets in it
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": self.home,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a" * 64,  # or Ray writes one into the home directory
            "RAY_raylet_start_wait_time_s": f"{SECONDS:.0f}",
            "RAY_agent_register_timeout_ms": f"{1000 * SECONDS:.0f}",  # or Ray's daemon dies on a busy machine
            "PYTHONPATH": str(ROOT),
        }
        options = (f"--port={free_port()}", "--gpus=0", "--cpus=0", "--report=0.2", *arguments)
        self.said = Path(self.home) / "said"  # not a pipe, which Ray's log would fill
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch.fleet", str(file), *options],
                cwd=ROOT,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            until(lambda: "serving on " in self.said.read_text() or self.process.poll() is not None)
            serves = re.search(r"^serving on (\S+)", self.said.read_text(), re.MULTILINE)
            assert serves is not None, self.said.read_text()
        except BaseException:
            self.end()
            raise
        self.http = httpx.Client(base_url=serves[1], timeout=SECONDS)

    def end(self) -> None:
        """End everything that was begun here."""
        self.process.kill()
        for pid in self.pids(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def pids(self, title: str) -> list[int]:
        """Processes of this fleet whose titles hold these words."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_own = f"RAY_TMPDIR={self.home}\0".encode() in (process / "environ").read_bytes()
                if is_own and title in (process / "cmdline").read_text():
                    found.append(int(process.name))
        return found

    def ask(self, model: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        """Ask for a few tokens."""
        body = {"model": model, "prompt": "The quick brown fox", "max_tokens": 4, "temperature": 0, **more}
        return self.http.post("/v1/completions", json=body, headers=headers)

    @contextlib.contextmanager
    def stream(self, model: str, max_tokens: int = MANY) -> Iterator[tuple[str, Iterator[dict[str, Any] | str]]]:
        """Ask for many tokens, and yield whose answer it is, and its events."""
        body = {"model": model, "prompt": "a", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            yield answer.headers["x-replica"], events(answer)

    def replicas(self) -> set[str]:
        """The replicas that say how they stand."""
        found = self.http.get("/status.json").json()["replicas"]
        assert f'yafsdp_like_replica_up{{replica="{min(found)}"}} 1.0' in self.http.get("/metrics").text
        return set(found)

    def num_running(self, replica: str) -> int:
        """Requests that a replica has under way."""
        answer = self.http.get("/status.json", headers={"x-replica": replica})
        assert answer.headers["x-replica"] == replica
        figures = answer.json()["figures"]
        return int(figures["num_running"] + figures["num_waiting"])


def events(answer: httpx.Response) -> Iterator[dict[str, Any] | str]:
    """Yield what the lines of a stream say."""
    for line in answer.iter_lines():
        if line:
            said = line.removeprefix("data: ")
            yield said if said == "[DONE]" else json.loads(said)


def free_port() -> int:
    """Return a port that nobody listens on."""
    import socket

    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def until(what: Any) -> None:
    """Wait for it to be true."""
    ends = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < ends, "it has not come true"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ray")
    directory = tmp_path_factory.mktemp("fleet") / "base"
    directory.mkdir()
    codec = Codec.load(write_tokenizer(directory))
    decoder = Decoder(DecoderConfig(32, 2, 4, 2, 64, vocab_size=codec.vocab_size, max_seq_len=2 * MANY))
    decoder.init_weights(0)
    save_hf(decoder, directory)
    for name, targets in (("pool", ""), ("targets", "tpot_ms: 0.2,")):  # which one stream alone misses
        (directory.parent / f"{name}.yaml").write_text(FILE % {"directory": directory, "targets": targets})
    return directory.parent / "pool.yaml"


@pytest.fixture
def running(file: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    name, *arguments = request.param
    made = Fleet(file.with_name(name), *arguments)
    try:
        yield made
    finally:
        made.http.close()
        made.end()


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize("running", [("pool.yaml", "--min-replicas=2", "--max-replicas=2")], indirect=True, ids=[""])
def test_models_find_their_replicas_and_a_replica_that_dies_ends_its_streams_and_no_others(running: Fleet) -> None:
    until(lambda: len(running.replicas()) == 2)
    alone = running.ask("one")
    assert alone.status_code == 200, alone.text
    home = alone.headers["x-replica"]
    assert [running.ask("one").headers["x-replica"] for _ in range(3)] == [home] * 3, "it is awake there"

    with running.stream("one", 12) as (replica, said):
        found = [each for each in said if isinstance(each, dict)]
        assert replica == home and sum(bool(each["choices"][0]["text"]) for each in found) > 1, "it comes in parts"
    assert running.ask("none").status_code == 404 and running.ask("one", n=0).status_code == 400
    assert running.http.post("/admin/models/one/sleep").status_code == 501
    assert {each["id"] for each in running.http.get("/v1/models").json()["data"]} == {"one", "two"}

    with running.stream("one") as (replica, said):
        assert replica == home and next(said)
        other = running.ask("two").headers["x-replica"]
        assert other != home, "it sleeps in both, and one has time"
    until(lambda: running.num_running(home) == 0)  # what a client leaves is cancelled
    assert running.ask("two").headers["x-replica"] == other

    with running.stream("one") as (replica, said), running.stream("two") as (second, its):
        assert (replica, second) == (home, other) and next(said) and next(its)
        before = set(running.pids(POOL))
        for pid in before:
            if any(home in os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()):  # its log
                os.kill(pid, signal.SIGKILL)
        until(lambda: home not in running.replicas())  # whose figures go on, of the other one
        *_, lost, done = said
        assert isinstance(lost, dict) and lost["error"]["code"] == "replica_lost" and done == "[DONE]"
        assert isinstance(next(its), dict), "the other stream goes on"
        again = running.ask("one")
        assert again.status_code == 200 and again.headers["x-replica"] == other
        assert again.json()["choices"] == alone.json()["choices"]
    until(lambda: len(set(running.pids(POOL)) - before) == 1)  # another is begun
    with running.stream("two") as (replica, said):
        assert replica == other and next(said)
        until(lambda: len(running.replicas()) == 2)
        (fresh,) = running.replicas() - {other}
        served = running.ask("one", headers={"x-replica": fresh})
        assert served.headers["x-replica"] == fresh and served.json()["choices"] == alone.json()["choices"]
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(SECONDS) == 0, running.said.read_text()


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize(
    "running",
    [("targets.yaml", "--min-replicas=1", "--max-replicas=2", "--up-after=1", "--down-after=1")],
    indirect=True,
    ids=[""],
)
def test_a_replica_is_added_while_another_has_no_time_and_taken_away_when_it_has(running: Fleet) -> None:
    ended = threading.Event()

    def read() -> None:
        """Keep a model at work."""
        while not ended.is_set():
            with contextlib.suppress(AssertionError), running.stream("one") as (_, said):  # unless it is refused
                for _ in said:
                    if ended.is_set():
                        return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        until(lambda: running.ask("two").status_code == 429)
        refused = running.ask("two")
        assert refused.status_code == 200 or float(refused.headers["retry-after"]) >= 1
        until(lambda: len(running.pids(POOL)) == 2)
        until(lambda: running.ask("two").status_code == 200)
    finally:
        ended.set()
        reader.join()
    until(lambda: len(running.pids(POOL)) == 1)
    assert running.ask("one").status_code == 200 and running.ask("two").status_code == 200


# --- what Ray asks of us ---


@pytest.mark.filterwarnings("ignore")  # of what Ray imports
def test_ray_is_told_the_order_of_replicas_by_their_reports_and_by_what_was_sent_since(file: Path) -> None:
    """``file`` skips this without Ray."""
    from launch.ray_fleet import PassedRequest, PoolRequestRouter

    router = PoolRequestRouter.__new__(PoolRequestRouter)  # Ray makes it with much else, which this does not need
    router.initialize_state()
    names = {name: type("Id", (str,), {"unique_id": name})(name) for name in "xy"}

    def order(model: str, number: int, arrived: int = 0, **more: Any) -> str:
        """The order of x, where ``one`` is at work in every second report, and y, where nothing is.

        ``arrived``: the last request that has, by the reports.
        """
        candidates = []
        for name, count in (("x", number % 2), ("y", 0)):
            models = {"one": ModelStanding(count, 0.5, 1e-3, 0.25), "two": ModelStanding(0, 0.5, 1e-3, 0.25)}
            made = Standing(count / 4, models, number=number, arrived={"me": arrived})
            stats = {"number": number, "standing": pickle.dumps(made)}
            candidates.append(SimpleNamespace(replica_id=names[name], routing_stats=stats))
        pending = SimpleNamespace(args=[PassedRequest({}, b"", model, (), **more)])
        ranks = asyncio.run(router.choose_replicas(candidates, pending))
        assert all(len(rank) == 1 for rank in ranks)
        return "".join(rank[0].replica_id for rank in ranks)

    assert (order("one", 1), order("two", 1)) == ("xy", "yx")
    assert order("two", 1, replica="x") == "xy" and order("one", 1, tried=("x",)) == "y"
    assert order("one", 1, tried=("x", "y")) == "xy", "they say that they have refused it"
    asked = PassedRequest({}, b"", "two", (), "me", 7)
    router.on_request_routed(SimpleNamespace(args=[asked]), names["y"], None)
    assert order("two", 2, 6) == "yx", "the model is at work there by now, whatever the report says"
    assert (order("one", 4, 7), order("two", 4, 7)) == ("xy", "xy"), "this report says all"
    assert asyncio.run(router.choose_replicas([], None)) == []


@pytest.mark.filterwarnings("ignore")  # of what Ray imports
def test_ray_is_told_how_many_replicas_their_reports_call_for(file: Path) -> None:
    """``file`` skips this without Ray."""
    from launch.ray_fleet import LoadPolicy

    policy = LoadPolicy(0.6, 0.8)

    def wanted(there: int, refused_at: float | None = None, now: float = 0.0, **loads: float) -> int:
        points = [SimpleNamespace(value=1.0, timestamp=at) for at in (refused_at,) if at is not None]
        raw = {"num_refused": {"a": [SimpleNamespace(value=0.0, timestamp=now), *points]}}
        reports = {"aggregated_metrics": {"load": loads}, "raw_metrics": raw, "current_time": now}
        return policy(SimpleNamespace(**reports, current_num_replicas=there))[0]

    assert wanted(1, a=0.9) == 2 and wanted(2, a=0.9) == 2, "one that has not reported yet has nothing to do"
    assert wanted(2, a=0.2, b=0.2) == 1
    assert wanted(2, refused_at=5, now=6, a=0.2, b=0.2) == wanted(2, refused_at=5, now=7, a=0.2, b=0.2) == 3
    assert wanted(3, refused_at=5, now=8, a=0.2, b=0.2, c=0.2) == 1, "a refusal that there is another replica for"
    assert wanted(3, refused_at=9, now=10, a=0.2, b=0.2, c=0.2) == 4
    nothing = SimpleNamespace(aggregated_metrics=None, raw_metrics=None, current_num_replicas=1, current_time=0.0)
    assert LoadPolicy(0.6, 0.8)(nothing)[0] == 1


# --- the document, and what is beside it ---

MANIFESTS = ROOT / "configs" / "fleet"
DOCUMENT = (ROOT / "docs" / "fleet.md").read_text()


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the specifications of all pods of a manifest."""
    if manifest["kind"] == "RayService":
        cluster = manifest["spec"]["rayClusterConfig"]
        return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [item["spec"]["template"]["spec"] for item in manifest["items"] if item["kind"] == "Deployment"]


def ports(container: dict[str, Any]) -> set[int]:
    """Return the ports that a container says it listens on."""
    return {each["containerPort"] for each in container["ports"]}


@pytest.mark.parametrize("name", ["kubernetes.yaml", "rayservice.yaml"])
def test_manifests_hold_pods_whose_volumes_ports_and_options_fit(name: str) -> None:
    manifest = yaml.safe_load((MANIFESTS / name).read_text())
    found = pods(manifest)
    assert len(found) == 2
    for pod in found:
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["image"] == "IMAGE" and "YAFSDP_LIKE_API_KEY" in {each["name"] for each in container["env"]}
    if manifest["kind"] == "RayService":
        serving = yaml.safe_load(manifest["spec"]["serveConfigV2"])
        (application,) = serving["applications"]
        module, _, function = application["import_path"].partition(":")
        assert module == "launch.fleet" and callable(getattr(fleet, function))
        assert FleetOptions(**application["args"]).max_replicas == 8
        return
    services = {item["metadata"]["name"]: item["spec"] for item in manifest["items"] if item["kind"] == "Service"}
    assert services["fleet-head"]["ports"][0]["port"] == 6379 and services["fleet"]["ports"][0]["port"] == 8000
    deployments = [item["spec"] for item in manifest["items"] if item["kind"] == "Deployment"]
    for deployment in deployments:
        assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    for service in services.values():
        chosen = [
            each["template"]["spec"]["containers"][0]
            for each in deployments
            if service["selector"].items() <= each["template"]["metadata"]["labels"].items()
        ]
        assert chosen and {each["port"] for each in service["ports"]} <= set.intersection(*map(ports, chosen))
    assert all(
        pod["containers"][0]["readinessProbe"]["httpGet"]["port"] in ports(pod["containers"][0]) for pod in found
    )
    (script,) = found[0]["containers"][0]["args"]
    begins, _, serves = script.partition("&&")
    assert "--port=6379" in begins and FLEET.load(shlex.split(serves)[4:]).host == "0.0.0.0"
    assert "--address=fleet-head:6379" in found[1]["containers"][0]["command"]


@pytest.mark.filterwarnings("ignore")  # of what Ray imports
def test_ray_s_commands_have_the_options_that_they_are_given() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    texts = [(MANIFESTS / name).read_text() for name in ("kubernetes.yaml", "slurm.sh")]
    found = []
    for line in "\n".join([*texts, DOCUMENT]).splitlines():
        words = re.findall(r"[\w.-]+", line.partition(" -- ")[0].partition("&&")[0])
        name = words[words.index("ray") + 1] if "ray" in words[:-1] else ""
        if name in scripts.cli.commands:
            given = {word for word in words if word.startswith("--")}
            assert given <= {flag for each in scripts.cli.commands[name].params for flag in each.opts}, line
            found.append(name)
    assert set(found) == {"start", "symmetric-run", "get-auth-token"}
    cluster = yaml.safe_load((MANIFESTS / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    given = {f"--{name}" for name in cluster["headGroupSpec"]["rayStartParams"]}
    assert given <= {flag for each in scripts.start.params for flag in each.opts}


def test_commands_of_the_document_and_of_the_script_are_ones_that_are_understood() -> None:
    script = (MANIFESTS / "slurm.sh").read_text()
    for text in (script, "\n".join(re.findall(r"```\n(.*?)```", DOCUMENT, re.DOTALL))):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        commands = re.findall(r"python -m launch\.fleet (.+)", text.replace("$replicas", "16"))
        options = [FLEET.load(shlex.split(each, comments=True)) for each in commands if "--help" not in each]
        assert options and all(each.min_replicas >= 2 for each in options)
    named = set(re.findall(r"`--([a-z-]+)`", DOCUMENT))
    assert named and all(f"--{name}" in FLEET.help_text() for name in named)
