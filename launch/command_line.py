"""Command lines and YAML files to dataclasses: every field is an option, with its type, default and comment in --help.

Owns how options are written and how mistakes in them are reported. Imports no torch, so that --help and mistakes are
answered at once. YAML is read by PyYAML, values are checked against the fields' types by pydantic, ranges by the
dataclasses.

[Note: why no library splits the arguments]
jsonargparse 4.53 and pydantic-settings 2.16 were tried: both split by one pass of argparse, which refuses an optional
argument behind an option (``MODEL --max-tokens=5 PROMPT``), and neither offers argparse's intermixed pass, whose
handling of ``--`` differs between versions of Python. Neither takes flags without their section, text as it is (a stop
string ``[``), or bytes with a unit, nor names the file or the nearest key in an error. Splitting is forty lines here.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

OptionsT = TypeVar("OptionsT")

GRACE_SECONDS = 5.0  # torchrun ends all ranks once one has ended; the first rank reports the error before
UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
CONFIG = "config"  # the key of the YAML file
HELP, PRINT_CONFIG = {"-h", "--help"}, {"--print_config", "--print-config"}
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Tt]imed? ?out|remote process exited")
COLUMN, WIDTH = 52, 118  # of the help: where comments start, and where lines end


@dataclass(frozen=True)
class Command(Generic[OptionsT]):
    """A command whose options are the fields of a dataclass; fields that are dataclasses are sections.

    In a YAML file sections are mappings. On the command line an option is its dotted key (``--section.key=value``); a
    ``flat`` command drops the section and the unit and writes dashes (``--memory-limit`` for
    ``engine.memory_limit_nbytes``; ``--memory-limit-nbytes`` is understood, too), and its boolean options take no value
    (``--chat``, ``--no-graphs``).
    """

    usage: str
    options: type[OptionsT]
    notes: str = ""
    positionals: tuple[str, ...] = (CONFIG,)  # keys of arguments without a flag, in order
    flat: bool = False
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # flags of a flat command, by key
    implied: Callable[[Set[str]], Mapping[str, Any]] = lambda keys: {}  # values that follow from which keys are given
    mistake_status: int = 2  # exit status after a mistake

    def answer(self, arguments: Sequence[str], check: Callable[[OptionsT], object] = id) -> OptionsT | int:
        """The options, or the exit status where the command ends here: after --help (0) or a mistake.

        ``check`` raises ValueError for options that cannot be run. With torchrun the first rank speaks; the others wait
        to be ended with it, and then speak too: an error may be of one host only.
        """
        rank = int(os.environ.get("RANK", "0"))
        flags = set(arguments[: arguments.index("--") if "--" in arguments else None])
        try:
            if HELP & flags:
                text = self.help_text()
            else:
                options = self.load(arguments)
                check(options)
                if not PRINT_CONFIG & flags:
                    return options
                text = yaml.safe_dump(as_dict(options), sort_keys=False).rstrip()
        except ValueError as error:
            if rank:
                time.sleep(GRACE_SECONDS)
            print(f"error: {error}" + (f" (rank {rank})" if rank else ""), file=sys.stderr, flush=True)
            return self.mistake_status
        if rank == 0:
            try:
                print(text, flush=True)
            except BrokenPipeError:  # the reader has closed the pipe, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    def load(self, arguments: Sequence[str]) -> OptionsT:
        """Options of a command line, over those of its YAML file, over the defaults.

        Raises ValueError, in one line, for an unreadable file, an unknown key (with the nearest known one), and a value
        of the wrong type or out of range.
        """
        if not arguments:
            raise ValueError(f"no arguments; {self.usage}; --help lists the options")
        pairs = list(self._pairs(arguments))
        files = [Path(raw) for key, raw in pairs if key == CONFIG]
        content = _read_yaml(files[-1]) if files else {}
        in_file = list(_keys_of(content, self.options))
        for key in in_file:
            if not self._is_known(key):
                raise ValueError(f"unknown key '{key}' in {files[-1]}; {self._hint(key, [*self._hints])}")
        given = [(key, raw) for key, raw in pairs if key != CONFIG]
        keys = {key for key, _ in given}
        for key, value in self.implied({*in_file, *keys}).items():
            _set(content, key, value)
        lists: dict[str, list[str]] = {}
        for key, raw in given:
            hint = str if key in self.positionals else self._hints.get(key, Any)
            _set(content, key, _read_value(hint, raw, lists.setdefault(key, [])))
        return self._build(content, keys, files[-1] if files else None)

    def help_text(self) -> str:
        """Every option with its type, default and the comment beside its declaration."""
        inner = sections(self.options)
        lines = [self.usage, self.notes.rstrip(), "", *self._lines(self.options, "", leave_out=inner)]
        for name, section in inner.items():
            summary = (inspect.getdoc(section) or "").split("\n\n")[0]
            lines += ["", f"{name}: {' '.join(summary.split())}", *self._lines(section, f"{name}.")]
        return "\n".join(lines)

    # --- keys and flags ---

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return dict(known_keys(self.options))

    @cached_property
    def flags(self) -> dict[str, str]:
        """Keys of options by their flags, without the leading dashes."""
        if not self.flat:
            return {key: key for key in (*self._hints, CONFIG)}
        leaves = [key for key, hint in self._hints.items() if not _is_section(hint)]
        return {self.aliases.get(key, _flag(key)): key for key in (*leaves, CONFIG)}

    @cached_property
    def _flags_by_leaf(self) -> dict[str, str]:
        """Flags of a flat command by the names of their keys, unit included: errors and files have these."""
        return {_leaf(key).replace("_", "-"): flag for flag, key in self.flags.items()}

    def _pairs(self, arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Keys and raw values, in the order of the command line."""
        words, waiting, are_all_positional = iter(arguments), [*self.positionals], False
        for word in words:
            if word == "--" and not are_all_positional:
                are_all_positional = True
            elif word in PRINT_CONFIG and not are_all_positional:
                continue
            elif are_all_positional or not re.match(r"-[^\d.]", word):
                if not waiting:
                    raise ValueError(f"unexpected argument {word!r}; {self.usage}")
                yield waiting.pop(0), word
            else:
                flag, equals, raw = word.removeprefix("--").partition("=")
                key, is_negated = self._key_of(flag)
                if self.flat and self._hints.get(key) is bool and not equals:
                    raw = "false" if is_negated else "true"
                elif not equals:
                    following = next(words, None)
                    if following is None:
                        raise ValueError(f"--{flag} has no value: say --{flag}=VALUE; {self.usage}")
                    raw = following
                yield key, raw

    def _key_of(self, flag: str) -> tuple[str, bool]:
        """The key of a flag, and whether the flag negates it."""
        if not self.flat:
            if flag in self.flags or self._is_known(flag):
                return flag, False
            raise ValueError(f"unknown key '{flag}' in the command line; {self._hint(flag, [*self._hints])}")
        name, _, inner = flag.partition(".")
        if inner and _is_dict(self._hints.get(key := self.flags.get(name.replace("_", "-"), ""))):
            return f"{key}.{inner}", False
        flag = flag.replace("_", "-")
        flag = self._flags_by_leaf.get(flag, flag)
        if flag in self.flags:
            return self.flags[flag], False
        positive = self.flags.get(flag.removeprefix("no-"), "")
        if self._hints.get(positive) is bool:
            return positive, True
        raise ValueError(f"unknown option --{flag}; {self._hint(flag, [*self.flags])}")

    def _is_known(self, key: str) -> bool:
        """Whether the key is a field, or a key of a field that is a dictionary."""
        parents = (key[: found.start()] for found in re.finditer(r"\.", key))
        return key in self._hints or any(_is_dict(self._hints.get(parent)) for parent in parents)

    def _hint(self, key: str, known: Sequence[str]) -> str:
        near = difflib.get_close_matches(key, known, 1, 0.6) or [
            name for name in known if difflib.get_close_matches(_leaf(key), [_leaf(name)], 1, 0.7)
        ]
        return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"

    # --- values ---

    def _build(self, content: Mapping[str, Any], overridden: Set[str], path: Path | None) -> OptionsT:
        def build(cls: type, content: Any, prefix: str) -> dict[str, Any]:
            if not isinstance(content, Mapping):
                found = type(content).__name__
                raise ValueError(f"the section {prefix.rstrip('.')} must hold keys and values, found {found}")
            values: dict[str, Any] = {}
            for field in dataclasses.fields(cls):
                key, inner = f"{prefix}{field.name}", sections(cls).get(field.name)
                if field.name not in content:
                    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                        raise ValueError(f"no {key} given; {self.usage}")
                elif inner is None:
                    is_override = any(name == key or name.startswith(f"{key}.") for name in overridden)
                    where = str(path) if path is not None and not is_override else "the command line"
                    values[field.name] = _checked(key, self._hints[key], content[field.name], where)
                else:
                    made = {} if content[field.name] is None else build(inner, content[field.name], f"{key}.")
                    values[field.name] = dataclasses.replace(default_of(field), **made)
            return values

        return self.options(**build(self.options, content, ""))

    # --- help ---

    def _lines(self, cls: Any, prefix: str, leave_out: typing.Container[str] = ()) -> list[str]:
        flags, comments, lines = {key: flag for flag, key in self.flags.items()}, _comments(cls), []
        for field in dataclasses.fields(cls):
            if field.name not in leave_out:
                key = f"{prefix}{field.name}"
                hint, name = self._hints[key], flags[key] + (".KEY" if _is_dict(self._hints[key]) else "")
                default = default_of(field)
                said = "required" if default is dataclasses.MISSING else f"default: {default_text(default)}"
                lines += _beside(f"  --{name}={type_text(hint, key)} ({said})", comments.get(field.name, ""))
        return lines


