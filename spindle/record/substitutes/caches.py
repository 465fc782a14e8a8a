"""Caches: keys and values that decoders keep for generation; off while they train."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def caching_configs(module: nn.Module) -> list[Any]:
    """Configs in a model that ask its layers to hand on a cache: objects, where training wants tensors."""
    configs = {id(config): config for part in module.modules() if (config := getattr(part, "config", None))}
    return [config for config in configs.values() if getattr(config, "use_cache", False) is True]


@contextlib.contextmanager
def caches_off(configs: list[Any]) -> Iterator[None]:
    """While open, `configs` of `caching_configs` ask for no cache."""
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True
