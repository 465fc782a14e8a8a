"""Tensor parallelism: a component's plan in; which parameters of its layers are cut, and how, out.

A plan maps dotted paths of layers, `*` standing for one name, to a style. These are the styles of
`torch.distributed.tensor.parallel` under the names that transformers gives them.

- In a block `colwise` cuts what comes out of a Linear layer, `rowwise` what goes in; between the two each device works
  on its part of the features. `replicated_with_grad_allreduce` marks a module, such as a norm of the heads, that sees
  only part of them, so that its gradients are shares.
- `colwise_gather_output` and `rowwise_split_input` give and take all features, and `embedding_rowwise` cuts the words
  of an embedding. Layers of these styles outside of blocks (embeddings, language heads) become operators of their own.
- Experts (`moe_tp_experts`) hold stacked parameters with a style each: `colwise` cuts the last dimension but one,
  `rowwise` the last, and `packed_...` each half of it, where gate and up projection lie one after the other. Each
  device computes its part of every expert, and the outputs are summed. Experts without such styles stay whole.
- Layers that share a parameter are cut together: an embedding with the head that is tied to it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from spindle.capture.blocks import Block, find_blocks
from spindle.errors import WorkloadError
from spindle.workload import Component, Workload

PARTIAL, EXPERTS = "replicated_with_grad_allreduce", "moe_tp_experts"
EMBEDDING, HEAD = "embedding_rowwise", "colwise_gather_output"
_ALIASES = {"colwise_rep": HEAD, "rowwise_rep": "rowwise_split_input"}
_STACKED = {"colwise": (-2, 1), "rowwise": (-1, 1), "packed_colwise": (-2, 2), "packed_rowwise": (-1, 2)}  # dim, packs
_JOINED = (HEAD, "rowwise_split_input")
_LINEAR = ("colwise", "rowwise", *_JOINED)
_OUTSIDE = (*_JOINED, EMBEDDING)
_WHOLE = "replicate"


@dataclass(frozen=True, slots=True)
class Cut:
    """How a parameter is held: in `pieces` along `dim`, of each of the `packs` tensors in it, or whole. `joined`: its
    layer gives and takes all features; `partial`: its gradients are shares; `experts`: the class whose parameter it is.
    """

    pieces: int = 1
    dim: int = 0
    packs: int = 1
    joined: bool = False
    partial: bool = False
    experts: type[nn.Module] | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    path: str
    module: nn.Module
    style: str
    stacked: Mapping[str, str] = field(default_factory=dict)  # of experts: their parameters' styles
    component: str = ""  # another one, where it shares a parameter with a layer of the one that is spread


def cuts(workload: Workload) -> dict[str, Cut]:
    """Parameters, by the workload's names, that tensor parallelism treats otherwise than as copies.

    Raises WorkloadError where a component has no plan, or one that does not fit it.
    """
    names = {id(parameter): name for name, parameter in workload.named_parameters()}
    return {
        names[id(parameter)]: cut
        for component in workload.components.values()
        if component.tensor_parallel > 1
        for layer in _layers(component, workload)
        for parameter, cut in _parameters(layer, component.tensor_parallel)
    }


def cut_outside(component: Component, workload: Workload) -> list[Block]:
    """Layers outside of a component's blocks that are cut: each becomes a block, so that plans may spread it. Layers
    that another component's are tied to are among them.
    """
    layers = [
        layer
        for other in workload.components.values()
        if other.tensor_parallel > 1
        for layer in _outside(other, _plan(other), workload)
        if (layer.component or other.name) == component.name
    ]
    return [Block(layer.path, layer.module) for layer in {layer.path: layer for layer in layers}.values()]


def refuse_bare_reads(module: nn.Module, inner: str, name: str, cut: Cut) -> None:
    """Code that reads a cut parameter itself, not through its layer, cannot run on pieces."""
    owner = module.get_submodule(inner.rpartition(".")[0])
    if cut.pieces > 1 and type(owner) not in (nn.Linear, nn.Embedding, cut.experts):
        reader = type(owner).__name__ if inner.startswith("block.") else "code outside of layers"
        raise WorkloadError(
            f"parameter {name!r} is cut by tensor parallelism, but {reader} reads it beside its layer; "
            "call the layer, or leave it out of tensor_plan="
        )


def _what(component: Component) -> str:
    return f"component {component.name!r}: tensor_parallel={component.tensor_parallel}"


def _plan(component: Component) -> Mapping[str, str]:
    plan = component.tensor_plan if component.tensor_plan is not None else getattr(component.module, "_tp_plan", None)
    if not plan:
        raise WorkloadError(
            f"{_what(component)}, but the model has no plan for it; "
            "give tensor_plan={'layers.*.q_proj': 'colwise', ...}"
        )
    return {pattern: _ALIASES.get(style, style) for pattern, style in plan.items()}


def _layers(component: Component, workload: Workload) -> list[_Layer]:
    plan = _plan(component)
    found = [*_inside(component, plan), *_outside(component, plan, workload)]
    if not found:
        raise WorkloadError(
            f"{_what(component)}, but its plan names nothing that can be cut; the patterns are {', '.join(plan)}"
        )
    return found


def _inside(component: Component, plan: Mapping[str, str]) -> Iterator[_Layer]:
    for block in find_blocks(component.name, component.module, component.layers):
        for inner, module in block.module.named_modules():
            path = f"{block.path}.{inner}" if inner else block.path
            layer = _Layer(path, module, _style(plan, path), _stacked(plan, path, module))
            if layer.style == EXPERTS and not _cuts_all(component, layer):
                continue
            if layer.style != _WHOLE:
                _check(component, layer, (*_LINEAR, EMBEDDING, PARTIAL, EXPERTS))
                yield layer


def _outside(component: Component, plan: Mapping[str, str], workload: Workload) -> list[_Layer]:
    """What a model's own plan names here and does not fit stays whole; what the user's plan names is an error."""
    inside = _modules_inside(component)
    layers = {path: _Layer(path, m, _style(plan, path)) for path, m in component.module.named_modules() if path}
    elsewhere = [
        (_Layer(path, module, _WHOLE, component=other.name), other)
        for other in workload.components.values()
        if other is not component
        for path, module in other.module.named_modules()
    ]
    found: dict[str, _Layer] = {}
    for layer in layers.values():
        if layer.module in inside or layer.style == _WHOLE or layer.path in found:
            continue
        try:
            _check(component, layer, _OUTSIDE)
            others = [other for other in layers.values() if _share(layer.module, other.module)]
            tied = [_tied(component, layer, other, outside=other.module not in inside) for other in others]
            for other, owner in elsewhere:
                if _share(layer.module, other.module):
                    alike = owner.tensor_parallel in (1, component.tensor_parallel)
                    outside = alike and other.module not in _modules_inside(owner)
                    tied.append(_tied(component, layer, other, outside=outside))
        except WorkloadError:
            if component.tensor_plan is not None:
                raise
        else:
            found |= {(f"{each.component}." if each.component else "") + each.path: each for each in (layer, *tied)}
    return list(found.values())


def _modules_inside(component: Component) -> set[nn.Module]:
    """Modules of a component's blocks."""
    blocks = find_blocks(component.name, component.module, component.layers)
    return {module for block in blocks for module in block.module.modules()}


