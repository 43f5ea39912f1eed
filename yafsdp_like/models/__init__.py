"""Models built from plain torch modules, shared by training and serving."""

from yafsdp_like.models.decoder import IGNORE_INDEX, PRESETS, Block, Decoder, DecoderConfig, next_token_loss

__all__ = ["IGNORE_INDEX", "PRESETS", "Block", "Decoder", "DecoderConfig", "next_token_loss"]
