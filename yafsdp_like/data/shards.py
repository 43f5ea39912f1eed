"""Packed tokens on disk: text is tokenized once, and mapped into memory ever after.

Owns the cache directory, its locks, and what counts as complete. Knows nothing of sequences or ranks.

[Note: complete or absent]
A directory of the cache is written as ``KEY.partial`` under a lock of its own and then renamed to ``KEY``, header last.
Whatever kills the writer, readers find all of it or none of it; the kernel drops the lock with the process, so the
next one goes on, and removes what the dead one left. Any number of processes may therefore call `prepare` at once: one
builds, the others wait for it, and where it fails each of them tries, and fails, for itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from yafsdp_like.data.order import Batches
from yafsdp_like.data.progress import BETWEEN_WORDS_S, Say, Teller, heard, say_nothing
from yafsdp_like.data.text import TextSource, is_held_out
from yafsdp_like.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Tokens = npt.NDArray[np.unsignedinteger]  # (num_tokens,), mapped from a file

DEFAULT_VOCAB = 4096
FORMAT = 1  # of the directory; another number is another key, so that old directories are left alone
HEADER_FILE = "header.json"
TOKENIZER_DIRECTORY = "tokenizer"
PARTIAL = ".partial"
SPLITS = ("train", "heldout")
PIECE_CHARACTERS = 1 << 18  # longer documents are tokenized in pieces, so that they too use every core
GROUP_CHARACTERS = 1 << 21  # tokenized at once: what bounds the memory that it takes


@dataclass(frozen=True)
class DataConfig:
    """Which text, how it becomes tokens, and where they are kept.

    Held out are the documents whose hash falls in ``heldout_fraction``; where that leaves either side without any (one
    long document, say), it is the last ``heldout_fraction`` of the tokens. The header says which it was.
    """

    paths: str | tuple[str, ...] = ()  # files, directories, globs; none: the carried text
    field: str = "text"  # of JSONL and parquet
    tokenizer: str | None = None  # a Hugging Face directory; none: model.hf_dir's, else a BPE is trained on the text
    vocab_size: int | None = None  # of the BPE that is trained; none: 4096, or the model's where that is less
    heldout_fraction: float = 0.03  # of the documents, or of one long one: not trained on
    cache: str | None = None  # directory; none: yafsdp_like under $XDG_CACHE_HOME, or under ~/.cache

    def __post_init__(self) -> None:
        if isinstance(self.paths, str):
            object.__setattr__(self, "paths", (self.paths,))
        if not 0 < self.heldout_fraction <= 0.5:
            raise ValueError(f"heldout_fraction must be above 0 and at most 0.5, found {self.heldout_fraction}")

    @property
    def bpe_size(self) -> int:
        """Tokens of the vocabulary that is trained."""
        return DEFAULT_VOCAB if self.vocab_size is None else self.vocab_size

    @property
    def cache_directory(self) -> Path:
        """The directory below which packed tokens are kept."""
        if self.cache is not None:
            return Path(self.cache).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "yafsdp_like"


@dataclass(frozen=True)
class Header:
    """What a directory of packed tokens says of itself; counts are tokens unless they say otherwise."""

    format: int
    dtype: str  # of both files: "<u2" below a vocabulary of 65,536, else "<u4"
    num_train: int
    num_heldout: int
    num_documents: int
    num_text_nbytes: int  # UTF-8 bytes of the text behind all the tokens
    vocab_size: int
    split: str  # "documents by hash" or "last fraction"
    source_hash: str  # of the files' names, sizes and times
    tokenizer_hash: str
    tokens_hash: str  # of the tokens and of where they are split: equal where training is on the same data


@dataclass(frozen=True)
class PackedText:
    """An open directory: the tokens of both splits, and the tokenizer that made them."""

    directory: Path
    header: Header
    train: Tokens
    heldout: Tokens
    tokenizer: Tokenizer

    def train_batches(self, seq_len: int, seed: int = 0) -> Batches:
        """Shuffled anew each epoch. Raises ValueError where the text is shorter than one sequence."""
        return self._batches(self.train, seq_len, seed, "training")

    def heldout_batches(self, seq_len: int) -> Batches:
        """In the order of the text."""
        return self._batches(self.heldout, seq_len, None, "held-out")

    def _batches(self, tokens: Tokens, seq_len: int, seed: int | None, split: str) -> Batches:
        return Batches(tokens, seq_len, seed, f"the {split} text in {self.directory}", self.header.vocab_size)


def prepare(config: DataConfig, say: Say = say_nothing) -> PackedText:
    """The packed tokens of ``config``, made first where the cache lacks them; every rank may call it.

    ``say`` is called with the progress of that, whichever process does it.

    Raises ValueError for text, tokenizer or options that do not work, and RuntimeError where the cache cannot be
    written. See [Note: complete or absent].
    """
    source = TextSource(config.paths, config.field)
    tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    directory = config.cache_directory / _key(config, source, tokenizer)
    if (packed := _opened(directory)) is not None:
        return packed
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = directory.with_suffix(".lock")
        with _locked(lock, say):
            if (packed := _opened(directory)) is not None:  # another process built it while this one waited
                return packed
            with _complete_or_absent(directory) as partial:
                _build(partial, config, source, tokenizer, Teller(lock, source.nbytes(), say))
    except OSError as error:
        raise RuntimeError(
            f"cannot write packed tokens to {directory}: {error.strerror or error}; make room, or set cache to another "
            "directory (on a file system with locks)"
        ) from error
    return open_packed(directory)


def open_packed(directory: str | Path) -> PackedText:
    """Map a directory that `prepare` made. Raises ValueError for one that is missing, incomplete, or of other code."""
    directory = Path(directory)
    try:
        if directory.suffix == PARTIAL:
            raise ValueError("whoever wrote it was killed")
        fields = json.loads((directory / HEADER_FILE).read_bytes())
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']}, expected {FORMAT}")
        header = Header(**fields)
        train, heldout = (_map(directory / f"{name}.bin", header.dtype, fields[f"num_{name}"]) for name in SPLITS)
        tokenizer = Tokenizer.load(directory / TOKENIZER_DIRECTORY)
        if tokenizer.hash != header.tokenizer_hash:
            raise ValueError("its tokenizer is not the one that made the tokens")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} holds no packed tokens that can be used: {error}; run prepare again") from error
    return PackedText(directory, header, train, heldout, tokenizer)


def unigram_entropy(tokens: Tokens) -> float:
    """Entropy of the tokens' own frequencies, -sum p ln p, in nats per token.

    It is the loss of a model that knows how often each token occurs and nothing of what stands before it: one that has
    learned anything of the text is below.
    """
    counts = np.zeros(0, np.int64)
    for start in range(0, len(tokens), 1 << 24):
        chunk = np.bincount(tokens[start : start + (1 << 24)], minlength=len(counts))
        chunk[: len(counts)] += counts
        counts = chunk
    if not counts.any():
        raise ValueError("no tokens, so no entropy: expected at least one")
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# --- building ---


class _Piece(NamedTuple):
    """At most `PIECE_CHARACTERS` of a document."""

    text: str
    split: str  # of `SPLITS`
    ends_document: bool


def _key(config: DataConfig, source: TextSource, tokenizer: Tokenizer | None) -> str:
    vocabulary = f"bpe {config.bpe_size}" if tokenizer is None else tokenizer.hash
    material = f"{FORMAT}\0{source.hash()}\0{vocabulary}\0{config.heldout_fraction!r}"
    return hashlib.blake2b(material.encode(), digest_size=12).hexdigest()


def _opened(directory: Path) -> PackedText | None:
    """What is there, if it is complete."""
    try:
        return open_packed(directory)
    except ValueError:
        return None


def _build(
    directory: Path, config: DataConfig, source: TextSource, tokenizer: Tokenizer | None, teller: Teller
) -> None:
    """Fill ``directory``, which is empty, the header last."""
    source_hash = source.hash()
    # Where hashes do not leave documents on both sides, everything is tokenized first and cut afterwards.
    by_document = _hash_splits(source, config.heldout_fraction)
    fraction = config.heldout_fraction if by_document else 0.0
    if tokenizer is None:
        teller.begin(f"training a tokenizer of {config.bpe_size:,} tokens")
        texts = (document for document in source.documents(teller.read) if not is_held_out(document, fraction))
        tokenizer = Tokenizer.train(texts, config.bpe_size)
    tokenizer.save(directory / TOKENIZER_DIRECTORY)

    teller.begin(f"tokenizing {source.names()}")
    packer = _Packer(directory, tokenizer)
    packer.add(_pieces(source.documents(teller.read), fraction))
    if not by_document:
        packer.cut_tail(math.ceil(config.heldout_fraction * packer.num_tokens["train"]))
    if source.hash() != source_hash:
        raise RuntimeError(f"{source.names()} changed while being read; start again when nothing writes there")
    header = Header(
        format=FORMAT,
        dtype=packer.dtype,
        num_train=packer.num_tokens["train"],
        num_heldout=packer.num_tokens["heldout"],
        num_documents=packer.num_documents,
        num_text_nbytes=packer.num_text_nbytes,
        vocab_size=tokenizer.vocab_size,
        split="documents by hash" if by_document else "last fraction",
        source_hash=source_hash,
        tokenizer_hash=tokenizer.hash,
        tokens_hash=packer.hash(),
    )
    for name in SPLITS:
        _sync(directory / f"{name}.bin")
    (directory / HEADER_FILE).write_text(json.dumps(asdict(header), indent=2) + "\n")


class _Packer:
    """Tokenizes pieces into the two files of one directory."""

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self._paths = {name: directory / f"{name}.bin" for name in SPLITS}
        self._tokenizer = tokenizer
        self._digest = hashlib.blake2b(digest_size=16)
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.num_tokens = dict.fromkeys(SPLITS, 0)
        self.num_documents = 0
        self.num_text_nbytes = 0

    def add(self, pieces: Iterable[_Piece]) -> None:
        """Write the tokens of every document to its split's file, eos after each."""
        with ExitStack() as stack:
            files = {name: stack.enter_context(path.open("wb")) for name, path in self._paths.items()}
            for group in _groups(pieces):
                for piece, ids in zip(group, self._tokenizer.encode_batch([p.text for p in group]), strict=True):
                    self._write(files[piece.split], piece, ids)

    def cut_tail(self, num_tail: int) -> None:
        """Move the last tokens of the training split to the held-out one, which is empty."""
        itemsize = np.dtype(self.dtype).itemsize
        num_train = self.num_tokens["train"] - num_tail
        with self._paths["train"].open("r+b") as train, self._paths["heldout"].open("wb") as heldout:
            train.seek(num_train * itemsize)
            shutil.copyfileobj(train, heldout)
            train.truncate(num_train * itemsize)
        self.num_tokens = {"train": num_train, "heldout": num_tail}

    def hash(self) -> str:
        """Of all tokens in the order of the text, and of how many went where."""
        digest = self._digest.copy()
        digest.update(repr(sorted(self.num_tokens.items())).encode())
        return digest.hexdigest()

    def _write(self, file: BinaryIO, piece: _Piece, ids: list[int]) -> None:
        tokens = np.array(ids + [self._tokenizer.eos_id] * piece.ends_document, dtype=self.dtype).tobytes()
        file.write(tokens)
        self._digest.update(tokens)
        self.num_tokens[piece.split] += len(ids) + piece.ends_document
        self.num_documents += piece.ends_document
        self.num_text_nbytes += len(piece.text.encode())


