"""The command line of the serving benchmark, and the sizes that follow from it."""

import argparse
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.help import DTYPE_NAMES, Help, device_here
from yafsdp_like.inference.engine.step_budget import CHUNK, PROMPTS_PER_CHUNK
from yafsdp_like.inference.options import AnyMode

DESCRIPTION = "Measure a served model; the method is at the top of bench_serve.py."
BATCHES = {False: "1,2,4,8,16,32,64,128", True: "128,256,512"}  # by whether there are several ranks
MODES: dict[bool, tuple[AnyMode, ...]] = {False: ("resident", "streamed"), True: ("gathered", "tensor_parallel")}
LAYOUTS = ("fp8", "fp8-block", "awq", "gptq")  # of quantized matrices
MEASURES = {  # in this order, whatever the order asked for; whether several ranks measure it together, or one alone
    "memory": False,
    "decode": False,
    "prefill": False,
    "poisson": False,
    "connections": False,
    "mixed": False,
    "offline": False,
    "speculation": False,
    "limits": False,
    "adapters": False,
    "modes": True,
}
ON_REQUEST = ("speculation", "limits", "adapters")  # not by default: they take further engines, or packages
NUM_HELD = 8  # steps that are timed while the device is held busy, see bench_serve.py
RANDOM_PROMPT, RANDOM_NEW = 64, 16  # tokens of a random request, at most
MIXED_PROMPT, MIXED_NEW = (64, 1024), (32, 256)  # tokens of a request of mixed, at least and at most


