"""What is said of models that are read: bars on a terminal, a line for each that is there elsewhere."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING
from unittest import mock

import rich.progress
from rich.console import Console

from launch.console import LoadingBars

if TYPE_CHECKING:
    import pytest

SIZES = (
    ("small", 3 << 20, 3 << 20),
    ("one", 0, 3 << 30),
    ("one", 1 << 30, 3 << 30),
    ("one", 3 << 30, 3 << 30),
    ("one", 3 << 30, 3 << 30),
    ("two", 0, 1 << 30),
)


def test_elsewhere_there_is_a_line_for_each_model_that_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadingBars() as bars:
        for name, loaded, nbytes in SIZES:
            bars.show(name, loaded, nbytes)
    small, one = capsys.readouterr().out.splitlines()
    assert small.startswith("loaded 'small': 3.00 MiB in ") and one.startswith("loaded 'one': 3.00 GiB in ")


def test_on_a_terminal_there_is_a_bar_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    progress = rich.progress.Progress
    monkeypatch.setattr(rich.progress, "Progress", lambda *columns: progress(*columns, console=console))
    with mock.patch("launch.console.is_terminal", return_value=True), LoadingBars() as bars:
        for name, loaded, nbytes in SIZES:
            bars.show(name, loaded, nbytes)
    assert "loading one" in out.getvalue() and "3.2/3.2 GB" in out.getvalue() and "loading two" in out.getvalue()
