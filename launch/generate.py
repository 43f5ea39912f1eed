"""Continue a prompt, or answer it, with a model on this machine.

    python -m launch.generate runs/smollm2/base "Once upon a time"
    echo "Who wrote 1984?" | python -m launch.generate runs/smollm2/base --chat --max-tokens=64

Owns the way from a model's options to an engine, here and over HTTP. Text goes to standard output as it comes,
everything else to standard error. Errors are one line and exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from launch.options import Parser, add_model_arguments, exit_status
from launch.world import join, leave, rank_from_environment
from yafsdp_like.comm.agreement import share
from yafsdp_like.comm.team import Team
from yafsdp_like.inference.engine import Engine, EngineOptions
from yafsdp_like.inference.loading import Model, load_planned, open_model, site_of, world_transport
from yafsdp_like.inference.planning import plan_serving
from yafsdp_like.inference.request import FinishReason, Request
from yafsdp_like.inference.text import Codec, Transcript
from yafsdp_like.inference.weights import PlacedWeights
from yafsdp_like.kernels.sampling import SamplingParams

LIBRARIES_NBYTES = 2**30  # of a GPU, what CUDA's libraries and graphs may take beside the plan
CPU_KV_NBYTES = 2**30  # where nothing is said


# --- a model and its engine ---


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be asked."""

    model: Model
    codec: Codec
    engine: Engine
    device: torch.device
    max_seq_len: int
    lockstep: bool  # ranks must step together
    team: Team | None  # and these also compute together


@contextlib.contextmanager
def opened(arguments: argparse.Namespace, max_waiting: int, say: Callable[[str], None]) -> Iterator[Opened]:
    """The model that was asked for, on this rank; `say` is told the plan before anything is allocated.

    Raises ValueError for what cannot be, and ImportError where a package is missing.
    """
    model = open_model(arguments.model)
    codec = codec_of(model, arguments.tokenizer)
    device = _join(arguments.device)
    try:
        transport = world_transport(device)
        options = engine_options(arguments, device, max_waiting)
        site = site_of(device, arguments.dtype and getattr(torch, arguments.dtype), transport)
        plan = plan_serving(model.config, options, site, arguments.mode)
        say(str(plan))
        weights = load_planned(model, plan, device, transport)
        with _closing(weights):
            yield _ready(model, codec, weights, options)
    finally:
        leave()


@contextlib.contextmanager
def _closing(weights: PlacedWeights) -> Iterator[None]:
    """Closes them in the end, where ranks meet; but not after an error that has left others in the middle of a step."""
    try:
        yield
    except BaseException:
        if not weights.lockstep:
            weights.close()
        raise
    weights.close()


def _ready(model: Model, codec: Codec, weights: PlacedWeights, options: EngineOptions) -> Opened:
    engine = Engine(weights, options)
    return Opened(model, codec, engine, weights.device, weights.plan.max_seq_len, weights.lockstep, weights.team)


def _join(device_type: str) -> torch.device:
    """This rank's device; with torchrun, after joining the others."""
    if "RANK" in os.environ:
        return join(device_type).device
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is no GPU here; say --device=cpu")
    return torch.device("cuda" if device_type != "cpu" and torch.cuda.is_available() else "cpu")


def codec_of(model: Model, directory: str | None = None) -> Codec:
    """The tokenizer in `directory`, or the model's own. Raises ValueError where it is not one of this model's."""
    place = model.directory if directory is None else Path(directory)
    if place is None:
        raise ValueError(f"{model.name} has no tokenizer: name a directory that has, by --tokenizer")
    codec = Codec.load(place)
    if codec.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {place} has {codec.vocab_size} tokens, the model's vocabulary only "
            f"{model.config.vocab_size}: it is not this model's"
        )
    return codec


