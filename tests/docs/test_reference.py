"""The API reference: its pages are there, name what exists, and leave out no public name."""

import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import yafsdp_like
from yafsdp_like import inference

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav: list[dict[str, Any]]) -> Iterator[Path]:
    """Yield the pages that a navigation lists, sections included."""
    for entry in nav:
        for target in entry.values():
            if isinstance(target, list):
                yield from pages(target)
            else:
                yield ROOT / CONFIG["docs_dir"] / target


def documented() -> list[str]:
    """The dotted names that pages of the reference document."""
    return [
        name for page in pages(CONFIG["nav"]) for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]


def test_every_page_of_the_navigation_exists_and_every_page_is_in_it() -> None:
    listed = set(pages(CONFIG["nav"]))
    assert listed == set((ROOT / CONFIG["docs_dir"]).rglob("*.md"))


@pytest.mark.parametrize("name", documented())
def test_a_documented_name_exists_and_has_a_docstring(name: str) -> None:
    assert pkgutil.resolve_name(name).__doc__


@pytest.mark.parametrize("package", [yafsdp_like, inference], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package: Any) -> None:
    texts = " ".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    known = {name.rpartition(".")[2] for name in documented()} | set(re.findall(r"^\* `(\w+)`$", texts, re.MULTILINE))
    assert set(package.__all__) <= known


def test_the_site_loads_nothing_from_elsewhere() -> None:
    """The theme is one of mkdocs' own, and its highlighter, which comes from a server, is off."""
    theme = CONFIG["theme"]
    assert theme["name"] in ("mkdocs", "readthedocs") and theme["highlightjs"] is False
    assert not {"extra_css", "extra_javascript"} & set(CONFIG)


def test_packages_that_build_the_site_are_an_extra() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert '"docs": DOCS,' in setup
    plugins = [plugin if isinstance(plugin, str) else next(iter(plugin)) for plugin in CONFIG["plugins"]]
    assert plugins == ["search", "mkdocstrings"]
