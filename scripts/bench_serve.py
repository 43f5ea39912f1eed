"""Measure a served model on random weights and random tokens: rates, latencies and memory, each beside its floor.

    python scripts/bench_serve.py --model preset:8b --out scripts/results/<date>-<device>-8b-serve.json
    torchrun --nproc-per-node 2 scripts/bench_serve.py --model preset:70b --num-layers 88 --batch 16,64,128
    torchrun --nproc-per-node 2 scripts/bench_serve.py --model preset:8b --mode tensor_parallel --batch 1,8,32

Run it with PYTHONPATH=. in a checkout. What it does is in `bench/serve_*.py`: this is the command.

Method. First the machine's own rates are measured: a long matrix product, in the dtype of the weights and until clocks
have settled (the second half of the time counts), and a large copy inside the device's memory, bytes read and
written. Then one engine is made, and every measurement uses it. On several ranks weights are gathered, or with
`--mode tensor_parallel` cut, and `modes` is what is measured; on one rank they stay on the device, and it is all else.

`memory` comes first, so that what a first request costs is in it: bytes planned beside bytes taken, and the allocator's
counters before and after random requests, some of which are cancelled.

`decode`: a batch of prompts is computed; after some more steps, each step is timed from return to return of
`Engine.step`, which has then read tokens. The median counts. So that the device's own time is known too, a few more
steps are issued while it is held busy: between two events around such a step it has all its work, and never waits for
the CPU. The floor is the time to read all weights (an embedding is looked up, not read) and all keys and values of the
contexts at the rate of the copy, or to compute a product at the rate of the long one where that takes longer. Of
experts those are read that even random choices of the batch's tokens visit. With `--quantize` the layers' matrices have
random codes in a published layout, and what is stored is read.

`prefill`: one long prompt, whose chunks fill a step each; its operations (matrix products and causal attention) a
second, beside the long product's.

`poisson`: requests arrive at random times at a given rate, or at a share of what the engine can do, whether it is ready
or not; for each of several budgets of a step (`--chunk`, `--tpot-ms`). Times to the first token count from the time of
arrival, computed ahead; a token's time is that at which `Engine.step` returned it. Over HTTP too, by clients in a
process of their own with a connection for each request, whose clock it is then. The device waits for the CPU from the
end of a step to the beginning of the next; the CPU's time of a step is that of all but waiting for the device, of the
last 1,024 steps. `--beside` prints another engine's figures of the same rates and chunks.

`connections`: clients that send a request as soon as the one before has been answered, in process and over HTTP.

`mixed`: requests of 64 to 1,024 tokens that draw 32 to 256, all there from the beginning.

`offline`: all requests are there from the beginning. transformers, where it is installed, does the same with random
weights of the same shape: by `generate` (static cache, compiled on a GPU) with few requests, and with the most by
`generate_batch` (on a GPU), each warmed up before.

Three more are measured only where `--measure` names them:

`speculation`: greedy requests of `--prompt-tokens` that draw `--new-tokens`, by engines that draft (prompt lookup, and
a model of the shape of `--draft`) and by one that does not, of the model's shape but with a head by which the next
token is known: that of a text that repeats itself, or of one that does not. Each load runs twice and the second time
counts, from the step on in which all had drawn. Three engines are made, one after another, beside the one of all else.

`limits`: the steps of `decode` with all answers bound by one JSON schema, with a bias, and free, before and after. The
tokenizer is learned from the text that the repository carries, which gives fewer tokens than large models have. What
was drawn is then read by the schema's grammar. Needs llguidance and transformers.

`adapters`: the steps of `decode` of an engine without slots for LoRA adapters, and, beside it, of one that holds eight
of rank 16: by requests that name none, all the same one, or all eight in turn.

`modes`: steps that decode, and chunks of prompts, on all ranks at once. The slowest rank's time counts; beside it the
larger of the floors of computing and of gathering.

Prompts are random tokens, other ones each time, so nothing is shared; drawing is greedy and nothing ends early, but in
`memory`. The last line of output is one JSON object, see `scripts/results/README.md`.
"""

import sys
from collections.abc import Sequence

from bench.serve_options import parse_options, ranks_there


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; the last line of output is the report as one JSON object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(arguments, ranks_there())
    from bench.serve_run import run  # takes seconds

    run(options, arguments)


if __name__ == "__main__":
    main()
