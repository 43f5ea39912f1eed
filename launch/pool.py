"""From the options of a pool to models that can be asked over HTTP; what cannot be opened or loaded is left out.

Owns the order of things: configurations are read, everything is planned and printed, allocated, and then loaded. With
torchrun all ranks do so, and leave out the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from launch.console import LoadingBars
from launch.inference import join_device, load_codec, load_images
from launch.options import ADMIN_KEY_VARIABLE, KEY_VARIABLE, PoolModelOptions, ServePoolOptions
from yafsdp_like.comm.consistency import all_gather_object
from yafsdp_like.hardware import Hardware
from yafsdp_like.inference.engine.adapters import with_adapters
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.protocol import RequestParser, ServerOptions
from yafsdp_like.inference.pool.driver import PoolDriver
from yafsdp_like.inference.pool.memory import maps_slabs
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.directory import sampling_defaults
from yafsdp_like.inference.text.image_reader import ImageReader
from yafsdp_like.inference.weights.adapter_files import Adapter, open_adapter
from yafsdp_like.inference.weights.loading import Model, open_model, world_transport
from yafsdp_like.kernels.sampling_params import SamplingParams

TTFT_MS, TPOT_MS = 10_000.0, 100.0  # targets of models that have none, beside some that have


@dataclass(frozen=True)
class LoadedPool:
    """Models that are ready to be asked, and those that are not, with why."""

    pool: ModelPool  # this rank's
    driver: PoolDriver | None  # None on ranks that follow the first one
    catalog: Catalog
    device: torch.device


@dataclass(frozen=True)
class _Opened:
    model: Model
    codec: Codec
    sampling: SamplingParams
    adapters: dict[str, Adapter]
    images: ImageReader | None


def load_pool(options: ServePoolOptions) -> LoadedPool:
    """Load all models of a pool that can be; prints the plan before anything is allocated, and who failed.

    Ranks that torchrun has started call this together; their models are tensor parallel, and the first rank then has
    them all loaded, so that others must follow it. Raises ValueError for what cannot be: a model that does not fit, or
    cannot be cut among the ranks, or none that can be opened.
    """
    device = join_device(options.device)
    transport = world_transport(device)
    opened, errors = _open_all(options)
    if not opened:
        raise ValueError(f"no model of the pool can be opened: {'; '.join(errors.values())}")
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    plan = plan_pool(
        {
            name: PooledModel(
                each.model.config,
                _dtype(options.models[name], default),
                with_adapters(options.models[name].engine, each.adapters),
            )
            for name, each in opened.items()
        },
        options.pool,
        Hardware.of(device),
        _num_ranks(),
        maps_memory=maps_slabs(transport),
    )
    _say(plan)
    entries = {name: options.models[name] for name in opened}
    pool = ModelPool(plan, {name: each.model for name, each in opened.items()}, device, targets_of(entries), transport)
    ttls = {name: entry.ttl_s for name, entry in entries.items() if entry.ttl_s}
    host_ttls = {name: entry.host_ttl_s for name, entry in entries.items() if entry.host_ttl_s}
    parsers = [_parser(name, each, options, pool.engine(name)) for name, each in opened.items()]
    catalog = Catalog(parsers, errors, is_pool=True)
    _load_adapters(pool, opened, catalog)
    driver = PoolDriver(pool, ttls, host_ttls) if _is_first() else None
    if driver is not None:
        for error in _load_all(driver).values():
            _say(f"warning: {error}")
    _say(f"requests call the models {', '.join(map(repr, catalog.parsers))}")
    return LoadedPool(pool, driver, catalog, device)


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _say(what: object) -> None:
    if _is_first():
        print(what, flush=True)


def _of_all_ranks(errors: dict[str, str]) -> dict[str, str]:
    """Return what has failed on any rank, and why; one may have read what another cannot."""
    found = all_gather_object(errors) if _num_ranks() > 1 else [errors]
    return {name: words for each in reversed(found) for name, words in each.items()}


def targets_of(entries: Mapping[str, PoolModelOptions]) -> dict[str, Targets] | None:
    """Return the targets of all models; None if none has any."""
    if all(entry.ttft_ms is None and entry.tpot_ms is None for entry in entries.values()):
        return None
    return {
        name: Targets((entry.ttft_ms or TTFT_MS) / 1e3, (entry.tpot_ms or TPOT_MS) / 1e3)
        for name, entry in entries.items()
    }


def _load_all(driver: PoolDriver) -> dict[str, str]:
    with LoadingBars() as bars:
        return driver.load_all(lambda name, figures: bars.show(name, figures.loaded_nbytes, figures.weights_nbytes))


def _open_all(options: ServePoolOptions) -> tuple[dict[str, _Opened], dict[str, str]]:
    """Read configurations and tokenizers, and return why some models have none that can be read."""
    opened: dict[str, _Opened] = {}
    errors: dict[str, str] = {}
    for name, entry in options.models.items():
        try:
            model = open_model(entry.path)
            defaults = sampling_defaults(model.directory if entry.generation_config == "model" else None)
            codec = load_codec(model, entry.tokenizer)
            images = load_images(model, options.http, _say, is_shared=_num_ranks() > 1)
            opened[name] = _Opened(model, codec, defaults, {}, images)
        except (ValueError, OSError) as error:
            errors[name] = f"model {name!r} could not be opened: {error}"
    errors = _of_all_ranks(errors)
    for words in errors.values():
        _say(f"warning: {words}")
    return {
        name: replace(each, adapters=_open_adapters(each.model, options.models[name]))
        for name, each in opened.items()
        if name not in errors
    }, errors


def _open_adapters(model: Model, entry: PoolModelOptions) -> dict[str, Adapter]:
    """Read what adapters say of themselves; those that are not served are left out."""
    opened: dict[str, Adapter] = {}
    errors: dict[str, str] = {}
    for name, directory in entry.adapters.items():
        try:
            opened[name] = open_adapter(directory, model.config)
        except (ValueError, OSError) as error:
            errors[name] = f"adapter {name!r} could not be opened: {error}"
    errors = _of_all_ranks(errors)
    for words in errors.values():
        _say(f"warning: {words}")
    return {name: adapter for name, adapter in opened.items() if name not in errors}


def _load_adapters(pool: ModelPool, opened: Mapping[str, _Opened], catalog: Catalog) -> None:
    """Load all adapters; those that cannot be are left out."""
    for model, each in opened.items():
        for name, adapter in each.adapters.items():
            errors: dict[str, str] = {}
            try:
                catalog.claim(name)
                pool.engine(model).adapters.load(name, adapter)
            except (ValueError, OSError) as error:
                errors[name] = str(error)
            failed = _of_all_ranks(errors)
            if not failed:
                catalog.add_adapter(name, model)
                continue
            if not errors:
                pool.engine(model).adapters.unload(name)
            catalog.give_up(name)
            _say(f"warning: adapter {name!r} could not be loaded: {failed[name]}")


def _dtype(entry: PoolModelOptions, default: torch.dtype) -> torch.dtype:
    return default if entry.dtype is None else {"float32": torch.float32, "bfloat16": torch.bfloat16}[entry.dtype]


def _parser(name: str, opened: _Opened, options: ServePoolOptions, engine: Engine) -> RequestParser:
    told = ServerOptions(
        api_key=options.http.api_key or os.environ.get(KEY_VARIABLE),
        admin_key=options.admin_key or os.environ.get(ADMIN_KEY_VARIABLE) or None,
        timeout_s=options.http.timeout_s or None,
        max_choices=options.http.max_choices,
        max_body_nbytes=options.http.max_body_nbytes,
        max_images=options.http.max_images,
        max_image_nbytes=options.http.max_image_nbytes,
        max_image_pixels=options.http.max_image_pixels,
        image_hosts=options.http.image_hosts,
        takes_images=opened.images is not None,
        has_grammars=engine.tp_group is None,
        strict=options.http.strict,
        priorities=options.http.priorities,
        model_name=name,
        vocab_size=opened.model.config.vocab_size,
        max_seq_len=engine.max_seq_len,
        sampling=opened.sampling,
    )
    return RequestParser(opened.codec, told, opened.images)
