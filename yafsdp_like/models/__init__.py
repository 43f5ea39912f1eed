"""Models built from plain torch modules, shared by training and serving."""

from yafsdp_like.models.decoder import PRESETS, Block, Decoder, DecoderConfig
from yafsdp_like.models.moe import ExpertsConfig
from yafsdp_like.ops.loss import IGNORE_INDEX, linear_cross_entropy

__all__ = ["IGNORE_INDEX", "PRESETS", "Block", "Decoder", "DecoderConfig", "ExpertsConfig", "linear_cross_entropy"]
