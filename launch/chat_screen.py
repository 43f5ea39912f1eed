"""What a person sees and types in a chat: lines with history, and answers that are shown as they come.

Owns the terminal. What is typed goes through readline, where Python has it. Models may say anything, so nothing of an
answer is taken as the terminal's own control characters, as rich's markup, as HTML, or as a link that hides its target.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Generator, Iterator

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

QUOTES = '"""'
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
PROMPT, MORE = "> ", ". "
HINT = "Ctrl-D or /quit leaves"
FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})(.*)")
REFRESHES_S = 12


class Tail:
    """The last lines of something, as many as the terminal has."""

    def __init__(self, inner: Markdown) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._inner, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 1) :]:
            yield from line
            yield Segment.line()


class Screen:
    """A terminal, or plain text where standard input and output are none."""

    def __init__(self, as_markdown: bool) -> None:
        self._console = Console(highlight=False)
        self._is_typed = sys.stdin.isatty() and sys.stdout.isatty()
        self._as_markdown = as_markdown and self._is_typed
        if self._is_typed:
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # `input` uses it from then on

    def read(self) -> str | None:
        """Return the next message that is not empty, of one line or several; None where there are no more."""
        lines: list[str] = []
        is_quoted = False
        while True:
            try:
                line = input((MORE if lines else PROMPT) if self._is_typed else "")
            except EOFError:
                return "\n".join(lines).strip() or None
            except KeyboardInterrupt:
                self.say(f"\n{HINT}")
                lines, is_quoted = [], False
                continue
            if not lines and line.lstrip().startswith(QUOTES):
                line, is_quoted = line.lstrip().removeprefix(QUOTES), True
            is_last = line.rstrip().endswith(QUOTES) if is_quoted else not line.endswith("\\")
            ending = QUOTES if is_quoted else "\\"
            lines.append(line.rstrip().removesuffix(ending) if is_last == is_quoted else line)
            if is_last:
                if text := "\n".join(lines).strip():
                    return text
                lines, is_quoted = [], False

    def show(self, pieces: Generator[str]) -> str:
        """Show an answer as it comes, and return it; after Ctrl-C as much as has come. Raises what ``pieces`` does."""
        said: list[str] = []
        write = self._as_they_come() if not self._as_markdown else self._as_blocks()
        try:
            with contextlib.closing(pieces), write as show:
                for piece in pieces:
                    said.append(piece)
                    show(_shown(piece))
        except KeyboardInterrupt:
            self.say("[stopped]")
        return "".join(said)

    def say(self, text: str) -> None:
        """Say something that is not the model's, where somebody is there to read it."""
        if self._is_typed:
            self._console.print(Text(_shown(text)), style="dim")

    def tell(self, text: str) -> None:
        """Say what a command was asked for: without a terminal too, but beside the answers."""
        if self._is_typed:
            self.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def complain(self, text: str) -> None:
        """Say what went wrong."""
        if self._is_typed:
            self._console.print(Text(_shown(text)), style="red")
        else:
            print(f"error: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _as_they_come(self) -> Iterator[Callable[[str], None]]:
        try:
            yield lambda piece: print(piece, end="", flush=True)
        finally:
            print(flush=True)

    @contextlib.contextmanager
    def _as_blocks(self) -> Iterator[Callable[[str], None]]:
        """Print Markdown blocks that are whole, and show the one that is being written below them."""
        text, num_printed = "", 0

        def show(piece: str) -> None:
            nonlocal text, num_printed
            text += piece
            if (end := end_of_blocks(text, num_printed)) > num_printed:
                live.console.print(markdown(text[num_printed:end]), "")
                num_printed = end
            live.update(Tail(markdown(text[num_printed:])))

        try:
            with Live(Text("…", "dim"), console=self._console, refresh_per_second=REFRESHES_S, transient=True) as live:
                yield show
        finally:
            self._console.print(markdown(text[num_printed:]))


def _shown(text: str) -> str:
    return text.translate(CONTROLS)


def markdown(text: str) -> Markdown:
    """Set a text as Markdown: its line breaks are kept, HTML in it is text, and links show where they lead."""
    made = Markdown("", hyperlinks=False)
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    made.parsed = parser.parse(text.replace("\n", "  \n"))
    return made


def end_of_blocks(text: str, start: int) -> int:
    """Return behind which empty line, outside of fenced code, nothing written later changes what is before it.

    Links whose address stands in a block further down stay as they were written.
    """
    end, at, fence = start, start, ""
    for line in text[start:].splitlines(keepends=True):
        at += len(line)
        found = FENCE.match(line)
        if fence:  # is ended by as many of the same characters, or more, and nothing else
            fence = "" if found and found[1].startswith(fence) and not found[2].strip() else fence
        elif found:
            fence = found[1]
        elif line.endswith("\n") and not line.strip():
            end = at
    return end
