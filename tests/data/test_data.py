"""Text into batches: what is read and refused, tokens that survive a kill, and an order whose state is one integer."""

import errno
import gzip
import json
import lzma
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from yafsdp_like.data import (
    DataConfig,
    PackedText,
    Progress,
    SequenceOrder,
    TextSource,
    Tokenizer,
    open_packed,
    prepare,
    shards,
    text,
    unigram_entropy,
)

ROOT = Path(__file__).parents[2]
SMALL_VOCAB = 300

properties = settings(deadline=None, max_examples=60)  # no deadline: the machine may be busy


def paragraphs(count: int) -> list[str]:
    return [f"Paragraph {i} says that twice {i} is {2 * i}.\nÆther, naïve, 東京, 🐋, {i * 'o'}!" for i in range(count)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Forty documents, enough for the hash to hold some out."""
    (tmp_path / "docs.jsonl").write_bytes(jsonl([{"text": p} for p in paragraphs(40)]))
    return DataConfig((str(tmp_path / "docs.jsonl"),), vocab_size=SMALL_VOCAB, cache=str(tmp_path / "cache"))


def documents_of(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Packed tokens taken apart again, at eos."""
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert len(tokens) == (ends[-1] + 1 if len(ends) else 0), "tokens after the last eos"
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


# --- text ---


def test_the_carried_text_is_small_and_english() -> None:
    documents = list(TextSource().documents())
    assert text.CARRIED_TEXT.stat().st_size < 2_000_000
    assert len(documents) == 247
    assert "Call me Ishmael." in documents[0]
    assert documents[-1].startswith("To the Senate and House of Representatives:")


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    documents = paragraphs(5)
    plain = "\n<|endoftext|>\n".join(documents).encode()
    rows = jsonl([{"text": document} for document in documents])
    contents = {
        "a.txt": plain,
        "windows.txt": b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"),
        "b.txt.xz": lzma.compress(plain),
        "c.TXT.gz": gzip.compress(plain, mtime=0),
        "d.jsonl": rows + b"\n",
        "e.jsonl.gz": gzip.compress(rows, mtime=0),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert list(TextSource((str(tmp_path / name),)).documents()) == documents, name


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": [*paragraphs(3), None, ""], "stars": [1, 2, 3, 4, 5]}), file)
    assert list(TextSource((str(file),), field="body").documents()) == paragraphs(3)
    for field in ("text", "stars"):
        with pytest.raises(ValueError, match=rf"rows.parquet: expected a string field '{field}', found body"):
            list(TextSource((str(file),), field=field).documents())
    file.write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"rows.parquet: not a readable parquet file"):
        list(TextSource((str(file),)).documents())


def test_directories_and_globs_are_sorted_and_name_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden/d.txt", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*paths: str) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in TextSource(paths).files()]

    assert names(str(tmp_path)) == ["a.txt", "b.txt", "deep/c.txt"]
    assert names(str(tmp_path / "*")) == ["a.txt", "b.txt"]
    assert names(str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.txt")) == ["b.txt", "a.txt", "deep/c.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("blank.txt", b" \n\n", r"no text in .*blank.txt: expected at least one document"),
        ("empty.jsonl", b"", r"no text in .*empty.jsonl: expected at least one document"),
        ("latin.txt", "naïve".encode("latin-1"), r"latin.txt, line 1: not UTF-8 text .*iconv"),
        ("second.txt", b"text\n\xff\n", r"second.txt, line 2: not UTF-8 text"),
        ("zeros.txt", b"text\nmore\0\n", r"zeros.txt, line 2: holds a zero byte"),
        ("plain.txt.xz", b"not compressed at all", r"plain.txt.xz: damaged or not what its ending says"),
        ("plain.txt.gz", b"not compressed at all", r"plain.txt.gz: damaged or not what its ending says"),
        ("cut.txt.xz", lzma.compress(bytes(range(65, 90)) * 99)[:40], r"cut.txt.xz: damaged or not what"),
        ("cut.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:12], r"cut.txt.gz: damaged or not what its ending says"),
        ("half.jsonl", b'{"text": "a"}\n{"text"', r"half.jsonl, line 2: expected one JSON object a line"),
        ("digits.jsonl", b'{"text": ' + b"7" * 5000 + b"}", r"digits.jsonl, line 1: expected one JSON object a line"),
        ("deep.jsonl", b"[" * 100_000, r"deep.jsonl, line 1: expected one JSON object a line"),
        ("list.jsonl", b"[1]\n", r"list.jsonl, line 1: expected a JSON object, found list"),
        ("field.jsonl", b'{"body": "a"}', r"line 1: expected a string field 'text', found body \(str\); set field"),
        ("type.jsonl", b'{"text": 3}', r"line 1: expected a string field 'text', found text \(int\); set field"),
        ("half-pair.jsonl", rb'{"text": "\ud800"}', r"half-pair.jsonl, line 1: half a surrogate pair"),
        ("book.pdf", b"%PDF", r"book.pdf: expected a name that ends in .txt"),
    ],
)
def test_a_bad_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(TextSource((str(tmp_path / name),)).documents())


def test_a_path_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    for path, message in [
        ("none.txt", "none.txt does not exist; paths are relative"),
        ("*.jsonl", r"\*.jsonl does not exist"),
        ("*.pdf", "matches 1 paths, none of which ends in .txt"),
        (".", "no text in directory .*: expected files that end in .txt"),
    ]:
        with pytest.raises(ValueError, match=message):
            TextSource((str(tmp_path / path),)).files()


def test_one_string_is_one_path(tmp_path: Path) -> None:
    """Prevents: one path a letter."""
    book = tmp_path / "my book.txt"
    book.write_text("Once.")
    assert TextSource(str(book)) == TextSource((str(book),))
    assert list(TextSource(str(book)).documents()) == ["Once."]
    assert DataConfig(str(book)) == DataConfig((str(book),))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"rows.parquet: reading parquet needs pyarrow: pip install pyarrow"):
        list(TextSource((str(tmp_path / "rows.parquet"),)).documents())


