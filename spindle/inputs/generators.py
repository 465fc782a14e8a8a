"""Generators of random numbers: their states as plain values, and copies of them."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Random = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def everyones() -> tuple[Any, ...]:
    """The generators of the process, of which each reader has states of its own: see runtime/loading/data.py."""
    python: Any = random.shuffle
    return python.__self__, torch.default_generator, np.random.mtrand._rand


def cloned(generator: Random) -> Random:
    """A generator that draws the same numbers from here on. Raises what it raises where it has no state."""
    state = state_of(generator)
    if isinstance(generator, torch.Generator):
        copy: Random = torch.Generator(device=generator.device)
    elif isinstance(generator, random.Random):
        copy = type(generator)()
    else:
        bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator._bit_generator
        copy = type(generator)(type(bits)())
    set_state(copy, state)
    return copy


def state_of(generator: Random) -> Any:
    """As plain values and tensors, which load without unpickling code."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _mapped(generator.get_state(legacy=False), lambda one: torch.from_numpy(one.astype(np.int64)))
    return _mapped(generator.bit_generator.state, _of_words)


def set_state(generator: Random, state: Any) -> None:
    """Put a generator where `state_of` found one of its kind."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_mapped(state, lambda one: one.numpy().astype(np.uint32)))
    else:
        generator.bit_generator.state = _mapped(state, lambda one: one.numpy().view(np.uint64))


def _of_words(words: "np.ndarray[Any, Any]") -> Tensor:
    return torch.from_numpy(words.astype(np.uint64).view(np.int64))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A state with its arrays, or tensors, changed."""
    if isinstance(value, Mapping):
        return {name: _mapped(one, change) for name, one in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        return change(value)
    return value.item() if isinstance(value, np.generic) else value
