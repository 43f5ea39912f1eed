"""Every file, class and function that the documents name exists, and the walks are as short as they say."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for top in ("yafsdp_like", "launch", "scripts", "tests", "examples") for path in (ROOT / top).rglob("*.py")
]
DOCUMENTS = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = {"setup.py", "train.py"}  # at the root; README's own program
WALKS = {"one-parameter.md": 6, "one-token.md": 8}  # and the number of files that each may lead through
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)")


def spans(text: str) -> list[str]:
    """What a document has in backticks, outside its code blocks."""
    return SPAN.findall(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


@cache
def names_in(path: Path) -> frozenset[str]:
    """Names that a file defines: functions, classes, constants, and `Class.member` of each of its classes."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        found |= set(_bound(node))
        if isinstance(node, ast.ClassDef):
            members = {name for child in node.body for name in _bound(child)}
            members |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
            found |= {f"{node.name}.{member}" for member in members}
    return frozenset(found)


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def files_called(name: str) -> list[Path]:
    """Files of the repository whose path ends in `name`, at a folder's boundary."""
    return [path for path in SOURCES if f"/{path.relative_to(ROOT).as_posix()}".endswith(f"/{name}")]


def classes_called(name: str) -> list[Path]:
    """Files of the package that define a class of this name."""
    return [path for path in SOURCES if path.is_relative_to(ROOT / "yafsdp_like") and name in names_in(path)]


def missing(text: str) -> list[str]:
    """What a text names in backticks that does not exist: `file.py`, `file.py:name` and `Class.member`."""
    found = []
    for span in spans(text):
        if match := re.fullmatch(r"([\w/]+\.py)(?::([\w.]+))?", span):
            files = files_called(match[1])
            there = match[1] in OTHERS or any(match[2] is None or match[2] in names_in(path) for path in files)
            found += [] if there else [span]
        elif match := re.fullmatch(r"([A-Z]\w+)\.(\w+)(?:\(.*\))?", span):
            homes = classes_called(match[1])
            there = not homes or any(f"{match[1]}.{match[2]}" in names_in(path) for path in homes)
            found += [] if there else [span]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document: Path) -> None:
    assert missing(document.read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_links_to_exists(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize(("name", "most"), WALKS.items())
def test_a_walk_leads_through_few_files(name: str, most: int) -> None:
    """Counts every source file that the walk links to or names."""
    text = (ROOT / "docs" / name).read_text()
    linked = {(ROOT / "docs" / link).resolve() for link in LINK.findall(text) if link.endswith(".py")}
    named = {span.split(":")[0] for span in spans(text) if re.match(r"[\w/]+\.py\b", span)}
    files = linked | {path for span in named for path in files_called(span)[:1]}
    assert 1 < len(files) <= most


def test_a_name_that_does_not_exist_is_found() -> None:
    assert missing(
        "`memory/plan.py:place` `memory/plan.py:nothing` `MemoryPlan.nbytes` `MemoryPlan.none` `none.py`"
    ) == [
        "memory/plan.py:nothing",
        "MemoryPlan.none",
        "none.py",
    ]