def test_a_missing_carried_text_says_where_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CARRIED_TEXT", tmp_path / "gone.txt.xz")
    with pytest.raises(ValueError, match=r"the carried text is not at .*gone.txt.xz: install from a checkout"):
        TextSource().files()


# --- tokenizer ---


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(paragraphs(30), SMALL_VOCAB)


@properties
@given(sample=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, sample: str) -> None:
    assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_training_twice_gives_the_same_files(tokenizer: Tokenizer) -> None:
    again = Tokenizer.train(paragraphs(30), SMALL_VOCAB)
    assert again.files == tokenizer.files
    assert again.hash == tokenizer.hash
    assert tokenizer.vocab_size == SMALL_VOCAB
    assert Tokenizer.train(paragraphs(30), SMALL_VOCAB - 1).hash != tokenizer.hash


def test_a_special_tokens_name_in_a_document_is_text(tokenizer: Tokenizer) -> None:
    """Prevents: text that ends its own document."""
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a<|endoftext|>b"


def test_transformers_loads_what_is_saved_and_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    sample = " ".join(paragraphs(3)) + "\n\n  Spaces , kept ?  don't"
    assert theirs.encode(sample, add_special_tokens=False) == tokenizer.encode(sample)
    assert theirs.decode(tokenizer.encode(sample)) == sample
    assert len(theirs) == tokenizer.vocab_size
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == [
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    ]

    theirs.save_pretrained(tmp_path / "theirs")
    back = Tokenizer.load(tmp_path / "theirs")
    assert back.encode(sample) == tokenizer.encode(sample)
    assert (back.eos_id, back.bos_id, back.pad_id) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)


def test_a_loaded_directory_is_saved_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()} == loaded.files
    assert "chat_template.jinja" in loaded.files


def test_a_tokenizer_that_does_not_work_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.json in .*: expected a Hugging Face tokenizer directory"):
        Tokenizer.load(tmp_path / "none")
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert Tokenizer.load(tmp_path).eos_id == tokenizer.eos_id
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nowhere|>"}')
    with pytest.raises(ValueError, match="names no eos_token of its vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json of the tokenizer is not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer that `tokenizers` reads"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size must be at least 259 .*, found 258"):
        Tokenizer.train(paragraphs(1), 258)


# --- progress ---


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "a.jsonl", "a.parquet"])
def test_reading_tells_how_much_of_the_files_is_read(tmp_path: Path, name: str) -> None:
    for part in ("1", "2"):
        plain = "\n<|endoftext|>\n".join(paragraphs(50)).encode()
        file = tmp_path / f"{part}{name}"
        if name.endswith("parquet"):
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.table({"text": paragraphs(50)}), file)
        elif name.endswith("jsonl"):
            file.write_bytes(jsonl([{"text": paragraph} for paragraph in paragraphs(50)]))
        else:
            compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
            file.write_bytes(compress(plain))
    source = TextSource(str(tmp_path))
    seen: list[int] = []
    assert len(list(source.documents(seen.append))) == 100
    assert seen == sorted(seen) and seen[0] > 0
    assert source.nbytes() == sum(file.stat().st_size for file in tmp_path.iterdir()) == seen[-1]
    assert source.nbytes() / 2 in seen  # after the first of two equal files


