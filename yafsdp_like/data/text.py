"""Where text comes from: documents out of local files, in one order, and which of them are held out.

Knows nothing of tokens. Whatever is wrong with a file is one ``ValueError`` that names the file and what to do.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SEPARATOR = "<|endoftext|>"  # alone on a line, it ends a document of plain text
CARRIED_TEXT = Path(__file__).parents[2] / "data" / "english.txt.xz"
KINDS = (".txt", ".jsonl", ".parquet")
DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {"": nullcontext, ".gz": gzip.open, ".xz": lzma.open}
Seen = Callable[[int], None]  # called with the number of bytes that have been read


@dataclass(frozen=True)
class TextSource:
    """Documents of local files. Reading never depends on anything but the files, so two readers see the same order.

    ``paths`` are files, directories (searched recursively, hidden files left out) and globs (``**`` included), read in
    the order given, each one's files sorted by name; none means the text that the repository carries. ``.txt`` holds
    documents between lines ``<|endoftext|>``, or one document; a line of ``.jsonl`` and a row of ``.parquet`` hold one
    in ``field``. The first two may be compressed (``.gz``, ``.xz``). All text is UTF-8; a document must fit in memory.
    """

    paths: str | tuple[str, ...] = ()  # one string is one path
    field: str = "text"

    def __post_init__(self) -> None:
        if isinstance(self.paths, str):
            object.__setattr__(self, "paths", (self.paths,))

    def files(self) -> list[Path]:
        """The files to read, each once. Raises ValueError for a path that leads to none, or to none that we read."""
        if not self.paths:
            return [_carried_text()]
        return list(dict.fromkeys(file for path in self.paths for file in _expand(path)))

    def nbytes(self) -> int:
        """Of all files, as they lie on the disk."""
        return sum(_nbytes(file) for file in self.files())

    def documents(self, seen: Seen = lambda nbytes: None) -> Iterator[str]:
        """Every document that is not blank; `seen` is called with the number of bytes read, of `nbytes`.

        Raises ValueError where a file cannot be read, or nothing is in any.
        """
        empty, before = True, 0
        for file in self.files():

            def seen_here(nbytes: int, before: int = before) -> None:
                seen(before + nbytes)

            for document in _read(file, self.field, seen_here):
                if document and not document.isspace():
                    empty = False
                    yield document
            before += _nbytes(file)
            seen(before)
        if empty:
            raise ValueError(f"no text in {self.names()}: expected at least one document that is not blank")

    def names(self) -> str:
        """The first few files, for messages."""
        files = self.files()
        return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")

    def hash(self) -> str:
        """Changes when a file is added, removed, renamed or written; costs no reading.

        It stands for sizes and times of change, not for contents: what was read is in the shards' own hash.
        """
        digest = hashlib.blake2b(self.field.encode(), digest_size=16)
        for file in self.files():
            with _naming(file):
                stat = file.stat()
            digest.update(f"\0{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def is_held_out(document: str, fraction: float) -> bool:
    """Whether the hash of a document falls in the held-out ``fraction``: the same for ever, whatever is beside it."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


# --- which files ---


def _carried_text() -> Path:
    if not CARRIED_TEXT.is_file():
        raise ValueError(
            f"the carried text is not at {CARRIED_TEXT}: install from a checkout (pip install -e .), or set paths to a "
            "text of your own"
        )
    return CARRIED_TEXT


