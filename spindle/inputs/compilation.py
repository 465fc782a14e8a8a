"""Compilation: what `component(compile=...)` says in; how `torch.compile` is called for its layers out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spindle.errors import WorkloadError

OPTIONS = ("mode", "dynamic", "backend", "options", "fullgraph")
"""Keywords of `torch.compile` that a component may give."""
GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes that replay CUDA graphs, whose results and parameters must stay at one place in memory."""

Compile = bool | Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """How the layers of a component are compiled; the arguments are those of `torch.compile`."""

    mode: str | None = None
    dynamic: bool | None = None
    backend: str | Callable[..., Any] = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict)
    fullgraph: bool = False

    @classmethod
    def of(cls, component: str, given: Compile) -> "Compilation | None":
        """What a component's `compile=` says; None for False. Raises WorkloadError for what no run can be made with."""
        where = f"component {component!r}: compile"
        if isinstance(given, bool):
            return cls() if given else None
        if not isinstance(given, Mapping):
            raise WorkloadError(f"{where} is {given!r}; give True, or a dict with some of {', '.join(OPTIONS)}")
        unknown = [name for name in given if name not in OPTIONS]
        if unknown:
            raise WorkloadError(
                f"{where} has {unknown[0]!r}; its keys are those of torch.compile: {', '.join(OPTIONS)}"
            )
        found = cls(**{name: value for name, value in given.items() if value is not None})
        found._check(where)
        return found

    def _check(self, where: str) -> None:
        for name, kinds in (("dynamic", (bool, type(None))), ("fullgraph", (bool,)), ("options", (Mapping,))):
            if not isinstance(getattr(self, name), kinds):
                raise WorkloadError(f"{where}: {name} is {getattr(self, name)!r}; give what torch.compile takes there")
        if not isinstance(self.backend, str) and not callable(self.backend):
            raise WorkloadError(f"{where}: backend is {self.backend!r}; give the name of one, or a function")
        if self.mode is not None and self.options:
            raise WorkloadError(f"{where} has both mode and options; torch.compile takes one of the two")
        if self.mode in GRAPHS or self.options.get("triton.cudagraphs"):
            option = "options['triton.cudagraphs']" if self.options else f"mode {self.mode!r}"
            raise WorkloadError(
                f"{where}: {option} replays CUDA graphs, which overwrite what a layer gave for one micro-batch while "
                "another is computed; give mode 'max-autotune-no-cudagraphs', or leave it out"
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `torch.compile`."""
        return {
            "backend": self.backend,
            "dynamic": self.dynamic,
            "fullgraph": self.fullgraph,
            **({"mode": self.mode} if self.mode else {}),
            **({"options": dict(self.options)} if self.options else {}),
        }

    def __str__(self) -> str:
        """The same in every process, whatever the backend is."""
        backend = self.backend
        name = backend if isinstance(backend, str) else getattr(backend, "__qualname__", type(backend).__qualname__)
        return f"{name} {self.mode} {self.dynamic} {self.fullgraph} {sorted(self.options.items())}"
