"""Shapes: what a call of a block gives, without its numbers; and rules by which shapes of arguments tell it.

In a rule each size of a result is a constant, or a multiple of a size of an argument. It is narrowed with every run,
and checked against what the block gives when it is executed. Blocks that the meta device cannot run have a rule from
real runs on a few samples. All others get one as their arguments change sizes, since a run on the meta device takes
milliseconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spindle.record.recording import leaves_of, takes_gradient, tensors_in, tree
from spindle.record.slots import Mark
from spindle.record.substitutes.draws import Draw, drawing_unseen
from spindle.record.substitutes.patching import Shared, in_place

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Made(Mark):
    """Where a tensor stands among the results of a block: its shape, type, and whether a gradient comes back for it."""

    shape: Shape
    dtype: torch.dtype
    needs_grad: bool

    def tensor(self) -> Tensor:
        """A meta tensor like it, which is no leaf, so that code may write to it."""
        made = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return made.requires_grad_().clone() if self.needs_grad else made


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a call of a block draws: the shape of each draw, and whether attention is written out for it."""

    shapes: tuple[Shape, ...] = ()
    written_out: bool = False


@dataclass(frozen=True, slots=True)
class Results:
    """What a block gives for arguments of some shapes, with Made in place of tensors."""

    structure: Any
    drawn: Drawn

    def with_gradients(self) -> "Results":
        """The same where a gradient may come back for every floating point result: other batches, or draws, may take a
        way through the block on which one does.
        """
        structure = tree(
            lambda leaf: replace(leaf, needs_grad=leaf.dtype.is_floating_point) if isinstance(leaf, Made) else leaf,
            self.structure,
        )
        return Results(structure, self.drawn)


def results_of(structure: Any, drawn: Sequence[Shape], *, written_out: bool) -> Results:
    """Results with Made in place of tensors."""
    with torch._C.DisableTorchFunction():
        made = tree(
            lambda leaf: (
                Made(tuple(leaf.shape), leaf.dtype, takes_gradient(leaf)) if isinstance(leaf, Tensor) else leaf
            ),
            structure,
        )
    return Results(made, Drawn(tuple(drawn), written_out))


def sizes_in(arguments: Any) -> list[Shape]:
    """Sizes that results may follow from: the shapes of tensors, then whole numbers, each as the one of a shape."""
    numbers = [leaf for leaf in leaves_of(arguments, int) if not isinstance(leaf, bool) and leaf >= 0]
    return [*(tuple(tensor.shape) for tensor in tensors_in(arguments)), *((number,) for number in numbers)]


Size = int | tuple[int, int, Fraction]
"""A constant; or argument, its dimension, and what multiplies its size."""


@dataclass(frozen=True)
class ShapeRule:
    """Shapes of a block's results and draws, from the shapes of its tensor arguments.

    `sizes`: for each result, then each draw, and each of its dimensions, what its size may be, best first.
    """

    structure: Any
    sizes: tuple[tuple[tuple[Size, ...], ...], ...]
    num_results: int
    written_out: bool = False

    @classmethod
    def learned(cls, known: "ShapeRule | None", found: Results, given: Sequence[Shape]) -> "ShapeRule":
        """The rule after one more run that gave `found` for arguments of shapes `given`."""
        made = leaves_of(found.structure, Made)
        shapes = [each.shape for each in made] + list(found.drawn.shapes)
        options = tuple(tuple(_options(size, given) for size in shape) for shape in shapes)
        if known is not None:
            if [len(s) for s in known.sizes] != [len(s) for s in options]:
                raise ValueError("the number of tensors, or of draws, is another one for other samples")
            options = tuple(
                tuple(tuple(option for option in old if option in new) for old, new in zip(a, b, strict=True))
                for a, b in zip(known.sizes, options, strict=True)
            )
            if any(not size for shape in options for size in shape):
                raise ValueError("sizes follow from values, and not from the sizes of its arguments")
        return cls(found.structure, options, len(made), found.drawn.written_out)

    def results(self, given: Sequence[Shape]) -> tuple[Any, tuple[Shape, ...]]:
        """Results for arguments of some shapes, with Made in place of tensors; and the shapes of draws."""
        shapes = [tuple(_size(options[0], given) for options in shape) for shape in self.sizes]
        own = iter(shapes)
        structure = tree(
            lambda leaf: Made(next(own), leaf.dtype, leaf.needs_grad) if isinstance(leaf, Made) else leaf,
            self.structure,
        )
        return structure, tuple(shapes[self.num_results :])

    def certain(self, given: Sequence[Shape]) -> Results | None:
        """Results for arguments of some shapes, where all that each size may be comes to the same; else None."""
        for shape in self.sizes:
            for options in shape:
                if len({_exact(option, given) for option in options}) != 1 or _exact(options[0], given) is None:
                    return None
        structure, drawn = self.results(given)
        return Results(structure, Drawn(drawn, self.written_out))


