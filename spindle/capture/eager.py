"""Eager: the user's own task functions, run as they are in one process, drawing what every plan draws."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from spindle.capture.codes import Captured
from spindle.record.calls import Around, call_name, forwards_replaced
from spindle.record.substitutes.caches import caches_off, caching_configs
from spindle.record.substitutes.checkpoints import Planned, going
from spindle.record.substitutes.draws import Sites, Stream, drawing_from
from spindle.record.substitutes.patches import plain_modules
from spindle.record.substitutes.randomness import Drawing
from spindle.workload import Workload


@contextmanager
def drawing_as_planned(workload: Workload, captured: Captured, stream: Stream) -> Iterator[None]:
    """While open, one call of the function of task `stream.task` draws as planned runs at `stream` do."""
    sites = captured.draws[stream.task]
    configs = caching_configs(nn.ModuleList(component.module for component in workload.components.values()))
    scopes = _Scopes(sites)
    with ExitStack() as stack:
        stack.enter_context(caches_off(configs))
        paths = dict.fromkeys(scope.partition("@")[0] for scope in sites if scope)
        stack.enter_context(forwards_replaced((_module_at(workload, path), scopes.of(path)) for path in paths))
        stack.enter_context(drawing_from(stream))
        stack.enter_context(plain_modules())
        stack.enter_context(going(Planned()))
        stack.enter_context(Drawing("", sites.get("", ())))
        yield


def _module_at(workload: Workload, path: str) -> nn.Module:
    component, _, inner = path.partition(".")
    return workload.components[component].module.get_submodule(inner)


class _Scopes:
    """Names calls of blocks in the order in which a task makes them, as a recording does: `path`, then `path@1`."""

    def __init__(self, sites: Sites) -> None:
        self.sites, self.calls, self.inside = sites, Counter[Any](), False

    def of(self, path: str) -> Around:
        """Run a block in the next scope of its path; a block inside of a block belongs to that one's scope."""

        def around(own: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                if self.inside:
                    return own(*args, **kwargs)
                scope = call_name(path, path, self.calls)
                self.inside = True
                try:
                    with Drawing(scope, self.sites.get(scope, ())):
                        return own(*args, **kwargs)
                finally:
                    self.inside = False

            return called

        return around
