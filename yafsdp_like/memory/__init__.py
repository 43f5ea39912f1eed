"""Bytes: where they lie, how long they live, and in which stream order they are touched. Knows nothing of modules."""
