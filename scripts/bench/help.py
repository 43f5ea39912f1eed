"""Help of the scripts' command lines, and kinds of arguments that several of them take.

Imports no torch, as no module of options does: `--help`, and what is wrong with a command line, take no seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DTYPE_NAMES = ("bf16", "fp32")
NUMBERS: dict[object, str] = {int: "int", float: "float"}


class Help(argparse.HelpFormatter):
    """Says the default of every option that has one, and what kind of number it takes."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        kind = f" ({NUMBERS[action.type]})" if action.type in NUMBERS else ""
        is_said = action.help is None or "default" in action.help
        has_none = action.default is None or isinstance(action.default, (bool, list))
        if is_said or has_none or action.default == argparse.SUPPRESS:
            return f"{action.help or ''}{kind}"
        return f"{action.help}{kind}; default: %(default)s"


class HelpAsWritten(Help, argparse.RawDescriptionHelpFormatter):
    """The same below a description that keeps its lines."""


def device_here() -> str:
    """Return what is measured where no device is named. Imports torch: for when all else of a command line is right."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def report_file(path: str) -> dict[str, Any]:
    """Return the report in a file: the type of an argument that names one. Raises ArgumentTypeError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a report in {path}, found a {type(found).__name__}")
    return found
