"""The KV cache: where keys and values lie, who shares them, and what goes when memory is short."""
