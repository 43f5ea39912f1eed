"""Continue a prompt, or answer it, with a model on this machine.

    python -m launch.generate runs/smollm2/base "Once upon a time"
    echo "Who wrote 1984?" | python -m launch.generate runs/smollm2/base --chat --max-tokens=64

Owns the command: one prompt, and how its answer is drawn and shown. Text goes to standard output as it comes, and
everything else to standard error. Errors are one line and exit status 1, or 2 for what is wrong on the command line,
which is read before anything is imported that takes time.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from launch.options import Parser, add_model_arguments, exit_status, number, opened, whole

if TYPE_CHECKING:
    from launch.opening import Opened
    from yafsdp_like.inference.text.codec import Codec
    from yafsdp_like.kernels.sampling_params import SamplingParams


def parser() -> Parser:
    made = Parser("python -m launch.generate", "Continue a prompt.")
    add_model_arguments(made, max_batch_size=1, max_batch_tokens=512)
    made.add_argument("prompt", nargs="?", metavar="PROMPT", help="default: all of standard input")
    group = made.add_argument_group("prompt and answer")
    group.add_argument("--chat", action="store_true", help="PROMPT is a user's message, by the model's template")
    group.add_argument("--system", metavar="TEXT", help="with --chat: the message before it")
    group.add_argument("--max-tokens", type=whole(1), default=256, metavar="TOKENS", help="that are said at most")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    group.add_argument("--seed", type=whole(-(2**63), 2**63 - 1), help="default: another each time, with torchrun 0")
    group.add_argument("--plan", action="store_true", help="say what is allocated, and why")
    group = made.add_argument_group(
        "how tokens are drawn (default: as the model's generation_config.json says, or else)"
    )
    group.add_argument("--temperature", type=number(0, 1e9), help="0: always the likeliest token; default: 1.0")
    group.add_argument("--top-k", type=whole(0), metavar="TOKENS", help="the likeliest only; default: 0, all")
    group.add_argument("--top-p", type=number(1e-9, 1), help="those that have this much together; default: 1.0")
    group.add_argument("--min-p", type=number(0, 1), help="those with this part of the likeliest's; default: 0.0")
    group.add_argument("--repetition-penalty", type=number(1e-2, 100), help="above 1: of what was said; default: 1.0")
    return made


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options and the prompt in any order; what follows `--` is no option. Ends the process, with status 2, for what
    cannot be.
    """
    made = parser()
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    end = words.index("--") if "--" in words else len(words)
    names = {f" {word}": word for word in words[end + 1 :]}  # argparse forgets that they are none, if it sees them
    found = made.parse_intermixed_args([*words[:end], *names])
    found.model, found.prompt = names.get(found.model, found.model), names.get(found.prompt, found.prompt)
    if found.system is not None and not found.chat:
        made.error("--system is only for --chat")
    if "" in found.stop:
        made.error("argument --stop: a stop string must have at least one character")
    if found.prompt == "" and not found.chat:
        made.error("the prompt is empty")
    return found


def sampling_of(arguments: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """What was said, and the model's defaults. With torchrun all ranks draw the same, since they may step together."""
    from dataclasses import replace

    from yafsdp_like.inference.text.directory import SAMPLED

    unsaid = 0 if "RANK" in os.environ else secrets.randbits(63)
    said = {name: getattr(arguments, name) for name in SAMPLED if getattr(arguments, name) is not None}
    return replace(defaults, **said, seed=unsaid if arguments.seed is None else arguments.seed)


def encode(codec: Codec, arguments: argparse.Namespace) -> tuple[int, ...]:
    """Ids of the prompt; ValueError if there are none."""
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
    from yafsdp_like.inference.engine.request import FinishReason, Request
    from yafsdp_like.inference.text.codec import Transcript

    room = opened.max_seq_len - len(prompt)
    if room < 1:
        raise ValueError(f"the prompt has {len(prompt)} tokens, and {opened.max_seq_len} fit with what is to follow")
    request = Request(
        "prompt",
        prompt,
        sampling_of(arguments, opened.sampling),
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
    speaks = os.environ.get("RANK", "0") == "0"  # with torchrun all ranks generate the same, to share the weights

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
    return exit_status(run, parsed(arguments))


if __name__ == "__main__":
    sys.exit(main())
