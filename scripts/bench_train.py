"""Compare sharding runtimes on one training step: same model, data and dtypes, one process group, one call.

    torchrun --nproc-per-node 2 scripts/bench_train.py --model 8b --impl unsharded,ours,fsdp2,fsdp2-expandable
    python scripts/bench_train.py --model 3b --impl ours,fsdp2,fsdp2-expandable --checkpointing none,block

Run it with PYTHONPATH=. in a checkout. What it does is in `bench/`: this is the command.

Method. Two 8B models with optimizer state do not fit on one GPU together, so implementations take turns: one
is built, sharded, initialised to the same values as the others, measured with every shape in ascending order of tokens,
and freed; then comes the next. The whole list is gone through `--rounds` times (A B C A B C), so that drift of clocks
and temperature hits all alike. Within a round a time is the median over steps, of the slowest rank; a row holds the
median over rounds, and the smallest and the largest round.

A step is forward, backward, clipping (`--clip`), update and `zero_grad`, and ends with a synchronisation, as in a loop
that logs its loss; `--free-running` leaves it out. Memory peaks cover warm-up too; allocator counts start after the
second step of a shape. "device GiB" is what the device counts as used, less what it did before the first
implementation: the context, and other processes. Behind the timed steps of a shape, one more is run to
find out what memory holds at its peak, by category (`bench/accounting.py`), and how many bytes an update must move;
"x copy" is the update's time over that of these bytes at the rate of a copy on this device. This package's AdamW clips
in its update, whose time and bytes then hold the norm's, and "clip" is 0 (`ours:clip_in_update=False` clips before).

`unsharded` is the floor: the same layers on each GPU alone, bf16 weights, gradients accumulating in place, no
optimizer. `ours` chooses its transport by itself, `ours-nccl` uses the process group. They, and those that end in
`-expandable`, run with `expandable_segments:True`, which our `fully_shard` sets by itself; `ours-segments` and all
others run without (`bench/allocator.py` says why one process may do both).
`deepspeed` is ZeRO-3 with tuned buckets, `deepspeed-blocks` the same, gathering block by block; both are left out where
the package is not installed. `--checkpointing block` recomputes every block's activations in backward, in all of them.

Instead of times: `--losses N` compares losses on text; `--varying N` trains steps of lengths between the least and the
most of `--seq-len`, with evaluations and checkpoints between, and counts memory by cycle; `--limit-gib X` finds the
longest sequence that trains in so much device memory.

An implementation that runs out of memory gets rows that say so, at that shape and those of more tokens.
Ranks do the same work and so run out at the same place; were one to fail alone, the process group's timeout
ends the run. Tables come last on the output; `--out` gets everything as JSON, see `scripts/results/README.md`.
"""

import sys
from collections.abc import Sequence

from bench.options import IMPLEMENTATIONS, parse_options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, and print its tables last; `--out` gets the report as one JSON object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(arguments, IMPLEMENTATIONS)
    from bench.train import run  # takes seconds

    run(options, arguments)


if __name__ == "__main__":
    main()
