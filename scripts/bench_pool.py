"""Measure a pool of models that share one device's memory: switches, first tokens of models that slept, and growth.

    python scripts/bench_pool.py --models 8b,3b,1b --limit-gib 22 --out scripts/results/<date>-<device>-pool.json
    python scripts/bench_pool.py --models 0.6b,135m --limit-gib 2 --measure many --switches 1000
    python scripts/bench_pool.py --models 3b,8b,1b,3b --limit-gib 24 --measure popular --requests 96 --rate 2
    python scripts/bench_pool.py --models 8b,3b,1b,8b,3b,1b --limit-gib 38 --kv-gib 10 --measure targets --batch 64 \
        --max-batch-tokens 2048 --new-tokens 128 --rates 4,16,32,64 --overload 3
    torchrun --nproc-per-node 2 scripts/bench_pool.py --models 8b,3b,1b --limit-gib 12     # on each of two GPUs

Run it with PYTHONPATH=. in a checkout. Models are presets with random weights; a limit in which not all fit together
makes them take turns. What it does is in `bench/pool_run.py`: this is the command.

Method. `link` is the best of five copies of 1 GiB (or as much as there is) from pinned host memory to the device.

`switch`: every pair of models that cannot be awake together, there and back, `--rounds` times: seconds from the call of
`wake_up`, with nothing under way, until the last byte has arrived, beside the bytes at the rate of `link`; and the
seconds after which the call returned. Of several ranks, which have parts of every model, seconds are those of the last
one, bytes and `share_of_link` one rank's; `share_of_links` is of the whole model, each byte counted once, at the rate
of all links together, which are measured one at a time.

`cold`: seconds to the first token of a prompt of `--prompt-tokens` for a model that sleeps and finds no byte again, and
for one that is awake, than which nothing can be faster; beside them the bytes at the rate of the link.

`prefetch`: one model serves a request while another, whose home does not meet the first one's, is prefetched; then
seconds to the first token of the other, waking included, and by how much they exceed those of a model that was awake
all the time and idle while the first one served the same, in turn.

`awake`: steps that decode, of each model in the pool and of an engine that has the model alone. Medians of steps.

`many`: `--switches` switches among all models, in random order, with requests of all models every ten: the allocator's
counters, the device's used memory and the tokens of each request, compared with those after the first round.

`popular`: the same requests, Poisson arrivals of which the k-th model of `--models` gets 1/k^`--zipf` as many as the
first, served in three ways within the same planned bytes, one after the other: `pool`, a process with a pool of all
models; `apart`, one process per model for as many as fit, the most popular first, while the rest takes turns in the
memory of the largest of them, each in a process that starts when it is asked, reads its files and records its graphs;
`disk`, where all models are served like this rest. Files were just written, so they are read from the system's cache;
processes are forked from one that has imported everything; what CUDA itself takes in each process is not counted. All
three favour `apart` and `disk` over what they would be in production. Seconds to first tokens count from arrivals; a
request without one by the end (`--most-s`) has waited as long as it has.

`targets`: requests of `--prompt-tokens` and `--new-tokens` arrive at random, as for `popular`, at rising `--rates`,
until less than 90 % of the readers' time is within targets (`--ttft-s`, `--tpot-s`; a refused request counts as no time
at all): of a pool that knows the targets, of the simulator of `simulate_pool.py`, which plays the same requests with
step times and a link that were measured just before, and then of one process per model (`apart`, see `popular`) at
`--apart-rates`. Requests in the middle 70 % count; what is left `--most-s` after the last arrival is late.
`--overload 3` adds three times the pool's rate at 90 %, for `--overload-s`: refused requests are told when to come
again, and no page is in use at the end.

Prompts are random tokens, other ones each time but in `many`, which turns the prefix cache off: the same steps then
compute the same rows. The last line of output is one JSON object.
"""

import sys
from collections.abc import Sequence

from bench.pool_options import parse_options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; the last line of output is the report as one JSON object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(arguments)
    from bench.pool_run import run  # takes seconds

    run(options, arguments)


if __name__ == "__main__":
    main()