def _beside(head: str, comment: str) -> list[str]:
    """An option, and its comment in a column of its own, from the next line on where the option is long."""
    column = " " * COLUMN
    said = textwrap.wrap(comment, WIDTH, initial_indent=column, subsequent_indent=column) or [head]
    if len(head) + 2 > COLUMN:
        return [head, *said] if comment else [head]
    return [head + said[0][len(head) :], *said[1:]]


def _comments(cls: type) -> dict[str, str]:
    """What is written behind `#` beside each field, inherited ones included."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        found |= re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(base), re.MULTILINE)
    return found


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; MISSING where it must be given."""
    return field.default_factory() if callable(field.default_factory) else field.default


def default_text(value: Any) -> str:
    """A default as YAML writes it, in one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()


def type_text(hint: Any, key: str = "") -> str:
    """A type as the help writes it: int, str|null, auto|cpu|cuda; and its unit, which the key ends with."""
    inner = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Literal:
            return "|".join(map(str, inner))
        case typing.Union | types.UnionType:
            return "|".join(type_text(part, key) for part in inner)
        case origin if origin is tuple:
            return f"[{type_text(inner[0])},...]" if Ellipsis in inner else f"[{','.join(map(type_text, inner))}]"
        case origin if origin is dict:
            return "value"
    if hint in (int, float) and key.endswith(("_nbytes", "_s")):
        return "bytes" if hint is int else "seconds"
    return "null" if hint is type(None) else str(hint.__name__)


# --- keys ---


def known_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key and its type; a section comes before its own keys."""
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{prefix}{name}", hint
        if _is_section(hint):
            yield from known_keys(hint, f"{prefix}{name}.")


