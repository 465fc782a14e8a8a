"""Eager: the user's own task functions, run as they are in one process, drawing what every plan draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from spindle.capture.blocks import INSIDE_BLOCK, Block, Forward, Scopes, replaced
from spindle.capture.codes import Captured
from spindle.record.caches import caches_off, caching_configs
from spindle.record.draws import Sites, Stream, drawing_from
from spindle.record.randomness import Drawing
from spindle.workload import Workload


@contextmanager
def drawing_as_planned(workload: Workload, captured: Captured, stream: Stream) -> Iterator[None]:
    """While open, one call of the function of task `stream.task` draws as planned runs at `stream` do."""
    sites = captured.draws[stream.task]
    paths = dict.fromkeys(scope.partition("@")[0] for scope in sites if scope)
    configs = caching_configs(nn.ModuleList(component.module for component in workload.components.values()))
    with (
        caches_off(configs),
        replaced([Block(path, _module_at(workload, path)) for path in paths], _in_its_scope(sites)),
        drawing_from(stream),
        Drawing("", sites.get("", ())),
    ):
        yield


def _module_at(workload: Workload, path: str) -> nn.Module:
    component, _, inner = path.partition(".")
    return workload.components[component].module.get_submodule(inner)


def _in_its_scope(sites: Sites) -> Callable[[Block, Forward], Forward]:
    scopes = Scopes()

    def make(block: Block, own: Forward) -> Forward:
        def drawn(*args: Any, **kwargs: Any) -> Any:
            if INSIDE_BLOCK.get():
                return own(*args, **kwargs)
            scope = scopes.next(block.path)
            token = INSIDE_BLOCK.set(True)
            try:
                with Drawing(scope, sites.get(scope, ())):
                    return own(*args, **kwargs)
            finally:
                INSIDE_BLOCK.reset(token)

        return drawn

    return make
