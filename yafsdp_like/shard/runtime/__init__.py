"""What changes while a sharded model runs: values in shards and slots, and in which order streams touch them."""