def sections(cls: type) -> dict[str, type]:
    """The fields that hold options of their own."""
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if _is_section(hint)}


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_dict(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _flag(key: str) -> str:
    return _leaf(key).removesuffix("_nbytes").removesuffix("_s").replace("_", "-")


def _keys_of(content: Mapping[str, Any], cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested mappings, down to where options end."""
    inner = sections(cls)
    for key, value in content.items():
        if key in inner and isinstance(value, Mapping):
            yield from _keys_of(value, inner[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested dictionaries."""
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(content.get(parent), dict):
            content[parent] = {}
        content = content[parent]
    content[last] = value


# --- values ---


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2, and a key that is written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key in keys[:index] and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, found {type(content).__name__}")
    return content


def _read_value(hint: Any, raw: str, earlier: list[str]) -> Any:
    """An argument of the command line. Text is taken as it is; ``earlier`` collects options that may be repeated."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if is_union else (hint,)
    origins = {typing.get_origin(part) for part in parts}
    if tuple[str, ...] in parts and (str not in parts or not raw.lstrip().startswith("[")):
        earlier.append(raw)
        return list(earlier)
    if raw in ("null", "~") and type(None) in parts:
        return None
    if bool in parts and raw in ("true", "false"):
        return raw == "true"
    if tuple not in origins and (str in parts or typing.Literal in origins):
        return raw
    earlier.clear()
    try:
        return yaml.load(f"[{raw}]" if tuple in origins and not raw.lstrip().startswith("[") else raw, _Loader)
    except (yaml.YAMLError, RecursionError):
        return raw


def _checked(key: str, hint: Any, value: Any, where: str) -> Any:
    """The value as its field's type. Raises ValueError where it is of another."""
    from pydantic import TypeAdapter, ValidationError  # here: it takes time, and --help does not need it

    if value is None and type(None) not in typing.get_args(hint):
        raise ValueError(f"{key} must not be null; without the key it has its default")
    try:
        if key.endswith("_nbytes") and isinstance(value, str):
            value = nbytes(value)
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):
        found = value if isinstance(value, str) else json.dumps(value, default=str)
        raise ValueError(f"{key} in {where}: expected {type_text(hint, key)}, found {found[:200]}") from None
    except RecursionError:
        raise ValueError(f"{key} in {where} is nested too deeply") from None
    except ValueError as error:
        words = "is nested too deeply, or in itself" if "Circular" in str(error) else str(error)
        raise ValueError(f"{key} in {where}: {words}") from None


def nbytes(text: str) -> int:
    """Bytes of "40GiB", "1.5 GB" or "4096". Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2] not in UNITS:
        known = ", ".join(unit for unit in UNITS if unit)
        raise ValueError(f"expected a number of bytes such as 40GiB (units: {known}), found {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def check_directory(path: Path) -> None:
    """Raise ValueError where the directory of ``path`` is missing, before what goes there is made."""
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no directory {path.parent}")


def as_dict(options: Any) -> dict[str, Any]:
    """Plain mappings, lists, numbers and strings, as YAML and JSON write them."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def exit_status(run: Callable[[OptionsT], int | None], options: OptionsT) -> int:
    """What ``run(options)`` returns, or 0 for None; 1 after a line that says what is wrong, 130 after an interrupt."""
    try:
        return run(options) or 0
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    except (MemoryError, RuntimeError) as error:
        cause = error.__cause__ or error  # of a server, what its engine has failed with
        if "RANK" in os.environ and LOST_PEER.search(str(cause)):
            words = f"rank {os.environ['RANK']} lost another rank, which has ended or cannot be reached"
            print(f"error: {words}: {str(cause).splitlines()[0]}", file=sys.stderr, flush=True)
            return 1
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        print(f"error: {first}; or lower --memory-limit or --kv-memory", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