def test_who_builds_tells_how_far_it_is_and_who_waits_hears_it(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: silence where another rank than the one that speaks has won the race for the lock."""
    told: list[Progress] = []
    heard: list[Progress] = []
    waiting = threading.Thread(target=lambda: prepare(config, heard.append))

    def tell(progress: Progress) -> None:
        told.append(progress)
        if len(told) == 1:
            waiting.start()
        if progress.what.startswith("tokenizing"):
            until = time.monotonic() + 20
            while progress not in heard and time.monotonic() < until:
                time.sleep(0.01)

    prepare(config, tell)
    waiting.join()
    size = Path(config.paths[0]).stat().st_size
    assert told[0] == Progress("training a tokenizer of 300 tokens", 0, size)
    assert Progress(f"tokenizing {config.paths[0]}", 0, size) in told
    assert told[-1] == Progress(f"tokenizing {config.paths[0]}", size, size)
    assert heard and set(heard) <= set(told)
    (lock,) = config.cache_directory.glob("*.lock")
    assert lock.read_bytes() == b""
    told.clear()
    prepare(config, told.append)  # it is there
    assert told == []


def test_a_vocabulary_of_which_nothing_is_said_has_4096_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b c")
    silent, said = (DataConfig(str(tmp_path / "a.txt"), vocab_size=size, cache=str(tmp_path)) for size in (None, 4096))
    assert prepare(silent).directory == prepare(said).directory


# --- packed tokens ---


def test_packed_documents_come_back_each_on_its_side_of_the_split(config: DataConfig) -> None:
    packed = prepare(config)
    held_out = [p for p in paragraphs(40) if text.is_held_out(p, config.heldout_fraction)]
    assert 0 < len(held_out) < 10
    assert documents_of(packed.heldout, packed.tokenizer) == held_out
    assert documents_of(packed.train, packed.tokenizer) == [p for p in paragraphs(40) if p not in held_out]
    header = packed.header
    assert header.split == "documents by hash"
    assert (header.num_train, header.num_heldout) == (len(packed.train), len(packed.heldout))
    assert header.num_documents == 40
    assert header.num_text_nbytes == sum(len(p.encode()) for p in paragraphs(40))
    assert packed.train.dtype == np.dtype("<u2") == header.dtype


def test_one_long_document_is_split_by_its_last_tokens(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that cutting a document into pieces for the tokenizer loses nothing, with and without a place to cut."""
    monkeypatch.setattr(shards, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(shards, "GROUP_CHARACTERS", 200)
    document = "\n".join(paragraphs(20)) + "x" * 500
    (tmp_path / "book.txt").write_text(document, encoding="utf-8")
    packed = prepare(DataConfig((str(tmp_path / "book.txt"),), vocab_size=SMALL_VOCAB, cache=config.cache))
    assert packed.header.split == "last fraction"
    total = len(packed.train) + len(packed.heldout)
    assert len(packed.heldout) == math.ceil(0.03 * total)
    assert documents_of(np.concatenate([packed.train, packed.heldout]), packed.tokenizer) == [document]


def test_a_second_prepare_maps_the_first_ones_files(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config)
    monkeypatch.setattr(shards, "_build", None)
    second = prepare(config)
    assert second.header == first.header
    assert np.array_equal(second.train, first.train)
    assert open_packed(first.directory).tokenizer.files == first.tokenizer.files


def test_text_tokenizer_and_split_have_each_their_own_directory(config: DataConfig, tmp_path: Path) -> None:
    first = prepare(config)
    first.tokenizer.save(tmp_path / "tokenizer")
    variants = [
        DataConfig(config.paths, vocab_size=SMALL_VOCAB + 1, cache=config.cache),
        DataConfig(config.paths, vocab_size=SMALL_VOCAB, heldout_fraction=0.3, cache=config.cache),
        DataConfig(config.paths, tokenizer=str(tmp_path / "tokenizer"), cache=config.cache),
    ]
    packed = [first, *map(prepare, variants)]
    assert packed[3].header.tokens_hash == first.header.tokens_hash, "the same tokenizer, loaded, gives the same tokens"
    Path(config.paths[0]).write_bytes(jsonl([{"text": p} for p in paragraphs(41)]))
    packed.append(prepare(config))
    assert packed[4].header.num_documents == 41
    assert len({p.directory for p in packed}) == 5


def test_tokens_take_two_bytes_below_a_vocabulary_of_65536_and_four_from_there(tmp_path: Path) -> None:
    assert [shards.dtype_for(size) for size in (259, 65_535, 65_536, 128_256)] == ["<u2", "<u2", "<u4", "<u4"]
    vocabulary = {"</s>": 0, "?": 1, "low": 2, "high": 70_000}  # gaps, so that the count of tokens says nothing
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "text.txt").write_text("low high strange high " * 50)
    packed = prepare(DataConfig((str(tmp_path / "text.txt"),), tokenizer=str(tmp_path), cache=str(tmp_path / "cache")))
    assert packed.header.vocab_size == 70_001
    assert packed.train.dtype == np.dtype("<u4")
    assert packed.train[:4].tolist() == [2, 70_000, 1, 70_000]
    assert packed.heldout[-1] == 0


@pytest.mark.parametrize("damage", ["header.json", "train.bin", "heldout.bin", "tokenizer", "longer", "format", "swap"])
def test_a_damaged_directory_is_refused_and_made_again(config: DataConfig, damage: str) -> None:
    packed = prepare(config)
    directory, header = packed.directory, packed.header
    match damage:
        case "longer":
            with (directory / "train.bin").open("ab") as file:
                file.write(b"\0")
        case "format":
            content = (directory / "header.json").read_text().replace('"format": 1', '"format": 0')
            (directory / "header.json").write_text(content)
        case "swap":
            Tokenizer.train(paragraphs(2), 260).save(directory / "tokenizer")
        case "tokenizer":
            (directory / "tokenizer" / "tokenizer.json").unlink()
        case _:
            (directory / damage).unlink()
    with pytest.raises(ValueError, match=r"holds no packed tokens that can be used: .*; run prepare again"):
        open_packed(directory)
    assert prepare(config).header == header


def test_tokens_that_no_vocabulary_has_are_named_with_their_directory(config: DataConfig) -> None:
    """Prevents: an IndexError of an embedding, or on GPUs an assertion in a kernel."""
    packed = prepare(config)
    path = packed.directory / "train.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"training text in .* has the token 65535, .* the file is damaged"):
        open_packed(packed.directory).train_batches(seq_len=4).batch(0, 2)


def test_a_full_disk_is_one_error_and_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RuntimeError, match=r"cannot write packed tokens to .*: No space left on device; make room"):
        prepare(config)
    assert [path.suffix for path in config.cache_directory.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_made_is_one_error(config: DataConfig) -> None:
    with pytest.raises(RuntimeError, match=r"cannot write packed tokens to .*set cache to another directory"):
        prepare(DataConfig(config.paths, cache=f"{config.paths[0]}/cache"))


def test_bad_text_leaves_nothing_in_the_cache(config: DataConfig) -> None:
    """The error is that of the text, and comes late: after half of the tokens are written."""
    with Path(config.paths[0]).open("ab") as file:
        file.write(b"\xff\xff\n")
    with pytest.raises(ValueError, match=r"docs.jsonl, line \d+: not UTF-8 text"):
        prepare(config)
    assert [path.suffix for path in config.cache_directory.iterdir()] == [".lock"]


def test_text_that_changes_while_it_is_read_is_refused(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: tokens of half an old and half a new file, cached for ever under the old one's name."""
    train = Tokenizer.train

    def train_and_write(*arguments: Any) -> Tokenizer:
        trained = train(*arguments)
        with Path(config.paths[0]).open("ab") as file:
            file.write(jsonl([{"text": "one more"}]))
        return trained

    monkeypatch.setattr(Tokenizer, "train", train_and_write)
    with pytest.raises(RuntimeError, match=r"docs.jsonl changed while being read"):
        prepare(config)
    assert [path.suffix for path in config.cache_directory.iterdir()] == [".lock"]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.6, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"heldout_fraction must be above 0 and at most 0\.5"):
        DataConfig(heldout_fraction=fraction)


PROCESSES = """
import json, os, signal, sys
from pathlib import Path
from yafsdp_like.data import DataConfig, Tokenizer, prepare, shards
paths, cache, vocab_size, scenario = json.loads(sys.argv[1])

def kill_at(owner, name):
    def die(*_args, **_kwargs):
        if scenario != "together":
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"{cache}.reached", "a") as file:
            file.write("x")
        if os.path.getsize(f"{cache}.reached") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*_args, **_kwargs)
    original = getattr(owner, name)
    setattr(owner, name, die)

def child(point, directory):
    kill_at(*point)
    prepare(DataConfig(tuple(paths), vocab_size=vocab_size, cache=directory))

def forked(point, directory):
    pid = os.fork()
    if not pid:
        try:
            child(point, directory)
            os._exit(0)
        finally:
            os._exit(1)
    return pid

points = [(Tokenizer, "save"), (shards._Packer, "_write"), (shards.os, "fsync"), (shards, "Header"), (Path, "rename")]
if scenario == "together":
    pids = [forked((shards._Packer, "hash"), cache) for _ in range(3)]
else:
    pids = [forked(point, f"{cache}/{index}") for index, point in enumerate(points)]
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))
"""


def exit_codes(config: DataConfig, scenario: str) -> list[int]:
    """Of processes that prepare `config` and are killed on the way."""
    argument = json.dumps([config.paths, config.cache, config.vocab_size, scenario])
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, argument], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads(done.stdout)
    return codes


