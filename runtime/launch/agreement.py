"""Agreement: ranks that each made a rank spec of their own, as under torchrun, find out whether all made the same.

Nobody sends rank specs around there, so a rank with another plan, other code or another seed would hang the others in
the first collective that it does not come to, or train something else beside them.
"""

import functools
import hashlib
import inspect
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from spindle.capture.signature import module_signature
from spindle.errors import RunError
from spindle.runtime.programs.program import Program
from spindle.runtime.programs.text import dumps
from spindle.runtime.rank_spec import RankSpec

SAMPLED = 16  # numbers of each weight that are compared: a model's weights take seconds to read through

_REMEDY = {
    "versions of Python or torch": "install the same ones",
    "plan": "give all the same file as --plan",
    "program": "give all the same tasks, batch sizes and settings",
    "code": "run the same files",
    "weights": "seed the model alike on all ranks, or load the same weights",
    "seed": "give all the same seed=",
}


def agreement(program: Program, specs: Sequence[RankSpec]) -> dict[str, str]:
    """Digests of what all ranks must have alike, by what they are of. `specs`: those of all ranks, as made here of the
    whole program.
    """
    slices = [(run.metaop, run.operators, run.ranks, run.tensor_parallel, run.recompute) for run in program.slices]
    parts: dict[str, Iterable[str]] = {
        "versions of Python or torch": (platform.python_version(), torch.__version__),
        "plan": (str(program.num_ranks), *map(str, slices)),
        "program": (dumps(program), str(specs[0].rounds), specs[0].precision, str(specs[0].settings)),
        "code": _code_texts(specs),
        "weights": _weight_texts(specs),
        "seed": (str(specs[0].seed),),
    }
    return {what: hashlib.sha256("\n".join(texts).encode()).hexdigest() for what, texts in parts.items()}


def refuse_differences(found: Sequence[Mapping[str, str]]) -> None:
    """Raises RunError, the same on every rank, that names the ranks whose digests are not those of most of them."""
    rows = [tuple(digests.items()) for digests in found]
    most = Counter(rows).most_common(1)[0][0]
    others = [rank for rank, digests in enumerate(rows) if digests != most]
    if others:
        expected = dict(most)
        kinds = [what for what in _REMEDY if any(found[rank][what] != expected[what] for rank in others)]
        remedies = "; ".join(f"{what} ({_REMEDY[what]})" for what in kinds)
        raise RunError(
            f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} came with another {remedies} than rank "
            f"{rows.index(most)}, so that the run was not started"
        )


def _code_texts(specs: Sequence[RankSpec]) -> Iterator[str]:
    codes = {name: code for spec in specs for name, code in spec.codes.items()}
    classes: dict[type, None] = {}
    for name, code in sorted(codes.items()):  # plans order operators otherwise
        yield f"{name} {module_signature(code.module)} {code.compilation}"
        classes.update(dict.fromkeys(type(child) for child in code.module.modules()))
    for task, recorded in sorted(specs[0].recipe.codes.items()):
        glue = sorted((site, frontier, component, name) for (site, frontier, component), name in recorded.glue.items())
        yield f"{task} {glue} {sorted(recorded.blocks.items())} {sorted(recorded.sites.items())}"
    yield from (_text(function) for _, function in sorted(specs[0].recipe.functions.items()))
    if specs[0].evaluation is not None:
        evaluation = specs[0].evaluation
        yield from (_text(inspect.unwrap(function)) for _, function in sorted(evaluation.recipe.functions.items()))
        for task, measures in sorted(evaluation.scoring.measures.items()):
            yield f"{task} {_text(measures.metrics)} {_text(measures.over_all)}"
    for cls in classes:
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
            if not base.__module__.startswith("torch."):
                yield from (f"{base.__qualname__}.{n} {_text(f)}" for n, f in vars(base).items())
    yield from (_text(maker) for maker in (specs[0].optimizer, specs[0].scheduler, specs[0].metric))


def _text(value: Any) -> str:
    """Code and plain values as text that is equal in every process; other objects count by their class."""
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {[_text(constant) for constant in value.co_consts]}"
    if isinstance(value, FunctionType):
        names = value.__code__.co_freevars
        held = inspect.getclosurevars(value).nonlocals if names else {}
        inner = [
            _text(getattr(held.get(name), "__code__", held.get(name))) for name in names
        ]  # closures may be circles
        return f"{_text(value.__code__)} {_text(value.__defaults__)} {inner}"
    if isinstance(value, functools.partial):
        return f"{_text(value.func)} {_text(value.args)} {_text(value.keywords)}"
    if isinstance(value, Mapping):
        return str([(str(key), _text(held)) for key, held in value.items()])
    if isinstance(value, list | tuple):
        return str([_text(held) for held in value])
    if isinstance(value, bool | int | float | str | bytes | None):
        return repr(value)
    return f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"


def _weight_texts(specs: Sequence[RankSpec]) -> Iterator[str]:
    seen: set[str] = set()
    sources = {name: source for spec in specs for name, source in spec.weights.items()}
    codes = {name: code for spec in specs for name, code in spec.codes.items()}
    for _, code in sorted(codes.items()):
        for names, get in ((code.parameters, code.module.get_parameter), (code.buffers, code.module.get_buffer)):
            for inner, name in names:
                if name not in seen:
                    seen.add(name)
                    yield f"{name} {sources[name].identity if name in sources else _sampled(get(inner))}"


def _sampled(value: Tensor) -> str:
    flat = value.detach().flatten()
    some = flat[:: max(1, flat.numel() // SAMPLED)].cpu().contiguous()
    return f"{tuple(value.shape)} {value.dtype} {some.view(torch.uint8).numpy().tobytes().hex()}"
