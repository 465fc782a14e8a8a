"""Lazy values: which tensors depend on parameters, and what code may ask of them.

A tensor on the meta device is lazy: its shape and type are known, its numbers are not.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

get_device: Any = Tensor.device.__get__
get_meta: Any = Tensor.is_meta.__get__  # type: ignore[attr-defined]
ATTRIBUTES: frozenset[Any] = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in [
                "shape",
                "dtype",
                "ndim",
                "requires_grad",
                "layout",
                "is_cuda",
                "grad_fn",
                "is_sparse",
                "is_nested",
                "is_leaf",
                "is_quantized",
                "is_mps",
                "is_xpu",
                "is_mkldnn",
                "is_sparse_csr",
                "itemsize",
                "nbytes",
                "names",
                "_version",
                "is_cpu",
            ]
            if hasattr(getattr(Tensor, name, None), "__get__")
        ),
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.nelement,
        Tensor.__len__,
        Tensor.stride,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.is_signed,
        Tensor.__hash__,
        Tensor.storage_offset,
        Tensor.element_size,
        Tensor.ndimension,
        Tensor.get_device,
        torch.is_floating_point,
        torch.is_complex,
        torch.is_tensor,
        torch.numel,
        torch.result_type,
        torch.is_same_size,
    }
)
"""What can be asked of a lazy value: nothing that depends on its numbers."""

SIZES: frozenset[Any] = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.nbytes.__get__,  # type: ignore[attr-defined]
        *(Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride, torch.numel, torch.is_same_size),
    }
)
"""Those of them that tell sizes, which may depend on the numbers of a batch (`unique`, an index by a mask)."""

SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]

GIVES_MEMORY: frozenset[Any] = frozenset(
    {
        Tensor.numpy,
        Tensor.__array__,
        Tensor.data_ptr,
        Tensor.untyped_storage,
        Tensor.storage,
        Tensor.__dlpack__,
    }
)
"""Functions by which other code may read a tensor's memory, and write there, unseen."""

HALF_AUTOCAST = (
    "it computes under torch.autocast in float16, whose gradients need loss scaling, which planned runs have not; use "
    "bfloat16, or precision='bf16' of the workload"
)

READS: frozenset[Any] = frozenset(
    {
        Tensor.item,
        Tensor.tolist,
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.__complex__,
        Tensor.__contains__,
        Tensor.numpy,
        Tensor.__array__,
        torch.equal,
        Tensor.equal,
        torch.allclose,
        Tensor.allclose,
        torch.is_nonzero,
        Tensor.is_nonzero,
    }
)
"""What gives Python the numbers in a tensor."""

SHOWS: frozenset[Any] = frozenset({Tensor.__repr__, Tensor.__format__, Tensor.__str__})
AS_OTHER: dict[Any, Any] = {
    Tensor.expand_as: Tensor.expand,
    Tensor.view_as: Tensor.view,
    Tensor.reshape_as: Tensor.reshape,
}
"""What takes the shape of another tensor: of a real one it gives a real one."""

OPENS_GRADIENTS: frozenset[Any] = frozenset(
    {Tensor.backward, torch.autograd.backward, torch.autograd.grad, Tensor.register_hook, Tensor.retain_grad}
)


SETS_GRADIENTS: frozenset[Any] = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]
"""What freezes or thaws a tensor."""


_GRADIENT: Any = Tensor.grad
GRADIENTS: frozenset[Any] = frozenset({_GRADIENT.__get__, _GRADIENT.__set__, _GRADIENT.__delete__})
"""What reads or changes the gradient that a tensor holds."""

OTHER_DATA = "it sets .data of a value of the model, or to another shape; compute a new value in its place"
PARTS_AT_ONCE = (
    "it writes to several tensors at once, some of which are parts of parameters or none; write to each alone"
)
BRANCHES = "it branches on a value computed from parameters"
INSTEAD = "use torch.where, or put it into a module and register that"


