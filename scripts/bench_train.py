"""Compare sharding runtimes on one training step: same model, data and dtypes, one process group, one call.

    torchrun --nproc-per-node 2 scripts/bench_train.py --model 8b --impl unsharded,ours,fsdp2,deepspeed

Run it with PYTHONPATH=. in a checkout. What it does is in `bench/`: this is the command.

Method. Two 8B models with optimizer state do not fit on one GPU together, so implementations take turns: one
is built, sharded, initialised to the same values as the others, measured at every sequence length in ascending order,
and freed; then comes the next. The whole list is gone through `--rounds` times (A B C A B C), so that drift of clocks
and temperature hits all alike. Within a round a time is the median over steps, of the slowest rank; a row holds the
median over rounds, and the smallest and the largest round.

Every step ends with a synchronisation, as in a loop that logs its loss; `--free-running` leaves it out.
Memory peaks cover warm-up too; allocator counts start after the second step at a sequence length. `unsharded`
is the floor: the same layers on each GPU alone, bf16 weights, gradients accumulating in place, no optimizer.
`ours` chooses its transport by itself, `ours-nccl` uses the process group. `deepspeed` is ZeRO-3 with tuned buckets,
`deepspeed-blocks` the same, gathering block by block; both are left out where the package is not installed.

An implementation that runs out of memory gets rows that say so, at that sequence length and the longer ones.
Ranks do the same work and so run out at the same place; were one to fail alone, the process group's timeout
ends the run. The last line of output is one JSON object, see `scripts/results/README.md`.
"""

from bench.train import main

if __name__ == "__main__":
    main()
