"""Functions: calls in the form in which they are recorded.

- A call that writes in place becomes one that gives a new value, so that each value has one maker.
- A boolean mask that the batch decides becomes the indices of its True entries, whose number is then known.
- Sums and means over all entries go row by row first: only one number a row has to be gathered in one place, in place
  of whole activations or logits, when the sum is over rows of several devices.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spindle.record.lazy import SET_DATA, Forbidden
from spindle.record.recording import tensors_in, tree

IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor", "pow", "mod", "lshift", "rshift")
)
_NO_WRITES = frozenset({"requires_grad_", "retain_grad", "__setstate__"})


ARITHMETIC = frozenset(
    getattr(Tensor, name)
    for name in (
        *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv")),
        *("add_", "sub_", "mul_", "div_", "lerp_", "addcmul_", "addcdiv_", "addmm_", "pow_", "neg_"),
    )
)
"""Functions that change a tensor by what it was."""


_INPLACE_FLAG: dict[Callable[..., Any], int] = {
    function: list(parameters).index("inplace")
    for function in vars(F).values()
    if inspect.isfunction(function) and "inplace" in (parameters := inspect.signature(function).parameters)
}
"""Functions that change their first argument where `inplace` is true, and where that stands among the arguments."""


def writes_first(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call changes its first argument in place."""
    if function is Tensor.__setitem__:
        return True
    if function in _INPLACE_FLAG:
        place = _INPLACE_FLAG[function]
        return bool(args) and bool(args[place] if len(args) > place else kwargs.get("inplace", False))
    name = getattr(function, "__name__", "")
    return name in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES)