class LazyRead(Exception):
    """Code asked for a number that depends on parameters; or, if `buffer` is given, on that one, which changes."""

    def __init__(self, buffer: str = "") -> None:
        super().__init__(buffer)
        self.buffer = buffer

    @property
    def what(self) -> str:
        """What the code does."""
        if self.buffer:
            return f"it branches on a value of buffer {self.buffer!r}, which changes from step to step"
        return BRANCHES

    @property
    def instead(self) -> str:
        """What to do."""
        return f"compute with the buffer as a tensor: {INSTEAD}" if self.buffer else INSTEAD


class Refused(Exception):
    """Code does what a planned run cannot do; the message says what, and what to do."""


class CameOut(Refused):
    """A tensor of the model reaches a call, and no recorded call gave it."""

    def __init__(self) -> None:
        super().__init__(
            "a tensor of the model came out of a layer by a hook, or of code that cannot be followed "
            "(torch.jit.script, C++), or was kept from an earlier batch; let the layer return it, and keep what "
            "later batches read in a buffer that __init__ registers with its first value"
        )


class Forbidden(Refused):
    """Code does what no planned run can do, also where a component runs as one operator."""


class Stranger(Exception):
    """A trainable parameter that belongs to no component."""


def sharing(one: str, other: str) -> Refused:
    """What to say where a parameter would get the memory of another."""
    return Refused(
        f"it sets .data of parameter {one!r} to the memory of {other!r}, which both would share from then on; copy it: "
        "p.data.copy_(q)"
    )


def is_lazy(value: Any) -> bool:
    """Whether a tensor is on the meta device, whatever modes are on."""
    if not isinstance(value, Tensor):
        return False
    with torch._C.DisableTorchFunction():
        return value.is_meta


def is_meta(value: Any) -> bool:
    """Whether a tensor is on the meta device, where no recorder is on."""
    return isinstance(value, Tensor) and bool(get_meta(value))


def memory_of(value: Tensor) -> int:
    """Which memory a real tensor lies in; 0 for tensors without."""
    try:
        return 0 if get_meta(value) else int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse ones, and such as stand for many
        return 0


def storage_of(value: Tensor) -> int:
    """Which storage a tensor lies in, on the meta device too; 0 for tensors without."""
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


def any_lazy(values: Iterable[Any]) -> bool:
    """Whether nested arguments hold a lazy tensor."""
    for value in values:
        if isinstance(value, Tensor):
            if get_meta(value):
                return True
        elif type(value) in (list, tuple):
            if any_lazy(value):
                return True
        elif type(value) is dict and any_lazy(value.values()):
            return True
    return False


def covers(value: Tensor, leaf: Tensor) -> bool:
    """Whether a tensor in the memory of a parameter or buffer is all of it, in its order."""
    return (
        value.shape == leaf.shape
        and value.stride() == leaf.stride()
        and value.storage_offset() == leaf.storage_offset()
    )


def share_versions(value: Tensor, leaf: Tensor) -> bool:
    """Whether autograd notices on a leaf what is written to a meta tensor in its memory; not of what `.data` gives."""
    before = leaf._version
    with torch.no_grad(), torch._C.DisableTorchFunction():
        value.zero_()  # which has no numbers
    return leaf._version != before


def refuse_modes(*, inside: bool) -> None:
    """Raise Forbidden in modes of torch that recorded calls cannot carry; `inside` of a layer, which runs as it is."""
    if not inside and torch._C._functorch.peek_interpreter_stack() is not None:
        raise Forbidden(
            "it calls the model inside of a transform of torch.func (grad, vmap, jvp, jacrev), which calls of its "
            "layers cannot be recorded in; put what is transformed into the forward of a layer, and name that layer in "
            "layers= of its component (layers=[module] for all of it)"
        )
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.float16:
        raise Forbidden(HALF_AUTOCAST)
