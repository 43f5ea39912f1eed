"""Options of generating, chatting and serving: names, defaults and limits of every option. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from launch.command_line import Command
from yafsdp_like.inference.http.options import HttpOptions, check_seconds
from yafsdp_like.inference.options import AnyMode, EngineOptions, PoolOptions
from yafsdp_like.kernels.sampling_params import SamplingParams

PRESET = "preset:"
KEY_VARIABLE = "YAFSDP_LIKE_API_KEY"
ADMIN_KEY_VARIABLE = "YAFSDP_LIKE_ADMIN_KEY"
NOTES = """
Options and arguments come in any order; what follows -- is no option. Bytes take units, such as 40GiB. An option that
is on by default is switched off by --no-NAME. --config=FILE reads a YAML file with the sections below (an option of
the section engine, say, is `engine: {max_batch_size: 8}` there); --print-config prints such a file, whose keys, such as
memory_limit_nbytes, are names of options, too. Without a limit, the plan takes the free memory of a GPU less 1GiB for
libraries, and on a CPU 1GiB of KV cache.
"""


@dataclass(frozen=True)
class LoadOptions:
    """Which tokenizer and sampling defaults, and where the weights lie."""

    tokenizer: str | None = None  # a directory; null: the model's own
    generation_config: Literal["model", "none"] = "model"  # sampling defaults: of generation_config.json, or none
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["float32", "bfloat16"] | None = None  # of weights; null: bfloat16 on a GPU, float32 on a CPU
    mode: AnyMode = "auto"  # where weights lie: whole on the device, all-gathered, streamed from the host, or split


@dataclass(frozen=True)
class SamplingOverrides:
    """How tokens are drawn; null: as the model's generation_config.json says, or else as SamplingParams does."""

    temperature: float | None = None  # 0: always the most probable token; else 1.0
    top_k: int | None = None  # the k most probable tokens only; 0: all
    top_p: float | None = None  # the most probable tokens that hold this much together; else 1.0
    min_p: float | None = None  # tokens with at least this part of the highest probability; else 0.0
    repetition_penalty: float | None = None  # above 1: of tokens of the prompt and the answer; else 1.0
    presence_penalty: float | None = None  # subtracted once from the score of a generated token; else 0.0
    frequency_penalty: float | None = None  # subtracted for each time that a token was generated; else 0.0
    seed: int | None = None  # null: another each time, with torchrun 0

    def __post_init__(self) -> None:
        SamplingParams(**self.given)

    @property
    def given(self) -> dict[str, Any]:
        """Those that are not null, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _one_at_a_time() -> EngineOptions:
    return EngineOptions(max_batch_size=1, max_batch_tokens=512, max_waiting=1)


@dataclass(frozen=True)
class GenerateOptions:
    """One prompt, the model that continues it, and how its answer is drawn."""

    model: str  # Hugging Face directory, checkpoint (step-N), or preset:NAME with random weights
    prompt: str | None = None  # null: all of standard input
    chat: bool = False  # the prompt is a user's message, formatted by the model's chat template
    system: str | None = None  # with --chat: the system message before it
    max_tokens: int = 256  # tokens of the answer
    stop: tuple[str, ...] = ()  # ends the answer before this text; may be repeated
    plan: bool = False  # print what is allocated, and why
    load: LoadOptions = field(default_factory=LoadOptions)
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    engine: EngineOptions = field(default_factory=_one_at_a_time)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, found {self.max_tokens}")
        if self.system is not None and not self.chat:
            raise ValueError("--system is only for --chat")
        if "" in self.stop:
            raise ValueError("a stop string must have at least one character")
        if self.prompt == "" and not self.chat:
            raise ValueError("the prompt is empty")


@dataclass(frozen=True)
class ChatOptions:
    """Whom a person talks to in a terminal: a server, or a model that is loaded here."""

    model: str  # http://HOST:PORT of a server; else, to load it here, what launch.serve takes
    name: str | None = None  # of the model at a server; null: the first that it lists
    api_key: str | None = None  # bearer token for a server
    system: str | None = None  # the system message before the conversation
    max_tokens: int | None = None  # tokens of an answer; null: what fits
    stop: tuple[str, ...] = ()  # ends an answer before this text; may be repeated
    plan: bool = False  # print what is allocated here, and why
    markdown: bool = True  # on a terminal, answers are set as Markdown; else shown letter by letter
    load: LoadOptions = field(default_factory=LoadOptions)
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    engine: EngineOptions = field(default_factory=_one_at_a_time)

    @property
    def is_remote(self) -> bool:
        """Whether a server is meant."""
        return self.model.startswith(("http://", "https://"))

    @property
    def local(self) -> GenerateOptions:
        """How a model that is loaded here answers."""
        most = self.max_tokens or 2**31  # of which as much is taken as fits
        shared = {name: getattr(self, name) for name in ("model", "stop", "plan", "load", "sampling", "engine")}
        return GenerateOptions(prompt="", chat=True, max_tokens=most, **shared)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, found {self.max_tokens}")
        if "" in self.stop:
            raise ValueError("a stop string must have at least one character")


@dataclass(frozen=True)
class ServeOptions:
    """A model, the engine that runs it, and the server in front of it."""

    model: str  # Hugging Face directory, checkpoint (step-N), or preset:NAME with random weights
    name: str | None = None  # of the model in requests; null: the last part of its path, or all of it
    adapters: dict[str, str] = field(default_factory=dict)  # directories of LoRA adapters, by their names in requests
    admin_key: str | None = None  # bearer token to load adapters with, another than the users'; null: nobody may
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all
    port: int = 8000  # of the first rank, r more on rank r; 0: any that is free
    max_connections: int = 4096  # more are closed at once
    grace_s: float = 30.0  # for running requests after SIGTERM
    stuck_after_s: float = 600.0  # of one step, after which the server ends with status 3; 0: any time
    access_log: bool = False  # a line for each request
    load: LoadOptions = field(default_factory=LoadOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    http: HttpOptions = field(default_factory=HttpOptions)

    def __post_init__(self) -> None:
        _check_server(self)


@dataclass(frozen=True)
class PoolModelOptions:
    """One model of a pool: where it is, and how it is served; memory is the pool's."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    path: str  # Hugging Face directory, checkpoint (step-N), or preset:NAME with random weights
    tokenizer: str | None = None  # a directory; null: the model's own
    generation_config: Literal["model", "none"] = "model"  # sampling defaults: of generation_config.json, or none
    dtype: Literal["float32", "bfloat16"] | None = None  # of weights; null: bfloat16 on a GPU, float32 on a CPU
    adapters: dict[str, str] = field(default_factory=dict)  # directories of LoRA adapters, by their names in requests
    ttl_s: float | None = None  # without a request, after which it leaves the device; null: it stays while it may
    host_ttl_s: float | None = None  # without a request, after which it leaves host memory, too; null: it stays
    ttft_ms: float | None = None  # target: time to the first token, switches included; null: 10,000 if any has targets
    tpot_ms: float | None = None  # target: time from token to token; null: 100 if any model of the pool has targets
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        check_seconds("ttl_s", self.ttl_s or 0)
        check_seconds("host_ttl_s", self.host_ttl_s or 0)
        for name in ("ttft_ms", "tpot_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1e9:
                raise ValueError(f"{name} must be above 0 and at most 1e9, found {value}")
        if self.host_ttl_s and self.ttl_s and self.host_ttl_s < self.ttl_s:
            raise ValueError(
                f"host_ttl_s={self.host_ttl_s:g} must be at least ttl_s={self.ttl_s:g}: what leaves host memory has "
                "left the device"
            )


NOT_GIVEN = 1  # byte of memory, in which no pool fits


@dataclass(frozen=True)
class ServePoolOptions:
    """Models by name, the pool that they share, and the server in front of it."""

    models: dict[str, PoolModelOptions]  # path, ttls and engine of each, by its name in requests
    admin_key: str | None = None  # bearer token for /admin, another than the users'; null: there is no /admin
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all
    port: int = 8000  # 0: any that is free
    max_connections: int = 4096  # more are closed at once
    grace_s: float = 30.0  # for running requests after SIGTERM
    stuck_after_s: float = 600.0  # of one step, after which the server ends with status 3; 0: any time
    access_log: bool = False  # a line for each request
    pool: PoolOptions = field(default_factory=lambda: PoolOptions(NOT_GIVEN))
    http: HttpOptions = field(default_factory=HttpOptions)

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: expected at least one model, found none")
        if self.pool.memory_limit_nbytes == NOT_GIVEN:
            raise ValueError("no pool.memory_limit_nbytes given: say how many bytes of the device models may take")
        _check_server(self)


@dataclass(frozen=True)
class FleetOptions:
    """Replicas of a pool, what each has, and when there are more or fewer of them."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    pool: str  # YAML file of `launch.serve --pool`, at the same place on every host
    host: str = "127.0.0.1"  # address to listen on, on every host; 0.0.0.0: all
    port: int = 8000
    min_replicas: int = 1  # that are kept, whatever the load
    max_replicas: int = 1
    gpus: float = 1.0  # of each replica; 0: replicas on CPUs
    cpus: float = 4.0  # of each replica that Ray reserves
    ingresses: int = 1  # processes that read requests and choose replicas
    aim_load: float = 0.6  # share of a replica's time that is to be in use after a change of their number
    high_load: float = 0.8  # share above which there are to be more
    up_after_s: float = 10.0  # for which more must be wanted
    down_after_s: float = 300.0  # for which fewer must do
    report_s: float = 0.5  # between two reports of a replica to those who route

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"expected 1 <= min_replicas <= max_replicas, found {self.min_replicas} and {self.max_replicas}"
            )
        if not 0 < self.aim_load < self.high_load:
            raise ValueError(f"expected 0 < aim_load < high_load, found {self.aim_load} and {self.high_load}")
        if self.ingresses < 1 or self.gpus < 0 or self.cpus < 0 or min(self.up_after_s, self.down_after_s) < 0:
            raise ValueError(f"expected at least one ingress, and nothing below 0, found {self}")
        if self.report_s <= 0 or not 0 < self.port <= 65535:
            raise ValueError(f"expected a report_s above 0 and a port from 1 to 65535, found {self}")


def _check_server(options: ServeOptions | ServePoolOptions) -> None:
    if not 0 <= options.port <= 65535:
        raise ValueError(f"port must be from 0 to 65535, found {options.port}")
    if options.max_connections < 1:
        raise ValueError(f"max_connections must be at least 1, found {options.max_connections}")
    check_seconds("grace_s", options.grace_s)
    check_seconds("stuck_after_s", options.stuck_after_s)


ALIASES = {"engine.kv_nbytes": "kv-memory"}
GENERATE = Command(
    "usage: [torchrun --nproc-per-node N] -m launch.generate MODEL [PROMPT] [--option=value ...]",
    GenerateOptions,
    NOTES,
    positionals=("model", "prompt"),
    flat=True,
    aliases=ALIASES,
)
CHAT = Command(
    "usage: -m launch.chat MODEL|URL [--option=value ...]",
    ChatOptions,
    f"""{NOTES}Without --api-key, ${KEY_VARIABLE} is the key, if it is set.
""",
    positionals=("model",),
    flat=True,
    aliases=ALIASES,
)
SERVE = Command(
    "usage: [torchrun --nproc-per-node N] -m launch.serve MODEL [--option=value ...]",
    ServeOptions,
    f"""{NOTES}Without --api-key, ${KEY_VARIABLE} is the key, if it is set; without --admin-key,
${ADMIN_KEY_VARIABLE} is the admin's. Several models: --pool FILE --help.
""",
    positionals=("model",),
    flat=True,
    aliases=ALIASES,
)
SERVE_POOL = Command(
    "usage: -m launch.serve --pool FILE [--option=value ...]",
    ServePoolOptions,
    f"""
The file is YAML with the sections below, see configs/serve_pool.yaml. Bytes take units, such as 40GiB. Without
--api-key, ${KEY_VARIABLE} is the key; without --admin-key, ${ADMIN_KEY_VARIABLE} is the admin's, if it is set.
""",
    flat=True,
    aliases={"pool.kv_nbytes": "kv-memory"},
)

FLEET = Command(
    "usage: -m launch.fleet POOL_FILE [--option=value ...]",
    FleetOptions,
    """
Joins the Ray cluster that RAY_ADDRESS names, or the one that runs here, or begins one. Keys of users and admins are
those of the pool's file, or of the environment of the replicas and ingresses.
""",
    positionals=("pool",),
    flat=True,
)


def check_model(name: str) -> None:
    """Raise ValueError where there is certainly no model; the content of a directory is checked when it is read."""
    if not name.startswith(PRESET) and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"expected a Hugging Face directory, a checkpoint (step-N) or {PRESET}NAME, found {name!r}: there is no "
            "such directory"
        )


def model_names(name: str) -> tuple[str, ...]:
    """Names of a model in requests: the last part of its path, the path as given, and it without a slash at its end."""
    path = Path(name).expanduser()
    last = name if name.startswith(PRESET) else path.name or path.resolve().name
    return tuple(dict.fromkeys((last or name, name, name.rstrip("/") or name)))
