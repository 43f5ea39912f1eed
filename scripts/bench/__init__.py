"""A comparison of sharding runtimes on one training step; `scripts/bench_train.py` is its command."""
