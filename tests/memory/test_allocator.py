"""Expandable segments are used unless the user configures the allocator."""

import pytest
import torch

from yafsdp_like.memory import allocator


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator is told, on a machine that seems to have a GPU and no configuration of its user's."""
    told: list[str] = []
    for name in allocator.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    allocator.use_expandable_segments.cache_clear()
    yield told
    allocator.use_expandable_segments.cache_clear()


def test_expandable_segments_are_asked_for_once(settings: list[str]) -> None:
    assert allocator.use_expandable_segments()
    assert allocator.use_expandable_segments()
    assert settings == ["expandable_segments:True"]


@pytest.mark.parametrize("name", allocator.SETTINGS)
def test_an_allocator_that_the_user_configures_is_left_alone(
    name: str, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "expandable_segments:False")
    assert not allocator.use_expandable_segments()
    assert settings == []


def test_nothing_is_asked_for_without_a_gpu(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not allocator.use_expandable_segments()
    assert settings == []
