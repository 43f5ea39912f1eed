"""What the training command says before it trains: its keys, the configuration that it would run, or what is mistyped.

Imports no torch: whoever mistypes a key is told so in less time than that takes.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import textwrap
import time
import typing
from collections.abc import Sequence
from typing import Any

import yaml

from launch import config
from launch.config import FREE_KEYS, USAGE, Config, type_text
from yafsdp_like.data import TextSource

GRACE_SECONDS = 5.0  # a launcher ends all ranks when one has ended; the first rank is to say why before
HELP = "-h", "--help"
COLUMN, WIDTH = 52, 118
PRINT_CONFIG = "--print_config"
NOTES = """
Keys stand in the YAML file in sections, or after it with dots: --optimizer.lr=1e-3 (the last one counts). A list is
written [a, b], nothing is null, and --data.paths=FILE may be repeated. --print_config shows what would be run.
"""


def answered(arguments: Sequence[str]) -> int | None:
    """The exit status of a command line that is done with words: a question (0) or a mistake (1); None for a run.

    The first rank speaks. With torchrun the others wait, to be ended with it; who is not, as on a host that lacks what
    the first one's has, speaks too.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        words = _words(arguments)
    except ValueError as error:
        if rank:
            time.sleep(GRACE_SECONDS)
        print(f"error: {error}" + (f" (rank {rank})" if rank else ""), file=sys.stderr, flush=True)
        return 1
    if words is None:
        return None
    if rank == 0:
        try:
            print(words, flush=True)
        except BrokenPipeError:  # whoever reads has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _words(arguments: Sequence[str]) -> str | None:
    if set(arguments) & set(HELP):
        return help_text()
    asks = PRINT_CONFIG in arguments
    told = [word for word in arguments if word != PRINT_CONFIG]
    options = Config() if asks and not told else config.load(told)
    options.num_accumulated(int(os.environ.get("WORLD_SIZE", "1")))
    TextSource(options.data.paths).files()
    return yaml.safe_dump(config.as_dict(options), sort_keys=False).rstrip() if asks else None


def help_text() -> str:
    """Every key with its type, its default and what is said beside it where it is declared."""
    lines = [USAGE, NOTES.rstrip()]
    sections = config.sections(Config)
    lines += ["", *_lines(Config, "", leave_out=sections)]
    for name, section in sections.items():
        summary = inspect.getdoc(section) or ""
        lines += ["", f"{name}: {' '.join(summary.split(chr(10) * 2)[0].split())}", *_lines(section, f"{name}.")]
    return "\n".join(lines)


def _lines(cls: Any, prefix: str, leave_out: typing.Container[str] = ()) -> list[str]:
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    lines = []
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        key = f"{prefix}{field.name}"
        key += ".KEY" if f"{key}." in FREE_KEYS else ""
        default = field.default_factory() if callable(field.default_factory) else field.default
        head = f"  --{key}={type_text(hints[field.name])} (default: {default_text(default)})"
        lines += _beside(head, comments.get(field.name, ""))
    return lines


def _beside(head: str, comment: str) -> list[str]:
    """A key, and what is said of it in a column of its own, from the next line on where the key is long."""
    column = " " * COLUMN
    said = textwrap.wrap(comment, WIDTH, initial_indent=column, subsequent_indent=column) or [head]
    if len(head) + 2 > COLUMN:
        return [head, *said] if comment else [head]
    return [head + said[0][len(head) :], *said[1:]]


def default_text(value: Any) -> str:
    """A default as YAML has it, in one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()


def _comments(cls: type) -> dict[str, str]:
    """What stands behind `#` beside each field."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