def written_by(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors to which a call says that it writes: by its name, by `inplace=`, by `out=`, or as `tensor.data = ...`."""
    into = kwargs.get("out")
    if into is None and (function == SET_DATA or writes_first(function, args, kwargs)):
        into = args[0] if args else next(iter(kwargs.values()), None)  # torch.nn.init gives it by name
    return tensors_in(into)


_STATISTICS: dict[Callable[..., Any], tuple[int, int, int, str]] = {
    F.batch_norm: (1, 2, 5, "training"),
    torch.batch_norm: (3, 4, 5, "training"),
    F.instance_norm: (1, 2, 5, "use_input_stats"),
    torch.instance_norm: (3, 4, 5, "use_input_stats"),
}
"""Where running mean and variance stand among the arguments of a function, and whether it updates them."""


def counts_batches(module: nn.Module) -> bool:
    """Whether a module is a norm layer of torch that keeps running statistics just now."""
    known = isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward
    held = [module._buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked")]
    return known and module.training and bool(module.track_running_stats) and all(value is not None for value in held)


def updated_places(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Where the running statistics stand that a function updates; () for one that updates none."""
    if function not in _STATISTICS:
        return ()
    mean, variance, place, flag = _STATISTICS[function]
    updates = args[place] if len(args) > place else kwargs.get(flag, function is F.instance_norm)
    return (mean, variance) if updates else ()


def updated(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Arguments that a function changes in place without saying so: running statistics, embeddings with max_norm."""

    def given(index: int, name: str) -> Any:
        return args[index] if len(args) > index else kwargs.get(name)

    if function is F.embedding and given(3, "max_norm") is not None:
        return [given(1, "weight")]
    names = ("running_mean", "running_var")
    found = [given(p, n) for p, n in zip(updated_places(function, args, kwargs), names, strict=False)]
    return [value for value in found if isinstance(value, Tensor)]


class Written:
    """A function that writes in place, as one that gives what its first argument becomes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.__name__ = function, getattr(function, "__name__", "write")

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first argument after the call, in memory of its own."""
        x = x.clone()
        self.function(x, *args, **kwargs)
        return x


class WrittenThroughView:
    """A function that writes to a view, as one of the tensor that the view is of: what both become."""

    def __init__(self, function: Callable[..., Any], view: Tensor) -> None:
        self.function, self.__name__ = function, getattr(function, "__name__", "write")
        self.place = (tuple(view.shape), view.stride(), view.storage_offset())

    def __call__(self, base: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The tensor and its view after the call, in memory of their own."""
        base = base.clone(memory_format=torch.preserve_format)
        self.function(base.as_strided(*self.place), *args, **kwargs)
        return base, base.as_strided(*self.place)


class WrittenInLeaf:
    """A function that writes to part of a parameter's or buffer's memory: it is given the whole, and gives the part."""

    def __init__(self, function: Callable[..., Any], view: Tensor) -> None:
        self.function, self.__name__ = function, getattr(function, "__name__", "write")
        self.place = (tuple(view.shape), view.stride(), view.storage_offset())

    def __call__(self, leaf: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The part after the call."""
        with torch.no_grad():
            part = leaf.detach().as_strided(*self.place)
            self.function(part, *args, **kwargs)
        return part


class SetData:
    """`tensor.data = value`, as a write."""

    __name__ = "data"

    def __call__(self, leaf: Tensor, value: Tensor) -> None:
        """Write the value."""
        with torch.no_grad():
            leaf.copy_(value)


class NewData(SetData):
    """The same with memory of its own: what autograd has kept of the tensor before stays."""

    def __call__(self, leaf: Tensor, value: Tensor) -> None:
        """Put the value in place."""
        leaf.data = value.to(leaf.dtype).clone(memory_format=torch.preserve_format)


class Into:
    """A function called with `out=`, as one that gives what `out` becomes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.__name__ = function, getattr(function, "__name__", "out")

    def __call__(self, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the function gives, in the type of `out`."""
        result: Tensor = self.function(*args, **kwargs)
        return result.to(out.dtype)


class IntoLeaf(Into):
    """A function called with a buffer as `out=`: what it gives is written there."""

    def __call__(self, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The buffer."""
        with torch.no_grad():
            return out.copy_(self.function(*args, **kwargs))


def scatter(x: Tensor, where: Tensor, source: Tensor) -> Tensor:
    """`masked_scatter`, its mask given as indices of entries."""
    values = source.reshape(-1)[: where.shape[0]].to(x.dtype)
    return x.reshape(-1).index_copy(0, where, values).reshape(x.shape)


def scatter_rows(x: Tensor, where: Tensor, source: Tensor) -> Tensor:
    """`masked_scatter` with a mask that covers whole vectors of the last dimension, given as indices of these."""
    width = x.shape[-1]
    rows = source.reshape(-1, width)[: where.shape[0]].to(x.dtype)
    return x.reshape(-1, width).index_copy(0, where, rows).reshape(x.shape)


def select(x: Tensor, where: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`masked_select`, its mask given as indices of entries of `x` in this shape."""
    return x.expand(shape).reshape(-1)[where]


def alignment(log_probs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`ctc_loss` of each sample, which the meta device lacks."""
    return log_probs.sum((0, -1)) if log_probs.is_meta else F.ctc_loss(log_probs, *args, **kwargs)


def _is_mask(value: Any, is_lazy: Callable[[Any], bool]) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) and not is_lazy(value)


def true_entries(mask: Tensor, shape: tuple[int, ...] | None = None, *, rows: bool = False) -> tuple[Tensor, ...]:
    """Indices of the True entries of a mask: by dimension; or, given the shape that it covers, of entries in a row, or
    of the last dimension's vectors.
    """
    if shape is None:
        return mask.nonzero(as_tuple=True)
    mask = mask.expand(shape)
    return ((mask[..., 0] if rows else mask).reshape(-1).nonzero()[:, 0],)


def total(counts: Tensor) -> int:
    """The sum of some whole numbers."""
    return int(counts.sum())


SPARSE = "by which gradients are sparse, and planned runs add up dense ones; leave sparse out"
"""Why embeddings must not ask for sparse gradients."""

Run = Callable[..., Any]
"""Runs a function for real, so that it is known what it was run on."""


def _without_masks(index: Any, is_lazy: Callable[[Any], bool], run: Run) -> Any:
    """An index in which boolean masks known from the batch are replaced by the indices of their True entries."""
    if type(index) is tuple:
        found: list[Any] = []
        for part in index:
            if _is_mask(part, is_lazy) and part.ndim:
                found.extend(run(true_entries, part))
            else:
                found.append(part)
        return tuple(found)
    return run(true_entries, index) if _is_mask(index, is_lazy) and index.ndim else index


Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def recordable(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_lazy: Callable[[Any], bool],
    run: Run,
) -> Call:
    """A call whose result has a size that no value of the model decides. `run` computes what follows from the batch.
    Raises Forbidden for sparse gradients.
    """
    if function is F.embedding and (args[6] if len(args) > 6 else kwargs.get("sparse")):
        raise Forbidden(f"it looks up with sparse=True, {SPARSE}")
    if function in (Tensor.__getitem__, Tensor.__setitem__):
        return function, (args[0], _without_masks(args[1], is_lazy, run), *args[2:]), kwargs
    if function in (Tensor.index_put, Tensor.index_put_, torch.index_put, torch.index_put_):
        return function, (args[0], _without_masks(tuple(args[1]), is_lazy, run), *args[2:]), kwargs
    if function in (Tensor.masked_scatter, torch.masked_scatter) and not is_lazy(args[1]):
        x, mask, source = args
        shape = tuple(x.shape)
        rows = mask.ndim == x.ndim > 1 and (mask.stride(-1) == 0 or mask.shape[-1] == 1) and x.shape[-1] > 1
        (where,) = run(true_entries, mask, shape, rows=rows)
        _check_places(len(where), source, shape, shape[-1] if rows else 1)
        return scatter_rows if rows else scatter, (x, where, source), {}
    if function in (Tensor.masked_select, torch.masked_select) and not is_lazy(args[1]):
        shape = tuple(torch.broadcast_shapes(args[0].shape, args[1].shape))  # type: ignore[no-untyped-call]
        (where,) = run(true_entries, args[1], shape)
        return select, (args[0], where, shape), {}
    if function is Tensor.new and len(args) > 1 and all(type(size) in (int, torch.Size) for size in args[1:]):
        return Tensor.new_empty, (args[0], tuple(args[1] if isinstance(args[1], torch.Size) else args[1:])), kwargs
    if function in (torch.repeat_interleave, Tensor.repeat_interleave):
        return function, args, _with_output_size(args, kwargs, is_lazy, run)
    return alignment if function is F.ctc_loss else function, args, kwargs


def _check_places(places: int, source: Tensor, shape: tuple[int, ...], width: int) -> None:
    """Samples must take their own values, not values of the next sample, and no fewer than they have."""
    if tuple(source.shape) != shape and places * width != source.numel():
        raise ValueError(
            f"masked_scatter has {places} places for {source.numel() // width} values; samples must have as many "
            "values as places: say in rows= how many belong to each"
        )


def _with_output_size(
    args: tuple[Any, ...], kwargs: dict[str, Any], is_lazy: Callable[[Any], bool], run: Run
) -> dict[str, Any]:
    repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
    if isinstance(repeats, Tensor) and not is_lazy(repeats) and "output_size" not in kwargs:
        dim = args[2] if len(args) > 2 else kwargs.get("dim")
        size = 1 if repeats.numel() > 1 else (args[0].numel() if dim is None else args[0].shape[dim])
        return {**kwargs, "output_size": run(total, repeats) * size}
    return kwargs


# -- sums, row by row first -------------------------------------------------------------------------------------------

_CLASS_LOSSES = (F.cross_entropy, F.nll_loss)
_ELEMENTWISE_LOSSES = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
)
_SUMS = (torch.sum, Tensor.sum)
_MEANS = (torch.mean, Tensor.mean)


REDUCTIONS = frozenset({*_CLASS_LOSSES, *_ELEMENTWISE_LOSSES, *_SUMS, *_MEANS, F.ctc_loss})
"""Functions that `by_rows` knows."""


def by_rows(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A reduction over all entries, computed row by row first; NotImplemented for every other call.

    Mean losses over classes become (sum over counted positions) / (number of them), which holds for any split of the
    batch; a mean of means would not.
    """
    if function in _SUMS and len(args) == 1 and not kwargs:
        return _total(args[0])
    if function in _MEANS and len(args) == 1 and not kwargs:
        return _mean(args[0])
    if function in _CLASS_LOSSES:
        return _class_loss(function, _bind(function, args, kwargs))
    if function in _ELEMENTWISE_LOSSES:
        return _elementwise_loss(function, _bind(function, args, kwargs))
    if function is F.ctc_loss:
        return _alignment_loss(_bind(function, args, kwargs))
    return NotImplemented


def _total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1).sum() if values.ndim > 1 and values.numel() else values.sum()


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1).mean() if values.ndim > 1 and values.numel() else values.mean()


def _class_loss(function: Callable[..., Tensor], given: Mapping[str, Any]) -> Tensor:
    target = given["target"]
    if given["reduction"] == "sum":
        return _total(function(**{**given, "reduction": "none"}))
    if given["reduction"] != "mean" or given["weight"] is not None or target.is_floating_point():
        plain: Tensor = function(**given)
        return plain
    each: Tensor = function(**{**given, "reduction": "none"})
    count: Tensor = (target != given["ignore_index"]).sum()
    return _total(each) / count


def _elementwise_loss(function: Callable[..., Tensor], given: Mapping[str, Any]) -> Tensor:
    reduce = {"mean": _mean, "sum": _total}.get(given["reduction"])
    return function(**given) if reduce is None else reduce(function(**{**given, "reduction": "none"}))


def _alignment_loss(given: Mapping[str, Any]) -> Tensor:
    each = F.ctc_loss(**{**given, "reduction": "none"})
    if given["reduction"] == "mean":
        return _mean(each / torch.as_tensor(given["target_lengths"]).clamp(min=1))
    return _total(each) if given["reduction"] == "sum" else each


def _bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
        raise TypeError(f"{function.__name__}: size_average and reduce are gone; use reduction=")
    return given


# -- autocast ---------------------------------------------------------------------------------------------------------

_LOWERED = frozenset(
    {
        F.linear,
        F.bilinear,
        F.scaled_dot_product_attention,
        torch.einsum,
        *(
            getattr(owner, name)
            for owner in (torch, Tensor)
            for name in ("matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "__matmul__", "__rmatmul__")
            if hasattr(owner, name)
        ),
        *(getattr(F, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)),
    }
)
"""What autocast computes in its own type. The meta device knows no autocast."""


def under_autocast(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments on the meta device in the types in which the function runs."""
    if function not in _LOWERED or not torch.is_autocast_enabled("cpu"):
        return args, kwargs
    dtype = torch.get_autocast_dtype("cpu")

    def cast(leaf: Any) -> Any:
        plain = not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dtype == torch.float64
        return leaf if plain else leaf.to(dtype)

    return tree(cast, args), tree(cast, kwargs)


# -- shapes -----------------------------------------------------------------------------------------------------------


def _normed(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm of any number of rows: a part of a batch may have a single one, while the batch has more."""
    twice = torch.cat([x, x])
    return torch.batch_norm(twice, weight, bias, running_mean, running_var, training, momentum, eps, False)[: len(x)]


def _covariances(input: Tensor, **kwargs: Any) -> Tensor:
    """What has the shape of `torch.cov(input)`, which compares numbers, and so has no shape on the meta device."""
    return input @ input.mT if input.ndim == 2 else input.sum()


UNCHECKED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _normed,
    **dict.fromkeys((torch.cov, Tensor.cov, torch.corrcoef, Tensor.corrcoef), _covariances),
}
"""Functions that refuse some sizes which only parts of batches have, or that the meta device does not know, and what
gives their results' shapes."""

UNSET: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    Tensor.new_empty: Tensor.new_zeros,
}
"""Functions that give memory as it is, and what gives the same with numbers."""

# -- devices ----------------------------------------------------------------------------------------------------------


def without_devices(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call on a recorded value with its devices taken out: it is computed where the plan says."""
    if "device" in kwargs:
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    if function in (Tensor.to, Tensor.type_as):
        args = tuple(a for a in args if not isinstance(a, torch.device) and not _names_device(a))
    return function, args, kwargs


def _names_device(value: Any) -> bool:
    return isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda", "meta")