def _share(layer: nn.Module, other: nn.Module) -> bool:
    held = {id(parameter) for parameter in layer.parameters(recurse=False)}
    return other is not layer and any(id(parameter) in held for parameter in other.parameters(recurse=False))


def _tied(component: Component, layer: _Layer, other: _Layer, *, outside: bool) -> _Layer:
    """A layer with a parameter of `layer`, cut as that one is."""
    style = EMBEDDING if isinstance(other.module, nn.Embedding) else HEAD
    tied = _Layer(other.path, other.module, style, component=other.component)
    if layer.style not in (EMBEDDING, HEAD) or not outside:
        path = f"{other.component}.{other.path}".strip(".")
        raise WorkloadError(
            f"{_what(component)}: {layer.path!r} is {layer.style!r} in its plan but shares a parameter with {path!r}; "
            f"such layers stand outside of blocks, with the styles {EMBEDDING}, {HEAD}"
        )
    _check(component, tied, _OUTSIDE)
    return tied


def _check(component: Component, layer: _Layer, styles: tuple[str, ...]) -> None:
    """Raises WorkloadError where a layer cannot be cut so."""
    what, module, pieces = f"{_what(component)}: {layer.path!r}", layer.module, component.tensor_parallel
    if layer.style not in styles:
        raise WorkloadError(f"{what} is {layer.style!r} in its plan; the styles there are {', '.join(styles)}")
    if layer.style == PARTIAL:
        return
    if layer.style == EXPERTS:
        for name, style in layer.stacked.items():
            dim, packs = _STACKED[style]
            size = module.get_parameter(name).shape[dim]
            if size % (packs * pieces):
                raise WorkloadError(f"{what}: {name} has {size // packs} features; tensor_parallel must divide them")
        return
    if layer.style == EMBEDDING:
        if type(module) is not nn.Embedding or module.max_norm or module.scale_grad_by_freq or module.sparse:
            raise WorkloadError(f"{what} is a {type(module).__name__}; only a plain torch.nn.Embedding can be cut")
        size, name = int(module.num_embeddings), "words"
    elif type(module) is not nn.Linear:
        raise WorkloadError(f"{what} is a {type(module).__name__}; only torch.nn.Linear can be cut")
    else:
        by_outputs = layer.style.startswith("colwise")
        size, name = (module.out_features, "outputs") if by_outputs else (module.in_features, "inputs")
    if size % pieces:
        raise WorkloadError(f"{what} has {size} {name}; tensor_parallel must divide them")


