"""Text to token ids and back: a byte-level BPE trained here, or any Hugging Face tokenizer directory.

Owns the tokenizer's files, byte for byte, so that what a checkpoint carries is what was loaded. Needs ``tokenizers``,
not ``transformers``; ``transformers.AutoTokenizer`` reads what is saved here.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

MODEL_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# What else a tokenizer directory may hold: carried along, so that nothing is lost from load to save.
OTHER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
SPECIAL_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)  # every byte has a token, so that any text can be encoded
TRAINING_CHARACTERS = 100_000_000  # a vocabulary learns nothing more from the rest of a larger text


class Tokenizer:
    """A tokenizer as its files: ``files`` maps names to contents, and ``hash`` is theirs."""

    def __init__(self, files: Mapping[str, bytes], origin: str = "the tokenizer") -> None:
        """``origin`` is named in errors. Raises ValueError for contents that are no tokenizer, or one without eos."""
        self.files = dict(files)
        try:
            self._model = tokenizers.Tokenizer.from_buffer(self.files[MODEL_FILE])
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"{origin}/{MODEL_FILE} is not a tokenizer that `tokenizers` reads: {error}") from error
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # a special token's name inside a document is text
        special = {role: self._special_id(role) for role in SPECIAL_TOKENS}
        if special["eos_token"] is None:
            raise ValueError(
                f"{origin} names no eos_token of its vocabulary, and documents need one between them: add "
                f'"eos_token": "..." to {CONFIG_FILE}'
            )
        self.eos_id: int = special["eos_token"]
        self.bos_id, self.pad_id = special["bos_token"], special["pad_token"]
        # Ids may have gaps, so the largest counts, not how many there are.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE of at most ``vocab_size`` tokens; the same for the same documents."""
        if vocab_size < SMALLEST_VOCAB:
            raise ValueError(f"vocab_size must be at least {SMALLEST_VOCAB} (bytes, bos, eos, pad), found {vocab_size}")
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(_opening(documents, TRAINING_CHARACTERS), trainer)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **SPECIAL_TOKENS,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        return cls({MODEL_FILE: model.to_str().encode(), CONFIG_FILE: json.dumps(config, indent=2).encode()})

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory. Raises ValueError where there is none that can be read."""
        directory = Path(directory).expanduser()
        if not (directory / MODEL_FILE).is_file():
            raise ValueError(
                f"no {MODEL_FILE} in {directory}: expected a Hugging Face tokenizer directory; an older one is "
                "converted by transformers.AutoTokenizer.from_pretrained(it).save_pretrained(another)"
            )
        names = [name for name in (MODEL_FILE, CONFIG_FILE, *OTHER_FILES) if (directory / name).is_file()]
        try:
            files = {name: (directory / name).read_bytes() for name in names}
        except OSError as error:
            raise ValueError(f"{directory}: cannot be read: {error}") from error
        return cls(files, origin=str(directory))

    def save(self, directory: str | Path) -> None:
        """Write the files into ``directory``, which is made if it is not there."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos or eos is added."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on every core."""
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens are left out."""
        return self._model.decode(ids, skip_special_tokens=True)

    @cached_property
    def hash(self) -> str:
        """Hash of the files' names and contents, in hexadecimal."""
        digest = hashlib.blake2b(digest_size=16)
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def _special_id(self, role: str) -> int | None:
        """The id of "eos_token", say, by the files that may name it; None where none does."""
        for name in (CONFIG_FILE, "special_tokens_map.json"):
            token = _json_object(name, self.files.get(name, b"{}")).get(role)
            if isinstance(token, dict):  # an AddedToken, written out
                token = token.get("content")
            if isinstance(token, str):
                return self._model.token_to_id(token)
        return None


def _json_object(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} of the tokenizer is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _opening(documents: Iterable[str], num_characters: int) -> Iterator[str]:
    """Documents until ``num_characters`` are reached; the last one is cut."""
    for document in documents:
        yield document[:num_characters]
        num_characters -= len(document)
        if num_characters <= 0:
            return
