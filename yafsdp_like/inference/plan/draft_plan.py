"""A model and the smaller one that drafts tokens for it, planned together on one arena. Integers only.

The draft model's weights all stay on the device, and it has pages of its own, for as many tokens of context as the
model's: what a token takes divides the bytes. So neither takes the other's pages, and each engine keeps its own books.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from yafsdp_like.inference.plan.serving_plan import ServingPlan, Site, plan_serving

if TYPE_CHECKING:
    from yafsdp_like.inference.options import AnyMode, EngineOptions
    from yafsdp_like.models.decoder import DecoderConfig


def plan_with_draft(
    config: DecoderConfig,
    options: EngineOptions,
    site: Site | None = None,
    mode: AnyMode = "auto",
    draft: DecoderConfig | None = None,
) -> ServingPlan:
    """Plan to serve ``config`` as ``plan_serving`` does, and beside it the model that drafts, if there is one.

    Raises what ``plan_serving`` does, and ValueError for a draft model that is missing, whose vocabulary is another, or
    which several ranks would have to share.
    """
    site = site or Site()
    speculation = options.speculation
    if speculation is None or speculation.draft is None:
        return plan_serving(config, options, site, mode)
    if draft is None:
        raise ValueError(f"speculate={options.speculate!r} needs the draft model's configuration, found none")
    _check(config, draft, site)
    alone = plan_serving(config, options, site, mode)
    rough = _plan_draft(draft, options, site, alone.grid.region_nbytes)
    own, drafts, pages_nbytes = _token_nbytes(alone), _token_nbytes(rough), alone.grid.region_nbytes
    if options.kv_nbytes is not None:
        pages_nbytes = pages_nbytes * drafts // own
    else:
        fixed_nbytes = _device_nbytes(rough) - rough.grid.region_nbytes
        pages_nbytes = (pages_nbytes - fixed_nbytes) * drafts // (own + drafts)
    limit = options.memory_limit_nbytes
    try:
        planned = _plan_draft(draft, options, site, max(pages_nbytes, 1))
        within = options if limit is None else replace(options, memory_limit_nbytes=limit - _device_nbytes(planned))
        plan = plan_serving(config, within, site, mode)
    except ValueError as error:
        raise ValueError(
            "the model fits, but not its draft model beside it: take a smaller one, or speculate=prompt-lookup, which "
            f"needs none ({error})"
        ) from error
    reason = (
        f"  a draft model of {planned.placement.nbytes:,} bytes of weights, and {planned.grid.region_nbytes:,} for its "
        f"keys and values: {planned.num_context_tokens:,} tokens"
    )
    return replace(plan, options=options, draft=planned, reasons=(*plan.reasons, reason))


def _check(config: DecoderConfig, draft: DecoderConfig, site: Site) -> None:
    if site.num_ranks > 1:
        raise ValueError(
            f"a draft model serves a single rank, found {site.num_ranks}; speculate=prompt-lookup serves any number"
        )
    if draft.vocab_size != config.vocab_size:
        raise ValueError(
            f"the draft model must have the tokens of the model, {config.vocab_size} of them, found {draft.vocab_size}"
        )


def _plan_draft(draft: DecoderConfig, options: EngineOptions, site: Site, kv_nbytes: int) -> ServingPlan:
    """Plan the draft model alone, with so many bytes for pages."""
    asked = options.max_seq_len
    own = replace(
        options,
        memory_limit_nbytes=None,
        kv_nbytes=kv_nbytes,
        host_kv_nbytes=0,
        max_seq_len=None if asked is None or asked > draft.max_seq_len else asked,
        speculate=None,
        tpot_ms=None,
        tenants=(),
        adapter_slots=None,
        adapter_rank=None,
        host_adapters=None,
    )
    return plan_serving(replace(draft, vision=None), own, site, "resident")  # which is shown no image


def _token_nbytes(plan: ServingPlan) -> int:
    """Return the bytes that a token takes in pages of all groups of layers."""
    return sum(shape.nbytes for shape in plan.capacity.shapes) // plan.options.page_size


def _device_nbytes(plan: ServingPlan) -> int:
    """Return all that a plan takes of the device."""
    return plan.memory.nbytes + plan.recordings_nbytes
