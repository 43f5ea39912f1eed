"""Help of the scripts' command lines."""

from __future__ import annotations

import argparse

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