AGREED, CHECKED = 8, 16  # runs before a rule is used; of that many uses, one is a run


class Habit:
    """What blocks of one kind give while the sizes of their arguments change: first as runs tell, then by a rule."""

    def __init__(self) -> None:
        self._rule: ShapeRule | None = None
        self._others: list[object] = []
        self._runs, self._uses, self._is_regular = 0, 0, True

    def tell(self, given: Sequence[Shape]) -> Results | None:
        """Results for arguments of some shapes; None: run the block."""
        if not self._is_regular or self._rule is None or self._runs < AGREED:
            return None
        self._uses += 1
        return self._rule.certain(given) if self._uses % CHECKED else None

    def learn(self, found: Results, given: Sequence[Shape]) -> None:
        """Take in what a run gave; a kind that follows no rule is always run."""
        others: list[object] = []
        tree(lambda leaf: others.append(_without_sizes(leaf)), found.structure)
        try:
            self._rule = ShapeRule.learned(self._rule, found, given)
            self._is_regular &= self._runs == 0 or others == self._others
        except ValueError:
            self._is_regular = False
        self._others, self._runs = others, self._runs + 1


def _without_sizes(leaf: object) -> object:
    if isinstance(leaf, Made):
        return leaf.dtype, leaf.needs_grad
    return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf)


def _exact(option: Size, given: Sequence[Shape]) -> int | None:
    """A size; None where it would not be whole, or the arguments have no such dimension."""
    if isinstance(option, int):
        return option
    index, dim, factor = option
    if index >= len(given) or dim >= len(given[index]):
        return None
    size = given[index][dim] * factor
    return int(size) if size.denominator == 1 else None


def _options(size: int, given: Sequence[Shape]) -> tuple[Size, ...]:
    of_arguments = [
        (i, dim, Fraction(size, own)) for i, shape in enumerate(given) for dim, own in enumerate(shape) if own
    ]
    return (*sorted(of_arguments, key=lambda option: option[2] != 1), size)


def _size(option: Size, given: Sequence[Shape]) -> int:
    if isinstance(option, int):
        return option
    index, dim, factor = option
    return int(given[index][dim] * factor)


_sizes_unchecked = Shared(lambda: in_place([(F, "_verify_batch_size", lambda size: None)]))
"""Parts of a batch may have a single row, which torch's batch norm refuses."""


def run_for_real(own: Callable[..., Any], args: Any, kwargs: Any, reason: Exception | None) -> Results:
    """What a block gives for real, numbers of the model in its arguments made up. Raises what it raises.

    `reason`: why the meta device could not run it.
    """
    from spindle.record.substitutes.randomness import RealDrawing

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_meta:
            return leaf
        if not leaf.dtype.is_floating_point:
            return torch.zeros(leaf.shape, dtype=leaf.dtype)
        made = Draw("normal_", (0.0, 1.0), tuple(leaf.shape), leaf.dtype, torch.device("cpu"))
        return made.filled(generator, leaf.shape).requires_grad_(leaf.requires_grad)

    generator = torch.Generator().manual_seed(0)
    try:
        given, named = tree(real, args), tree(real, kwargs)
        drawing = RealDrawing()
        with torch.random.fork_rng(devices=[]), _sizes_unchecked:
            before = torch.get_rng_state()
            with drawing_unseen():
                structure = own(*given, **named)
            if not torch.equal(torch.get_rng_state(), before):
                with torch._C._EnableTorchFunction(), drawing:  # no mode sees other blocks: compiled code bears none
                    structure = own(*given, **named)
    except Exception as error:
        raise error from reason
    return results_of(structure, drawing.shapes, written_out=drawing.writes_out_attention)
