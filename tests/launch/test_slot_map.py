"""Drawings of slot maps: both have every rectangle, and the page needs nothing from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from launch.page import page
from launch.slot_map import _figure, as_html, described, draw
from tests.ranks import alone_among
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.serving_plan import plan_serving
from yafsdp_like.memory.plan import MemoryPlan, Region
from yafsdp_like.memory.slot_map import slot_map
from yafsdp_like.models import PRESETS, Decoder

FROM_ELSEWHERE = re.compile(r"https?:|//\w|\bsrc=|\bhref=|url\(|@import|<link|<iframe|fetch\(|XMLHttpRequest")


class Parsed(HTMLParser):
    """Titles of rectangles; raises for a tag that is not closed, or that closes another."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag == "title":
            self.titles.append("")

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles[-1] += data


def training_plan(preset: str) -> MemoryPlan:
    with alone_among(2):
        with torch.device("meta"):
            model = Decoder(PRESETS[preset])
        for module in (*model.layers, model):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        return model.memory_plan()


PLANS = {
    "training, few layers": lambda: training_plan("tiny"),
    "training, 80 layers": lambda: training_plan("70b"),
    "serving, streamed": lambda: plan_serving(PRESETS["8b"], EngineOptions(memory_limit_nbytes=12 << 30)).memory,
}


@pytest.mark.parametrize("name", PLANS)
def test_the_page_has_every_rectangle_and_needs_nothing_from_elsewhere(name: str) -> None:
    plan = PLANS[name]()
    text = as_html(plan, "A <plan>")
    parsed = Parsed(text)
    rectangles = [described(r, panel) for panel in slot_map(plan) for r in panel.rectangles]
    assert parsed.titles == ["A <plan>", *rectangles]
    assert FROM_ELSEWHERE.findall(text) == []
    assert f"{plan.nbytes:,} bytes" in text
    for kind in {region.kind for region in plan.regions if region.nbytes}:
        assert f"{plan.nbytes_of(kind):,}" in text


def test_a_reference_to_elsewhere_would_be_found() -> None:
    for text in ('<script src="x.js">', '<a href="x">', "url(x.png)", "https://a.b", "@import 'x'"):
        assert FROM_ELSEWHERE.search(page("title", text))


def test_a_rectangle_says_its_bytes_and_its_ticks() -> None:
    plan = training_plan("tiny")
    gather = next(panel for panel in slot_map(plan) if panel.title == "gather slots")
    said = [described(r, gather) for r in gather.rectangles if r.name == "layers.0"]
    nbytes = f"{gather.rectangles[0].segment.nbytes:,}"
    assert len(said) == 2 and all(words.startswith("layers.0 · gather slots\n") for words in said)
    assert any(nbytes in described(r, gather) for r in gather.rectangles)
    assert [words.rpartition("· ")[2] for words in said] == [
        "forward, ticks 0 to 1 of 7",
        "backward, ticks 3 to 4 of 7",
    ]


def test_the_picture_has_the_same_rectangles_at_the_same_places() -> None:
    plan = training_plan("tiny")
    panels = slot_map(plan)
    figure = _figure(plan, "tiny")
    assert len(figure.axes) == len(panels)
    for axes, panel in zip(figure.axes, panels, strict=True):
        drawn = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in axes.patches]
        expected = [
            (r.first, r.segment.offset_nbytes, r.last + 1 - r.first, r.segment.nbytes) for r in panel.rectangles
        ]
        assert drawn == expected


def test_the_suffix_says_what_is_drawn(tmp_path: Path) -> None:
    plan = MemoryPlan(1, (Region("a.main_shard", "main_shard", 512),))
    draw(plan, tmp_path / "map.html")
    draw(plan, str(tmp_path / "map.png"))
    assert (tmp_path / "map.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "words"), [("map.svg", r"drawn as .html or .png"), ("no/map.png", "no directory")])
def test_a_file_that_cannot_be_drawn_is_refused(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        draw(MemoryPlan(1, ()), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
