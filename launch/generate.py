"""Continue a prompt, or answer it, with a model on this machine.

    python -m launch.generate runs/smollm2/base "Once upon a time"
    echo "Who wrote 1984?" | python -m launch.generate runs/smollm2/base --chat --max-tokens=64

Text goes to standard output as it comes, and everything else to standard error. Errors are one line, with exit status
1, or 2 for a mistake on the command line, which is checked before torch is imported.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from launch.command_line import exit_status
from launch.options import GENERATE, GenerateOptions, check_model

if TYPE_CHECKING:
    from launch.inference import LoadedModel
    from yafsdp_like.inference.text.codec import Codec
    from yafsdp_like.kernels.sampling_params import SamplingParams


def sampling_of(options: GenerateOptions, defaults: SamplingParams) -> SamplingParams:
    """Sampling parameters that are given, over the model's defaults.

    With torchrun all ranks draw the same tokens, since they may step together.
    """
    from dataclasses import replace

    seed = 0 if "RANK" in os.environ else secrets.randbits(63)
    return replace(defaults, **{"seed": seed, **options.sampling.given})


def encode(codec: Codec, options: GenerateOptions) -> tuple[int, ...]:
    """Ids of the prompt; ValueError if there are none."""
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    if not options.chat:
        ids = codec.encode(prompt)
    else:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        ids = codec.encode_chat([*system, {"role": "user", "content": prompt}])
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def answer(model: LoadedModel, prompt: tuple[int, ...], options: GenerateOptions) -> Generator[str]:
    """Pieces of the text that follows the prompt, as they come; whoever stops reading ends it."""
    from yafsdp_like.inference.engine.request import FinishReason, Request
    from yafsdp_like.inference.text.codec import Transcript, Wording

    room = model.engine.max_seq_len - len(prompt)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, and {model.engine.max_seq_len} fit with what is to follow"
        )
    request = Request(
        "prompt",
        prompt,
        sampling_of(options, model.sampling),
        max_tokens=min(options.max_tokens, room),
        stop_tokens=model.codec.stop_tokens,
    )
    transcript = Transcript(model.codec, prompt, Wording(options.stop))
    model.engine.add(request)
    try:
        while model.engine.has_work:
            for output in model.engine.step():
                yield transcript.push(output).text
            if transcript.finish is FinishReason.STOP:  # by a stop string, perhaps, of which the engine knows nothing
                model.engine.cancel(request.id)
    finally:
        model.engine.cancel(request.id)
        while model.engine.has_work:
            model.engine.step()


def run(options: GenerateOptions) -> None:
    """Load the model, and print its answer."""
    check_model(options.model)
    from launch.inference import load_model

    speaks = os.environ.get("RANK", "0") == "0"  # with torchrun all ranks generate the same, to share the weights

    def say(plan: str) -> None:
        if speaks and options.plan:
            print(plan, file=sys.stderr, flush=True)

    with load_model(options, say) as model:
        for text in answer(model, encode(model.codec, options), options):
            if speaks:
                print(text, end="", flush=True)
        if speaks:
            print()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    options = GENERATE.answer(sys.argv[1:] if arguments is None else arguments)
    return options if isinstance(options, int) else exit_status(run, options)


if __name__ == "__main__":
    sys.exit(main())