@dataclass(frozen=True)
class ServeBenchOptions:
    """The command line, parsed."""

    model: str
    num_layers: int | None
    quantize: str | None
    mode: AnyMode
    device: str
    dtype: str
    measures: tuple[str, ...]  # in the order in which they are measured
    batches: tuple[int, ...]  # ascending
    context: int
    steps: int
    warmup: int
    prefill_tokens: int
    max_batch_tokens: int
    rounds: int
    prompt_tokens: int
    new_tokens: int
    num_requests: tuple[int, ...]  # ascending
    peers: bool
    rates: tuple[float, ...]
    capacity_shares: tuple[float, ...]
    chunks: tuple[int, ...]  # at most max_batch_tokens each
    tpots_ms: tuple[float, ...]
    seconds: float
    connections: int
    http: bool
    beside: Path | None
    mixed_requests: int
    random_requests: int
    matmul_seconds: float
    hbm_rate: float | None
    matmul_rate: float | None
    peer_rate: float | None
    draft: str
    graphs: bool
    out: Path | None

    @property
    def decode_prompt(self) -> int:
        """Tokens of a prompt with which contexts are about ``context`` in the middle of what is timed."""
        return max(1, self.context - self.warmup - self.steps // 2)

    def decode_length(self, batch: int) -> int:
        """Tokens that a sequence may come to while a batch is filled and timed, at most."""
        return self.decode_prompt + self._num_filling(batch) + self.warmup + self.steps + NUM_HELD + 8

    def _num_filling(self, batch: int) -> int:
        """Steps until a batch of prompts has been computed, at most; see `step_budget.py`, [Note: budget of a step]."""
        left, num_steps = batch * self.decode_prompt, 1
        while left > 0:
            num_prompts = -(-left // self.decode_prompt)
            left -= min(self.max_batch_tokens - batch, CHUNK * max(1, num_prompts // PROMPTS_PER_CHUNK))
            num_steps += 1
        return num_steps

    @property
    def decodes(self) -> bool:
        """Whether batches that decode are measured, for which there must be room."""
        return bool({"decode", "modes", "limits", "adapters"} & set(self.measures))

    @property
    def budgets(self) -> list[tuple[int, float | None]]:
        """Of poisson: tokens of a step at most, and the target of the time between tokens, if there is one."""
        return [*((chunk, None) for chunk in self.chunks), *((self.max_batch_tokens, ms) for ms in self.tpots_ms)]

    @property
    def mixed_lengths(self) -> list[tuple[int, int]]:
        """Tokens of the prompt, and new ones, of each request of mixed; the same in every run."""
        draw = random.Random(0)
        most, new = MIXED_PROMPT, MIXED_NEW
        return [(draw.randint(*most), draw.randint(*new)) for _ in range(self.mixed_requests)]

    @property
    def max_batch_size(self) -> int:
        """Sequences of the largest batch."""
        return self.batches[-1]

    @property
    def max_seq_len(self) -> int:
        """Of the engine: the longest sequence of all measurements."""
        offline = self.prompt_tokens + self.new_tokens
        decode = self.decode_length(self.max_batch_size) if self.decodes else 0
        mixed = max((sum(lengths) for lengths in self.mixed_lengths if "mixed" in self.measures), default=0)
        return max(decode, self.prefill_tokens + 1, offline, mixed, RANDOM_PROMPT + RANDOM_NEW)

    @property
    def num_context_tokens(self) -> int:
        """That the engine must hold at once."""
        offline = self.max_batch_size * (self.prompt_tokens + self.new_tokens)
        longest = sorted(map(sum, self.mixed_lengths if "mixed" in self.measures else ()))[-self.max_batch_size :]
        decode = max(batch * self.decode_length(batch) for batch in self.batches) if self.decodes else 0
        shortest = self.max_batch_size * (RANDOM_PROMPT + RANDOM_NEW)
        return max(offline, decode, shortest, sum(longest), self.max_seq_len)


def ranks_there() -> int:
    """Before there is a process group; torchrun says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parse_options(arguments: Sequence[str], num_ranks: int) -> ServeBenchOptions:
    """Exits with a message, as argparse does, where the command line cannot be run."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=Help)
    add_subject(parser)
    add_loads(parser)
    add_rates(parser)
    values = vars(parser.parse_args(arguments))
    possible = [name for name, of_ranks in MEASURES.items() if of_ranks == (num_ranks > 1)]
    unasked = [name for name in possible if name not in ON_REQUEST]
    asked = values["measures"].split(",") if values["measures"] else unasked
    if refused := sorted(set(asked) - set(possible)):
        parser.error(f"--measure: {refused} cannot be measured on {num_ranks} ranks, expected some of {possible}")
    values["measures"] = tuple(name for name in possible if name in asked)
    values["batches"] = integers(values["batches"] or BATCHES[num_ranks > 1])
    values["num_requests"] = integers(values["num_requests"])
    rates = values["rates"].split(",")
    values["rates"] = tuple(float(rate) for rate in rates if not rate.endswith("%"))
    values["capacity_shares"] = tuple(float(rate[:-1]) / 100 for rate in rates if rate.endswith("%"))
    values["chunks"] = integers(values["chunks"] or str(values["max_batch_tokens"]))
    values["tpots_ms"] = tuple(float(ms) for ms in values["tpots_ms"].split(",") if ms)
    modes = MODES[num_ranks > 1]
    values["mode"] = values["mode"] or modes[0]
    if values["mode"] not in modes:
        parser.error(f"--mode: {values['mode']} is not for {num_ranks} ranks, expected one of {modes}")
    options = ServeBenchOptions(**values)
    if complaint := complaint_about(options):
        parser.error(complaint)
    device = options.device or device_here()
    return replace(options, device=device, dtype=options.dtype or ("bf16" if device == "cuda" else "fp32"))


def integers(text: str) -> tuple[int, ...]:
    """Ascending."""
    return tuple(sorted(int(number) for number in text.split(",")))


def add_subject(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where the report goes."""
    parser.add_argument("--model", default="preset:8b", help="what launch.serve takes; preset:NAME has random weights")
    parser.add_argument("--num-layers", type=int, help="of random values, instead of the model's own number of layers")
    parser.add_argument("--quantize", choices=LAYOUTS, help="random codes in this layout, instead of values")
    parser.add_argument(
        "--mode",
        choices=[*MODES[False], *MODES[True]],
        help="of weights: on one rank resident or streamed, on several gathered or tensor_parallel; default: the first",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what is measured; default: a GPU, if there is one")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of weights; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--measure",
        dest="measures",
        help=f"some of {', '.join(MEASURES)}; default: all of one rank but {', '.join(ON_REQUEST)}; or of several",
    )
    parser.add_argument("--max-batch-tokens", type=int, default=2048, help="of one step, so also of a prompt's chunk")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="no CUDA graphs")
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="transformers too, if it is installed"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the final JSON object here too")


def add_loads(parser: argparse.ArgumentParser) -> None:
    """How much of what is served."""
    parser.add_argument(
        "--batch", dest="batches", help=f"sequences of decode; default {BATCHES[False]}, of modes {BATCHES[True]}"
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence, about, in decode")
    parser.add_argument("--steps", type=int, default=64, help="timed steps of each batch")
    parser.add_argument("--warmup", type=int, default=8, help="steps of each batch before them")
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="of the prompt that prefill is measured on")
    parser.add_argument("--rounds", type=int, default=6, help="of prefill; a third as many of offline")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of a request of offline, poisson, speculation")
    parser.add_argument("--new-tokens", type=int, default=128, help="that each of them draws")
    parser.add_argument(
        "--num-requests",
        default="1,32,128",
        help="of offline; transformers takes the most by generate_batch, the others by generate",
    )
    parser.add_argument(
        "--rate", dest="rates", default="12,24,36,70%,90%", help="requests a second of poisson; %%: of what is possible"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="in which requests arrive, for each rate")
    parser.add_argument(
        "--chunk", dest="chunks", help="tokens of a step of poisson, at most; several: a table each; default: all"
    )
    parser.add_argument(
        "--tpot-ms", dest="tpots_ms", default="", help="targets of the time between tokens of poisson, a table each"
    )
    parser.add_argument("--connections", type=int, default=100, help="clients of connections, over HTTP and in process")
    parser.add_argument(
        "--http", action=argparse.BooleanOptionalAction, default=True, help="poisson and connections over HTTP too"
    )
    parser.add_argument(
        "--beside", type=Path, metavar="FILE", help="another engine's report, to print its poisson beside"
    )
    parser.add_argument("--mixed-requests", type=int, default=1000, metavar="N", help="of mixed, all at once")
    parser.add_argument(
        "--draft",
        default="preset:1b",
        help="whose shape the model that drafts has in speculation, but for the vocabulary",
    )
    parser.add_argument("--random-requests", type=int, default=10_000, metavar="N", help="short ones, of memory")


def add_rates(parser: argparse.ArgumentParser) -> None:
    """The machine's own."""
    measured = "; default: measured"
    parser.add_argument("--hbm-rate", type=float, metavar="BYTES/S", help="that the device reads" + measured)
    parser.add_argument("--matmul-rate", type=float, metavar="FLOP/S", help="of matrix products" + measured)
    parser.add_argument(
        "--peer-rate", type=float, metavar="BYTES/S", help="between devices; default: that known of the device"
    )
    parser.add_argument("--matmul-seconds", type=float, default=3.0, help="for which the matrix product is repeated")


def complaint_about(options: ServeBenchOptions) -> str | None:
    """What is wrong with the options, or None."""
    positive = (options.steps, options.rounds, options.context, options.prefill_tokens, options.prompt_tokens)
    if min(*positive, options.new_tokens, options.batches[0], options.num_requests[0]) < 1 or options.warmup < 0:
        return "numbers of tokens, steps, rounds, requests and sequences must be at least 1"
    if options.num_layers is not None and options.num_layers < 1:
        return f"--num-layers must be at least 1, found {options.num_layers}"
    if options.max_batch_size >= options.max_batch_tokens:
        return (
            f"--max-batch-tokens must be more than the largest of --batch, so that prompts are computed beside it; "
            f"found {options.max_batch_tokens} and {options.max_batch_size}"
        )
    if min(*options.rates, *options.capacity_shares, *options.tpots_ms, options.seconds) <= 0:
        return "--rate, --seconds and --tpot-ms must be above 0"
    if options.chunks[0] < options.max_batch_size or options.chunks[-1] > options.max_batch_tokens:
        return (
            f"--chunk must be from the largest of --batch to --max-batch-tokens, {options.max_batch_size} to "
            f"{options.max_batch_tokens}, found {options.chunks}"
        )
    if min(options.connections, options.mixed_requests) < 1:
        return "--connections and --mixed-requests must be at least 1"
    return None