def test_a_killed_writer_leaves_nothing_that_open_accepts(config: DataConfig) -> None:
    """Killed at five places, from the tokenizer to the last instruction before the rename; the next one starts anew."""
    assert exit_codes(config, "one by one") == [-9] * 5
    for index in range(5):
        after = DataConfig(config.paths, vocab_size=config.vocab_size, cache=f"{config.cache}/{index}")
        left = list(after.cache_directory.iterdir())
        assert sorted(path.suffix for path in left) == [".lock", ".partial"]
        for path in left:
            with pytest.raises(ValueError, match="holds no packed tokens"):
                open_packed(path)
        packed = prepare(after)
        assert sorted(path.suffix for path in after.cache_directory.iterdir()) == ["", ".lock"]
        assert len(documents_of(packed.train, packed.tokenizer)) > 30


def test_processes_that_prepare_together_survive_the_death_of_the_one_that_builds(config: DataConfig) -> None:
    """Prevents: waiting for ever on a lock of the dead; and building as often as there are ranks."""
    assert sorted(exit_codes(config, "together")) == [-9, 0, 0]
    assert Path(f"{config.cache}.reached").read_text() == "xx", "one died building, one built, one found it built"
    assert prepare(config).header.num_documents == 40


def test_packed_text_gives_batches_of_both_splits(config: DataConfig) -> None:
    packed: PackedText = prepare(config)
    train, heldout = packed.train_batches(16, seed=3), packed.heldout_batches(16)
    inputs, _ = heldout.batch(0, 1)
    assert inputs[0].tolist() == packed.heldout[:16].tolist()
    assert train.num_sequences == (len(packed.train) - 1) // 16
    assert train.order == SequenceOrder(train.num_sequences, 3)
    with pytest.raises(ValueError, match=r"the held-out text in .* tokens, one sequence takes"):
        packed.heldout_batches(100_000)


# --- entropy ---


def test_unigram_entropy_is_in_nats_per_token() -> None:
    assert unigram_entropy(np.array([7, 7, 7], np.uint16)) == 0.0
    assert unigram_entropy(np.arange(64, dtype=np.uint32)) == pytest.approx(math.log(64))
    assert unigram_entropy(np.array([0, 0, 1, 3], np.uint16)) == pytest.approx(1.5 * math.log(2))
    with pytest.raises(ValueError, match="no tokens, so no entropy"):
        unigram_entropy(np.zeros(0, np.uint16))
