"""What a Hugging Face directory says beside its weights: its tokenizer, the tokens that end a text, how to sample.

Owns the reading of these files. Directories come from anybody, so nothing in one is run and nobody is asked whether it
may be: code that a directory brings along is refused. Needs `transformers`, which is imported with the first tokenizer.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from yafsdp_like.inference.text.chat import translate_panics
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models.hf import CONFIG_NAME, GENERATION_CONFIG_NAME

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = "tokenizer.json", "tokenizer.model", TOKENIZER_CONFIG
SHORT = reprlib.Repr()
SAMPLED = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"  # what generation_config.json may say of it


def json_object(path: Path) -> dict[str, Any]:
    """The content of a file; {} where there is none. Raises ValueError, with the file's name, for anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected an object in JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object in JSON, found {type(found).__name__}")
    return found


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of `transformers` in a directory.

    Raises ValueError where there is none that can be read without running code of the directory, ImportError without
    `transformers`.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"no tokenizer in {directory}: expected one of {', '.join(TOKENIZER_FILES)} there")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"text needs transformers: pip install 'yafsdp_like[serve]' ({error})") from error
    fast, older = ((directory / name).is_file() for name in TOKENIZER_FILES[:2])
    if older and not fast and find_spec("sentencepiece") is None:
        raise ImportError(
            f"{directory} has no tokenizer.json, and tokenizer.model is converted by sentencepiece: pip install "
            "'yafsdp_like[serve]'"
        )
    for name in (TOKENIZER_CONFIG, CONFIG_NAME):
        _check_class(directory / name, transformers)
    try:
        with translate_panics(ValueError, "a mistake in tokenizers"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever a broken file makes of it
        raise ValueError(f"{directory}: transformers cannot read its tokenizer: {_one_line(error)}") from error
    if not tokenizer.get_vocab():
        raise ValueError(f"{directory}: its tokenizer has no tokens")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{directory}: expected a tokenizer that `tokenizers` runs, found {type(tokenizer).__name__}")
    return tokenizer


def _check_class(path: Path, transformers: Any) -> None:
    """Raise ValueError for a `tokenizer_class` that is no tokenizer of transformers.

    AutoTokenizer would call any attribute of `transformers` of that name, without trust_remote_code=False.
    """
    name = json_object(path).get("tokenizer_class")
    if name is None:
        return
    if not isinstance(name, str):
        raise ValueError(f"{path}: tokenizer_class must be a name, found {name!r}")
    for found in (getattr(transformers, spelled, None) for spelled in (name, name.removesuffix("Fast"))):
        is_tokenizer = isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)
        if found is not None and not is_tokenizer and not _is_dummy(found):
            raise ValueError(f"{path}: tokenizer_class {name!r} is no tokenizer of transformers")


def _is_dummy(found: Any) -> bool:
    """What stands for a class whose packages are missing: it says so when it is used."""
    return getattr(found, "_backends", None) is not None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def stop_tokens(directory: Path) -> frozenset[int]:
    """`eos_token_id` of generation_config.json and of config.json, each of which may be one id or several."""
    found: set[int] = set()
    for name in (GENERATION_CONFIG_NAME, CONFIG_NAME):
        value = json_object(directory / name).get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in listed):
            raise ValueError(f"{directory / name}: eos_token_id must be an id or a list of ids, found {value!r}")
        found.update(listed)
    return frozenset(found)


def sampling_defaults(directory: Path | None) -> SamplingParams:
    """How the model's authors sample: SamplingParams' own defaults, changed by what generation_config.json says.

    Its `do_sample` and lengths are not taken. Raises ValueError for numbers that cannot be.
    """
    if directory is None:
        return SamplingParams()
    path = directory / GENERATION_CONFIG_NAME
    given = {name: value for name, value in json_object(path).items() if name in SAMPLED and value is not None}
    kinds = {item.name: int if item.type == "int" else float for item in fields(SamplingParams)}
    for name, value in given.items():
        given[name] = _number(path, name, value, kinds[name])
    if given.get("top_k", 0) < 0:  # some write -1 for all
        given["top_k"] = 0
    try:
        return SamplingParams(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _number(path: Path, name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    """What a file says of a number, as a number of this kind."""
    try:
        if type(value) in (int, float) and kind(value) == value:  # which NaN is not, and neither is 5 for 5.5
            return kind(value)
    except (ValueError, OverflowError):  # NaN and infinity are no whole numbers, and some of those are no floats
        pass
    raise ValueError(f"{path}: {name} must be a {'whole ' if kind is int else ''}number, found {SHORT.repr(value)}")
