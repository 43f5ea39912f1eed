"""Rotary positions and the way into pages, against the reference."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.inference import BF16, F8, F16, F32, ROUNDED_ONCE, TOLERANCES, assert_near, random
from tests.kernels.test_kernels import DEVICE, needs_kernels
from yafsdp_like.kernels.paged_attention import KVPages
from yafsdp_like.kernels.rotary import HeadNorms, rotate_and_store, rotate_and_store_reference
from yafsdp_like.models.rope import Rope, apply_rope

STORES = [  # dtype, page dtype, normed
    (F32, F32, False),
    (F32, F8, False),
    (BF16, BF16, True),
    (F16, F8, True),
]


@dataclass(frozen=True)
class NewTokens:
    """Heads that are parts of one row, as a fused product leaves them."""

    row: Tensor  # (T, N + 2 K, H)
    tables: tuple[Tensor, Tensor]
    pages: KVPages
    slot_mapping: Tensor
    norms: HeadNorms | None

    def store(self, reference: bool) -> tuple[Tensor, Tensor]:
        """The row, and all of the pages' memory, after a run with copies of both."""
        row, region = self.row.clone(), torch.stack((self.pages.keys, self.pages.values), 1)
        pages = KVPages(region[:, 0], region[:, 1], self.pages.key_scale, self.pages.value_scale)
        num_kv_heads = pages.num_kv_heads
        q, k, v = row.split([row.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        run = rotate_and_store_reference if reference else rotate_and_store
        run(q, k, v, self.tables, pages, self.slot_mapping, self.norms)
        return row, region


def new_tokens(dtype: torch.dtype, page_dtype: torch.dtype, normed: bool, head_dim: int = 48) -> NewTokens:
    slot_mapping = torch.tensor([5, -1, 17, 0, 18], device=DEVICE)
    row = random(5, 6 + 2 * 2, head_dim, dtype=dtype)
    row[0, 6, 3] = row[2, 9, 5] = 5000.0  # more than float8 can hold
    pages = KVPages(*torch.full((2, 3, 8, 2, head_dim), 7.0, device=DEVICE).to(page_dtype), 0.5, 2.0)
    tables = Rope(head_dim, 10_000.0).tables(torch.tensor([3, 1000, 0, 77, 5], device=DEVICE), dtype)
    weights = (1 + random(head_dim, seed=seed, dtype=dtype) / 4 for seed in (1, 2))
    return NewTokens(row, tables, pages, slot_mapping, HeadNorms(*weights, 1e-6) if normed else None)


@pytest.mark.parametrize("normed", [False, True])
def test_the_reference_turns_heads_as_the_model_does(normed: bool) -> None:
    tokens = new_tokens(F32, F32, normed)
    row, region = tokens.store(reference=True)
    heads = tokens.row.transpose(0, 1)  # (heads, T, H)
    q, k, v = heads[:6], heads[6:8], heads[8:]
    if tokens.norms is not None:
        q = F.rms_norm(q, (48,), tokens.norms.q_weight, 1e-6)
        k = F.rms_norm(k, (48,), tokens.norms.k_weight, 1e-6)
    assert_near(row[:, :6], apply_rope(q, *tokens.tables).transpose(0, 1), TOLERANCES)
    k = apply_rope(k, *tokens.tables) / 0.5
    for token, page, offset in ((0, 0, 5), (2, 2, 1), (3, 0, 0), (4, 2, 2)):
        assert_near(region[page, 0, offset], k[:, token], TOLERANCES)
        assert_near(region[page, 1, offset], v[:, token] / 2.0, TOLERANCES)


@needs_kernels
@pytest.mark.parametrize(("dtype", "page_dtype", "normed"), STORES)
def test_heads_are_turned_and_stored_as_by_the_reference(
    dtype: torch.dtype, page_dtype: torch.dtype, normed: bool
) -> None:
    tokens = new_tokens(dtype, page_dtype, normed)
    (row, region), (expected_row, expected_region) = tokens.store(reference=False), tokens.store(reference=True)
    assert_near(row, expected_row, ROUNDED_ONCE)
    assert torch.equal(row[:, 6:], tokens.row[:, 6:])  # keys and values keep theirs
    if page_dtype == F8:  # a bit of 3 after the first, where float32 differs in its last bit
        torch.testing.assert_close(region.float(), expected_region.float(), rtol=2**-3, atol=2**-9)
        assert (region.float() != expected_region.float()).float().mean() < 0.01
    else:
        assert_near(region, expected_region, ROUNDED_ONCE)


@needs_kernels
def test_float8_pages_hold_values_to_nearest_even_and_clamped() -> None:
    """In every bit: values are stored as they come, halfway cases and those below the normal range included."""
    exact = torch.arange(127, dtype=torch.uint8).view(F8).float()
    middles = (exact[1:] + exact[:-1]) / 2
    values = torch.cat((exact, middles, -middles, torch.tensor([1e-9, -600.0, 470.0, 464.0])))
    head_dim = len(values) + len(values) % 2
    row = torch.zeros(1, 3, head_dim, device=DEVICE)
    row[0, 2, : len(values)] = values.to(DEVICE)
    pages = KVPages(*torch.zeros(2, 1, 1, 1, head_dim, device=DEVICE).to(F8))
    tables = torch.ones(1, head_dim, device=DEVICE), torch.zeros(1, head_dim, device=DEVICE)
    rotate_and_store(row[:, :1], row[:, 1:2], row[:, 2:], tables, pages, torch.zeros(1).int().to(DEVICE))
    expected = values.clamp(-448, 448).to(F8).float()
    assert torch.equal(pages.values.float().flatten()[: len(values)].cpu(), expected)


def test_heads_that_do_not_fit_their_pages_are_refused() -> None:
    tokens = new_tokens(F32, F32, False)
    q, k, v = tokens.row.split([6, 2, 2], dim=1)
    with pytest.raises(ValueError, match=r"k: expected shape \(5, 2, 48\)"):
        rotate_and_store(q, v[:, :1], v, tokens.tables, tokens.pages, tokens.slot_mapping)
    with pytest.raises(ValueError, match=r"q: expected shape \(5, 4, 48\)"):
        rotate_and_store(q[:, :5], k, v, tokens.tables, tokens.pages, tokens.slot_mapping)
    with pytest.raises(ValueError, match=r"slot_mapping: expected shape \(5,\)"):
        rotate_and_store(q, k, v, tokens.tables, tokens.pages, tokens.slot_mapping[:4])