def _parameters(layer: _Layer, pieces: int) -> Iterator[tuple[Tensor, Cut]]:
    if layer.style == PARTIAL:
        yield from ((parameter, Cut(partial=True)) for parameter in layer.module.parameters())
        return
    if layer.style == EXPERTS:
        for name, style in layer.stacked.items():
            parameter, (dim, packs) = layer.module.get_parameter(name), _STACKED[style]
            yield parameter, Cut(pieces, dim % parameter.ndim, packs, experts=type(layer.module))
        return
    dim = 1 if layer.style.startswith("rowwise") else 0
    cut = Cut(pieces, dim, joined=layer.style in _OUTSIDE)
    yield layer.module.get_parameter("weight"), cut
    bias = getattr(layer.module, "bias", None)
    if dim == 0 and isinstance(bias, nn.Parameter):
        yield bias, cut


def _stacked(plan: Mapping[str, str], path: str, module: nn.Module) -> dict[str, str]:
    """Styles of a module's own parameters, as experts have them."""
    styles = {name: _style(plan, f"{path}.{name}") for name, _ in module.named_parameters(recurse=False)}
    return {name: style for name, style in styles.items() if style in _STACKED}


def _cuts_all(component: Component, layer: _Layer) -> bool:
    """Whether a plan says how each parameter of the experts is cut: one that stays whole would be summed anew."""
    missing = [name for name, _ in layer.module.named_parameters() if name not in layer.stacked]
    if layer.stacked and missing and component.tensor_plan is not None:
        raise WorkloadError(
            f"{_what(component)}: {layer.path!r} is {EXPERTS!r} in its plan, which cuts {', '.join(layer.stacked)} "
            f"but not {', '.join(missing)}; give each of its parameters one of {', '.join(_STACKED)}, or none"
        )
    return bool(layer.stacked) and not missing


def _style(plan: Mapping[str, str], path: str) -> str:
    return next((style for pattern, style in plan.items() if _matches(pattern, path)), _WHOLE)


def _matches(pattern: str, path: str) -> bool:
    names, wanted = path.split("."), pattern.split(".")
    return len(names) == len(wanted) and all(w in ("*", name) for w, name in zip(wanted, names, strict=True))