def dtype_for(vocab_size: int) -> str:
    """The smallest of the two dtypes, little-endian as numpy spells it, that holds every id."""
    return "<u2" if vocab_size < 1 << 16 else "<u4"


def _hash_splits(source: TextSource, fraction: float) -> bool:
    """Whether hashes leave documents on both sides of the split; reads no further than the first of each."""
    found = set()
    for document in source.documents():
        found.add(is_held_out(document, fraction))
        if len(found) == 2:
            return True
    return False


def _pieces(documents: Iterable[str], fraction: float) -> Iterator[_Piece]:
    """Documents in order, long ones cut, before a line break or a space where there is one."""
    for document in documents:
        split = "heldout" if is_held_out(document, fraction) else "train"
        start = 0
        while start < len(document):
            stop = _cut(document, start)
            yield _Piece(document[start:stop], split, ends_document=stop == len(document))
            start = stop


def _cut(document: str, start: int) -> int:
    """Where the piece that begins at ``start`` ends."""
    limit = start + PIECE_CHARACTERS
    if limit >= len(document):
        return len(document)
    blank = max(document.rfind("\n", start + 1, limit), document.rfind(" ", start + 1, limit))
    return blank if blank > start else limit


def _groups(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    group: list[_Piece] = []
    num_characters = 0
    for piece in pieces:
        group.append(piece)
        num_characters += len(piece.text)
        if num_characters >= GROUP_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


# --- files ---


def _map(path: Path, dtype: str, num_tokens: int) -> Tokens:
    expected_nbytes = num_tokens * np.dtype(dtype).itemsize
    found_nbytes = path.stat().st_size
    if found_nbytes != expected_nbytes:
        raise ValueError(f"{path.name} has {found_nbytes} bytes, its header says {expected_nbytes}")
    if not num_tokens:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _sync(path: Path) -> None:
    """Wait until the disk has it: a header must not outlive a crash that its tokens did not."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def _complete_or_absent(directory: Path) -> Iterator[Path]:
    """A new directory to fill that gets its name ``directory`` at the end, unless there was an error; under a lock."""
    partial = directory.with_suffix(PARTIAL)
    for stale in (partial, directory):  # of a writer that was killed; damaged
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, which stays behind, empty: removing it would let two hold it.

    Meanwhile its owner's progress stands in it, and whoever waits passes it on.
    """
    with path.open("a") as file:
        while not _taken(file):
            if (progress := heard(path)) is not None:
                say(progress)
            time.sleep(BETWEEN_WORDS_S)
        try:
            yield
        finally:
            path.write_bytes(b"")


def _taken(file: IO[str]) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
