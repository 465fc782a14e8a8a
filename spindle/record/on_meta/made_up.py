"""Made-up numbers: a tensor on the meta device in; one of its shape on the CPU out, which takes next to no memory.

- Each entry of a large one is the sum of its indices looked up in a short line of random numbers (a Hankel matrix), so
  that a matrix of 32000 x 8192 is a view of 40191 numbers. No two rows or columns are equal, as in random matrices.
- A product with such a matrix is a convolution, which a Fourier transform computes in a moment: so a layer of 70B runs
  on some samples in a second and some MiB, and gives what it gives with these weights.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

LARGE = 1_000_000  # numbers; smaller tensors are random in each entry
ROWS = 256  # that one Fourier transform takes at once
SCALE = 0.02

_STRIDES = (1, 1, 131, 8191, 104729)  # of the dimensions from the last on; no two of them add up alike soon


def made_up(value: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of the same shape and type on the CPU: random numbers around zero, or zeros of other types."""
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype)
    if value.numel() <= LARGE or value.ndim not in range(2, len(_STRIDES) + 1):
        return (torch.randn(value.shape, generator=generator) * SCALE).to(value.dtype)
    strides = _STRIDES[: value.ndim][::-1]
    length = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True))
    line = (torch.randn(length, generator=generator) * SCALE).to(value.dtype)
    return line.as_strided(value.shape, strides)


def is_made_up(value: object) -> bool:
    """Whether a tensor is a view of a line that is shorter than itself."""
    return isinstance(value, Tensor) and value.layout is torch.strided and _line_length(value) < value.numel()


def own_numbers(value: Tensor) -> Tensor:
    """The numbers that a tensor is made of: itself, or the line that it is a view of."""
    return value.as_strided((_line_length(value),), (1,), 0) if is_made_up(value) else value


def _line_length(value: Tensor) -> int:
    if value.is_meta:
        return value.numel()
    return int(value.untyped_storage().nbytes() // value.element_size())


def stand_in(value: Tensor, generator: torch.Generator) -> Tensor:
    """A made-up tensor that is a parameter where `value` is one."""
    found = made_up(value, generator)
    return nn.Parameter(found, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else found


def give_numbers(module: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put what `make` gives in place of each parameter and buffer of a module that is on the meta device."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        held: Iterable[tuple[dict[str, Any], str, Tensor | None]] = (
            *((part._parameters, name, value) for name, value in part._parameters.items()),
            *((part._buffers, name, value) for name, value in part._buffers.items()),
        )
        for own, name, value in held:
            if value is None or not value.is_meta:
                continue
            if id(value) not in made:
                found = make(value)
                own_kind = isinstance(value, nn.Parameter)
                made[id(value)] = nn.Parameter(found, requires_grad=value.requires_grad) if own_kind else found
            own[name] = made[id(value)]


class MadeUpProducts(TorchDispatchMode):
    """While open, products with matrices that are views of a line are computed by Fourier transforms, without the
    matrix; one that is cast to another type stays a view of a line.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a call, products in the short way."""
        short = _SHORT.get(func)
        found = None if short is None else short(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


def _is_hankel(matrix: Tensor) -> bool:
    return matrix.ndim == 2 and matrix.stride() == (1, 1) and is_made_up(matrix)


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    if _is_hankel(b):
        return _times(a, b)
    return _times(b.t(), a.t()).t() if _is_hankel(a) else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    product = _mm(a, b)
    return None if product is None else bias * beta + product * alpha


def _bmm(a: Tensor, b: Tensor) -> Tensor | None:
    if not len(b) or not _is_hankel(b[0]):
        return None
    return torch.stack([_times(rows, matrix) for rows, matrix in zip(a, b, strict=True)])


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor | None:
    """Rows sorted by group, each times the matrix of its group."""
    if offs is None or a.ndim != 2 or b.ndim != 3 or not _is_hankel(b[0]):
        return None
    ends = offs.tolist()
    parts = [_times(a[low:high], matrix) for low, high, matrix in zip([0, *ends[:-1]], ends, b, strict=True)]
    found: Tensor = torch.cat([*parts, a.new_zeros(len(a) - (ends[-1] if ends else 0), b.shape[-1])])
    return found


def _cast(value: Tensor, **options: Any) -> Tensor | None:
    dtype = options.get("dtype")
    if (
        dtype is None
        or not dtype.is_floating_point
        or not is_made_up(value)
        or options.get("device") not in (None, _CPU)
    ):
        return None
    return own_numbers(value).to(dtype).as_strided(value.shape, value.stride(), value.storage_offset())


_CPU = torch.device("cpu")
_SHORT: Mapping[Any, Callable[..., Tensor | None]] = {
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten._grouped_mm.default: _grouped,
    torch.ops.aten._to_copy.default: _cast,
}


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows times a matrix: number o of a row is the sum over i of its number i times entry i + o of the line."""
    ins, outs = matrix.shape
    if not rows.numel():
        return rows.new_zeros(len(rows), outs)
    size = _quick_size(outs + ins - 1)
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    start = matrix.storage_offset()
    line = own_numbers(matrix)[start : start + outs + ins - 1].to(exact.dtype)
    frequencies = torch.fft.rfft(line, n=size)
    found = [
        torch.fft.irfft(torch.fft.rfft(part.flip(-1), n=size) * frequencies, n=size)[:, ins - 1 : ins - 1 + outs]
        for part in torch.split(exact, ROWS)
    ]
    return torch.cat(found).to(rows.dtype)


def _quick_size(size: int) -> int:
    """The next number that has no prime factors but 2, 3 and 5, which transforms are quick for."""
    best = 1 << math.ceil(math.log2(size))
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three << max(0, math.ceil(math.log2(size / three))))
            three *= 3
        five *= 5
    return best