def _expand(pattern: str) -> list[Path]:
    """The files that one of the user's paths stands for, sorted."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_text(file) and not _hidden(file, path))
        if not files:
            raise ValueError(f"no text in directory {path}: expected files that end in {_endings()}")
        return files
    if path.exists():
        if not _format_of(path):
            raise ValueError(f"{path}: expected a name that ends in {_endings()}; rename or convert the file")
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in matches if _is_text(file)]
    if files:
        return files
    found = f"matches {len(matches)} paths, none of which ends in {_endings()}" if matches else "does not exist"
    raise ValueError(f"{path} {found}; paths are relative to the directory that the program was started in")


def _format_of(file: Path) -> tuple[str, str] | None:
    """(kind, compression) by the name: ("jsonl", ".gz"); None for files that we do not read."""
    name = file.name.lower()
    compression = next((suffix for suffix in (".gz", ".xz") if name.endswith(suffix)), "")
    kind = Path(name.removesuffix(compression)).suffix
    if kind not in KINDS or (kind == ".parquet" and compression):
        return None
    return kind, compression


def _is_text(file: Path) -> bool:
    return _format_of(file) is not None and file.is_file()


def _hidden(file: Path, directory: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(directory).parts)


def _endings() -> str:
    return ".txt or .jsonl (also .gz, .xz), or .parquet"


# --- what is in them ---


def _nbytes(file: Path) -> int:
    with _naming(file):
        return file.stat().st_size


def _read(file: Path, field: str, seen: Seen) -> Iterator[str]:
    kind, compression = _format_of(file) or ("", "")
    if kind == ".parquet":
        return _read_parquet(file, field, seen)
    lines = _lines(file, compression, seen)
    return _read_jsonl(file, lines, field) if kind == ".jsonl" else _read_plain(lines)


def _lines(file: Path, compression: str, seen: Seen) -> Iterator[str]:
    """Lines of UTF-8 text, decompressed; a byte order mark is dropped, CR LF becomes LF."""
    number = 0
    with _naming(file), file.open("rb") as raw, DECOMPRESSORS[compression](raw) as lines:
        for number, line in enumerate(lines, start=1):
            seen(raw.tell())
            text = _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, file, number)
            if "\0" in text:
                raise ValueError(f"{file}, line {number}: holds a zero byte, so it is not text; take it out")
            yield text.replace("\r\n", "\n")


def _decoded(line: bytes, file: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}, line {number}: not UTF-8 text ({error}); convert the file with iconv -t utf-8, or take it out"
        ) from error


def _read_plain(lines: Iterator[str]) -> Iterator[str]:
    parts: list[str] = []
    for line in lines:
        if line.strip() == SEPARATOR:
            yield "".join(parts).strip("\n")
            parts = []
        else:
            parts.append(line)
    yield "".join(parts).strip("\n")


def _read_jsonl(file: Path, lines: Iterator[str], field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits, of lists too deep
            raise ValueError(f"{file}, line {number}: expected one JSON object a line: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: expected a JSON object, found {type(row).__name__}")
        if not isinstance(row.get(field), str):
            types = {name: type(value).__name__ for name, value in row.items()}
            raise ValueError(f"{file}, line {number}: {_wrong_field(field, types)}")
        try:
            row[field].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{file}, line {number}: half a surrogate pair is not text ({error})") from error
        yield row[field]


def _read_parquet(file: Path, field: str, seen: Seen) -> Iterator[str]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        pyarrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise ValueError(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        with _naming(file), parquet.ParquetFile(file) as table:
            types = {column.name: str(column.type) for column in table.schema_arrow}
            if types.get(field) not in ("string", "large_string", "string_view"):
                raise ValueError(f"{file}: {_wrong_field(field, types)}")
            num_rows = 0
            for rows in table.iter_batches(columns=[field]):
                num_rows += rows.num_rows
                seen(_nbytes(file) * num_rows // table.metadata.num_rows)
                yield from (text for text in rows.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a readable parquet file ({error}); write it again or take it out") from error


def _wrong_field(field: str, types: dict[str, str]) -> str:
    found = ", ".join(f"{name} ({kind})" for name, kind in types.items()) or "none"
    return f"expected a string field {field!r}, found {found}; set field to the one that holds the text"


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """What goes wrong with ``file`` inside becomes a ValueError that names it."""
    try:
        yield
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{file}: damaged or not what its ending says ({error}); copy it here again") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from error
