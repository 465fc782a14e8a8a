"""After a step: what a user's functions do with parameters that the optimizer has stepped.

Each function gets one parameter as a whole, and changes it. So every device that holds the parameter can do so by
itself, and no device needs another's. Where devices hold parts of a parameter, a function may run on these if it treats
each number by itself, which is tried on small tensors; another one is refused.
"""

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spindle.errors import WorkloadError
from spindle.inputs.same import same_numbers

Function = Callable[[Tensor], Any]

_SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e6)  # so that what happens beyond a bound is tried too
_WIDTH = 6  # of each dimension that is tried, at most


@dataclass(frozen=True, slots=True)
class AfterStep:
    """A function and the names of the parameters it is for, as patterns of `fnmatch`."""

    patterns: tuple[str, ...]
    function: Function

    @property
    def where(self) -> str:
        """How messages call it."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"after_step({', '.join(map(repr, self.patterns))}), {name}"

    def names(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """The trained parameters it is for. Raises WorkloadError where a pattern stands for none."""
        for pattern in self.patterns:
            found = fnmatch.filter(parameters, pattern)
            if not found:
                close = difflib.get_close_matches(pattern, parameters, 1, 0.0)
                raise WorkloadError(
                    f"{self.where}: no parameter is called {pattern!r}; names are component.path, such as "
                    f"{close[0] if close else 'lm.head.weight'!r}, and '*' stands for any part"
                )
            if not any(parameters[name].requires_grad for name in found):
                raise WorkloadError(
                    f"{self.where}: {found[0]!r} is frozen, so that no step changes it; change it before you train"
                )
        return [
            name
            for name, parameter in parameters.items()
            if parameter.requires_grad and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)
        ]

    @torch.no_grad()
    def apply(self, parameter: Tensor) -> None:
        """Change a parameter, in place or by what the function returns."""
        own = parameter.detach()
        try:
            found = self.function(own)
        except Exception as error:
            raise WorkloadError(f"{self.where} raised {type(error).__name__}: {error}; correct it") from error
        if found is None or found is own:
            return
        if not isinstance(found, Tensor) or found.shape != own.shape:
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise WorkloadError(
                f"{self.where} returned {what} for a parameter of shape {tuple(own.shape)}; change the parameter in "
                "place, or return what it is to be"
            )
        own.copy_(found)

    def check(self, modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> None:
        """Raise WorkloadError where it uses modules of the workload instead of what it is given, draws random numbers,
        or gives something else in a second call.
        """
        parts = (part for module in modules for part in module.modules())
        known = {id(held) for part in parts for held in (part, *part._parameters.values(), *part._buffers.values())}
        if name := _seen_in(self.function, known - {id(None)}):
            raise WorkloadError(
                f"{self.where} uses {name!r} of the model, of which each device has a copy of its own; compute with "
                "the parameter that it is given alone"
            )
        for tried in self._trials(parameters):
            before = torch.get_rng_state()
            once, again = tried.clone(), tried.clone()
            self.apply(once)
            if not torch.equal(before, torch.get_rng_state()):
                torch.set_rng_state(before)
                raise WorkloadError(
                    f"{self.where} draws random numbers, and each device would draw others; use a function of the "
                    "parameter alone"
                )
            self.apply(again)
            if not same_numbers(once, again):
                raise WorkloadError(
                    f"{self.where} gives something else in a second call with the same parameter, so that devices "
                    "that hold it would differ, and a resume; keep no count or state in it"
                )

    def _trials(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Small tensors; where it takes none, some like the parameters: it may hold the rows to put back, say."""
        kinds = dict.fromkeys((tuple(parameter.shape), parameter.dtype) for parameter in parameters)
        try:
            for tried in _tried(shape for shape, _ in kinds):
                self.apply(tried.clone())
        except WorkloadError:
            yield from (torch.randn(shape, dtype=dtype) for shape, dtype in kinds)
        else:
            yield from _tried(shape for shape, _ in kinds)

    def is_elementwise(self, shapes: Iterable[tuple[int, ...]]) -> bool:
        """Whether it treats each number by itself, as far as trials tell."""
        try:
            for tried in _tried(shapes):
                whole, row = tried.clone(), tried.reshape(-1)
                self.apply(whole)
                for cut in (1, row.numel() // 2):
                    parts = [row[:cut].clone(), row[cut:].clone()]
                    for part in parts:
                        if part.numel():
                            self.apply(part)
                    if not same_numbers(torch.cat(parts), whole.reshape(-1)):
                        return False
        except Exception:  # it takes tensors of its shape alone
            return False
        return True


def _tried(shapes: Iterable[tuple[int, ...]]) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(0)
    for shape in dict.fromkeys(tuple(min(_WIDTH, size) for size in shape) for shape in shapes):
        for scale in _SCALES:
            yield torch.randn(shape, generator=draw, dtype=torch.float64) * scale


def _seen_in(function: Function, known: set[int]) -> str:
    """The name under which a function sees a module, a parameter or a buffer of these; "" where it sees none."""
    inner = inspect.unwrap(function)
    if not inspect.isfunction(inner):
        return ""
    seen = inspect.getclosurevars(inner)
    return next((n for n, value in {**seen.globals, **seen.nonlocals}.items() if id(value) in known), "")
