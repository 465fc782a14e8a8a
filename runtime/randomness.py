"""Randomness: the state of torch's generators at one moment, and code run again from there."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Randomness:
    """State of the CPU generator, and of a CUDA device's when that is where a rank computes."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> "Randomness":
        """The present state."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None, device)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """While open, random numbers are those that followed this state; afterwards the present ones go on."""
        present = Randomness.now(self.device)
        self._set()
        try:
            yield
        finally:
            present._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