def engine_options(arguments: argparse.Namespace, device: torch.device, max_waiting: int) -> EngineOptions:
    """What the arguments of `add_model_arguments` say, and what is there where they say nothing."""
    limit, kv = arguments.memory_limit, arguments.kv_memory
    if limit is None and device.type == "cuda":
        limit = max(1, torch.cuda.mem_get_info(device)[0] - LIBRARIES_NBYTES)
        limit = min(share(limit)) if dist.is_initialized() else limit  # ranks plan alike
    elif limit is None and kv is None:
        kv = CPU_KV_NBYTES
    return EngineOptions(
        memory_limit_nbytes=limit,
        kv_nbytes=kv,
        host_kv_nbytes=arguments.host_kv,
        max_batch_size=arguments.max_batch_size,
        max_batch_tokens=arguments.max_batch_tokens,
        max_seq_len=arguments.max_seq_len,
        kv_dtype=arguments.kv_dtype,
        max_waiting=max_waiting,
        graphs=not arguments.no_graphs,
    )


# --- one prompt ---


def parser() -> argparse.ArgumentParser:
    made = Parser("python -m launch.generate", "Continue a prompt.")
    add_model_arguments(made, max_batch_size=1, max_batch_tokens=512)
    made.add_argument("prompt", nargs="?", help="default: all of standard input")
    made.add_argument("--chat", action="store_true", help="the prompt is a user's message, by the model's template")
    made.add_argument("--system", metavar="TEXT", help="with --chat: the message before it")
    made.add_argument("--max-tokens", type=int, default=256, metavar="TOKENS")
    made.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    made.add_argument("--temperature", type=float, default=0.0, help="default: 0, always the likeliest token")
    made.add_argument("--top-k", type=int, default=0)
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--min-p", type=float, default=0.0)
    made.add_argument("--repetition-penalty", type=float, default=1.0)
    made.add_argument("--seed", type=int, help="default: another each time, with torchrun 0")
    made.add_argument("--plan", action="store_true", help="say what is allocated, and why")
    return made


def sampling_of(arguments: argparse.Namespace) -> SamplingParams:
    """With torchrun all ranks draw the same, since they may have to step together."""
    unsaid = 0 if "RANK" in os.environ else secrets.randbits(63)
    seed = unsaid if arguments.seed is None else arguments.seed
    return SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=seed,
    )


def encode(codec: Codec, arguments: argparse.Namespace) -> tuple[int, ...]:
    """Ids of the prompt; ValueError if there are none."""
    if arguments.system is not None and not arguments.chat:
        raise ValueError("--system is only for --chat")
    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    if not arguments.chat:
        ids = codec.encode(prompt)
    else:
        system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
        ids = codec.encode_chat([*system, {"role": "user", "content": prompt}])
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def answers(opened: Opened, prompt: tuple[int, ...], arguments: argparse.Namespace) -> Iterator[str]:
    """Pieces of the text that follows the prompt, as they come."""
    room = opened.max_seq_len - len(prompt)
    if room < 1:
        raise ValueError(f"the prompt has {len(prompt)} tokens, and {opened.max_seq_len} fit with what is to follow")
    request = Request(
        "prompt",
        prompt,
        sampling_of(arguments),
        max_tokens=min(arguments.max_tokens, room),
        stop_tokens=opened.codec.stop_tokens,
    )
    transcript = Transcript(opened.codec, prompt, arguments.stop)
    opened.engine.add(request)
    while opened.engine.has_work:
        for event in opened.engine.step():
            yield transcript.push(event).text
        if transcript.finish is FinishReason.STOP:  # by a stop string, perhaps, of which the engine knows nothing
            opened.engine.cancel(request.id)


def run(arguments: argparse.Namespace) -> None:
    """Everything that the command does."""
    speaks = rank_from_environment() == 0  # with torchrun all ranks generate the same, to share the weights

    def say(plan: str) -> None:
        if speaks and arguments.plan:
            print(plan, file=sys.stderr, flush=True)

    with opened(arguments, max_waiting=1, say=say) as model:
        for piece in answers(model, encode(model.codec, arguments), arguments):
            if speaks:
                print(piece, end="", flush=True)
        if speaks:
            print()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit status."""
    return exit_status(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
