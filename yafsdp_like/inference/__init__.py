"""Serving one model: where keys and values lie, who shares them, and what goes when memory is short."""
