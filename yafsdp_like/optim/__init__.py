"""What turns gradients into updates: AdamW, and the learning rate's schedule."""

from yafsdp_like.optim.adamw import AdamW, Passes
from yafsdp_like.optim.schedule import WarmupCosine

__all__ = ["AdamW", "Passes", "WarmupCosine"]
