"""Text into batches: documents, a tokenizer, packed tokens on disk, and an order whose whole state is one integer."""

from yafsdp_like.data.order import Batches, SequenceOrder
from yafsdp_like.data.progress import Progress
from yafsdp_like.data.shards import DEFAULT_VOCAB, DataConfig, Header, PackedText, open_packed, prepare, unigram_entropy
from yafsdp_like.data.text import TextSource
from yafsdp_like.data.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_VOCAB",
    "Batches",
    "DataConfig",
    "Header",
    "PackedText",
    "Progress",
    "SequenceOrder",
    "TextSource",
    "Tokenizer",
    "open_packed",
    "prepare",
    "unigram_entropy",
]
