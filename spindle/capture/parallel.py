"""Tensor parallelism: a component's plan in; which parameters of its blocks are cut, and how, out.

A plan maps dotted paths of Linear layers, `*` standing for one name, to a style: `colwise` cuts what comes out,
`rowwise` what goes in; between the two each device works on its part of the features. `replicated_with_grad_allreduce`
marks a module, such as a norm of the heads, that sees only part of them, so that its gradients are shares. These are
the styles of `torch.distributed.tensor.parallel` under the names that transformers gives them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from spindle.capture.blocks import find_blocks
from spindle.errors import WorkloadError
from spindle.workload import Component, Workload

PARTIAL = "replicated_with_grad_allreduce"


@dataclass(frozen=True, slots=True)
class Cut:
    """How a parameter is held: in `pieces` along `dim`, or whole; `partial`: its gradients are shares."""

    pieces: int = 1
    dim: int = 0
    partial: bool = False


def cuts(workload: Workload) -> dict[str, Cut]:
    """Parameters, by the workload's names, that tensor parallelism treats otherwise than as copies.

    Raises WorkloadError where a component has no plan, or one that does not fit it.
    """
    names = {id(parameter): name for name, parameter in workload.named_parameters()}
    return {
        names[id(parameter)]: cut
        for component in workload.components.values()
        if component.tensor_parallel > 1
        for parameter, cut in _cuts(component)
    }


def _cuts(component: Component) -> Iterator[tuple[Tensor, Cut]]:
    what = f"component {component.name!r}: tensor_parallel={component.tensor_parallel}"
    plan = component.tensor_plan if component.tensor_plan is not None else getattr(component.module, "_tp_plan", None)
    if not plan:
        raise WorkloadError(
            f"{what}, but the model has no plan for it; give tensor_plan={{'layers.*.q_proj': 'colwise', ...}}"
        )
    found = False
    for block in find_blocks(component.name, component.module, component.layers):
        _check_block(what, block.module)
        for inner, module in block.module.named_modules():
            path = f"{block.path}.{inner}" if inner else block.path
            style = next((style for pattern, style in plan.items() if _matches(pattern, path)), None)
            if style is not None:
                found = True
                yield from _parameters(f"{what}: {path!r}", style, module, component.tensor_parallel)
    if not found:
        raise WorkloadError(f"{what}, but its plan names nothing inside its blocks; the patterns are {', '.join(plan)}")


def _parameters(what: str, style: str, module: nn.Module, pieces: int) -> Iterator[tuple[Tensor, Cut]]:
    if style == PARTIAL:
        yield from ((parameter, Cut(partial=True)) for parameter in module.parameters())
        return
    if style not in ("colwise", "rowwise"):
        raise WorkloadError(f"{what} is {style!r} in its plan; the styles are colwise, rowwise, {PARTIAL}")
    if type(module) is not nn.Linear:
        raise WorkloadError(f"{what} is a {type(module).__name__}; only torch.nn.Linear can be cut")
    size, name = (module.out_features, "outputs") if style == "colwise" else (module.in_features, "inputs")
    if size % pieces:
        raise WorkloadError(f"{what} has {size} {name}; tensor_parallel must divide them")
    yield module.weight, Cut(pieces, 0 if style == "colwise" else 1)
    if style == "colwise" and module.bias is not None:
        yield module.bias, Cut(pieces, 0)


def _check_block(what: str, block: nn.Module) -> None:
    """Parts of the heads cannot draw what the whole would."""
    for module in block.modules():
        rates = (getattr(module, name, 0.0) for name in ("p", "attention_dropout", "dropout"))
        if module.training and any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise WorkloadError(
                f"{what}, but its blocks drop out ({type(module).__name__}), which would differ from one process; "
                "set dropout to 0 or leave tensor parallelism out"
            )


def _matches(pattern: str, path: str) -> bool:
    names, wanted = path.split("."), pattern.split(".")
    return len(names) == len(wanted) and all(w in ("*", name) for w, name in zip(wanted, names, strict=True))
