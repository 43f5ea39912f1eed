"""From the options of a pool to models that can be asked over HTTP; what cannot be opened or loaded is left out.

Owns the order of things: configurations are read, everything is planned and printed, allocated, and then loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from launch.console import LoadingBars
from launch.inference import join_device, load_codec, load_images
from launch.options import ADMIN_KEY_VARIABLE, KEY_VARIABLE, PoolModelOptions, ServePoolOptions
from yafsdp_like.hardware import Hardware
from yafsdp_like.inference.engine.adapters import with_adapters
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.protocol import RequestParser, ServerOptions
from yafsdp_like.inference.pool.driver import PoolDriver
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.directory import sampling_defaults
from yafsdp_like.inference.text.image_reader import ImageReader
from yafsdp_like.inference.weights.adapter_files import Adapter, open_adapter
from yafsdp_like.inference.weights.loading import Model, open_model
from yafsdp_like.kernels.sampling_params import SamplingParams

TTFT_MS, TPOT_MS = 10_000.0, 100.0  # targets of models that have none, beside some that have


@dataclass(frozen=True)
class LoadedPool:
    """Models that are ready to be asked, and those that are not, with why."""

    driver: PoolDriver
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

    Raises ValueError for what cannot be: a model that does not fit, or none that can be opened.
    """
    device = join_device(options.device)
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
    )
    print(plan, flush=True)
    entries = {name: options.models[name] for name in opened}
    pool = ModelPool(plan, {name: each.model for name, each in opened.items()}, device, targets_of(entries))
    ttls = {name: entry.ttl_s for name, entry in entries.items() if entry.ttl_s}
    host_ttls = {name: entry.host_ttl_s for name, entry in entries.items() if entry.host_ttl_s}
    driver = PoolDriver(pool, ttls, host_ttls)
    for error in _load_all(driver).values():
        print(f"warning: {error}", flush=True)
    parsers = [_parser(name, each, options, pool.engine(name).max_seq_len) for name, each in opened.items()]
    catalog = Catalog(parsers, errors, is_pool=True)
    _load_adapters(pool, opened, catalog)
    print(f"requests call the models {', '.join(map(repr, catalog.parsers))}", flush=True)
    return LoadedPool(driver, catalog, device)


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
            images = load_images(model, options.http, lambda words: print(words, flush=True))
            opened[name] = _Opened(model, codec, defaults, _open_adapters(model, entry), images)
        except (ValueError, OSError) as error:
            errors[name] = f"model {name!r} could not be opened: {error}"
            print(f"warning: {errors[name]}", flush=True)
    return opened, errors


def _open_adapters(model: Model, entry: PoolModelOptions) -> dict[str, Adapter]:
    """Read what adapters say of themselves; those that are not served are left out."""
    opened = {}
    for name, directory in entry.adapters.items():
        try:
            opened[name] = open_adapter(directory, model.config)
        except (ValueError, OSError) as error:
            print(f"warning: adapter {name!r} could not be opened: {error}", flush=True)
    return opened


def _load_adapters(pool: ModelPool, opened: Mapping[str, _Opened], catalog: Catalog) -> None:
    """Load all adapters; those that cannot be are left out."""
    for model, each in opened.items():
        for name, adapter in each.adapters.items():
            try:
                catalog.claim(name)
                pool.engine(model).adapters.load(name, adapter)
                catalog.add_adapter(name, model)
            except (ValueError, OSError) as error:
                catalog.give_up(name)
                print(f"warning: adapter {name!r} could not be loaded: {error}", flush=True)


def _dtype(entry: PoolModelOptions, default: torch.dtype) -> torch.dtype:
    return default if entry.dtype is None else {"float32": torch.float32, "bfloat16": torch.bfloat16}[entry.dtype]


def _parser(name: str, opened: _Opened, options: ServePoolOptions, max_seq_len: int) -> RequestParser:
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
        strict=options.http.strict,
        priorities=options.http.priorities,
        model_name=name,
        vocab_size=opened.model.config.vocab_size,
        max_seq_len=max_seq_len,
        sampling=opened.sampling,
    )
    return RequestParser(opened.codec, told, opened.images)
