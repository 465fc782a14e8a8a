"""A transport that is as late as one between GPUs may be: what is used before it was waited for is wrong.

- What is to be received holds NaN until it is waited for; a send reads its buffer only then.
- A sum, and what is gathered, holds NaN from its start until it is waited for.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from spindle.errors import RunError
from spindle.runtime.comms.transport import Post, ThreadTransport, Wait
from spindle.runtime.launch import worker_group as workers


class LateTransport(ThreadTransport):
    """Ranks as threads, each message as late as its waits allow."""

    def start(self, sends: Sequence[Post], receives: Sequence[Post]) -> tuple[Wait, Wait]:
        """The mail holds the tensors themselves until they are received."""
        shared, keys = self._shared, []
        with shared.changed:
            for peer, tensor in sends:
                keys.append((self.rank, peer, self._sent[peer]))
                shared.mail[keys[-1]] = tensor
                self._sent[peer] += 1
            shared.changed.notify_all()
        for _, tensor in receives:
            spoil(tensor)
        _, arrive = super().start([], receives)

        def depart() -> None:
            with shared.changed:
                if not shared.changed.wait_for(
                    lambda: shared.gone or not any(key in shared.mail for key in keys), self._timeout_s
                ):
                    raise RunError(f"nobody took what rank {self.rank} sent")

        return depart, arrive

    def _receive(self, peer: int, number: int, tensor: Tensor) -> None:
        key, shared = (peer, self.rank, number), self._shared
        with shared.changed:
            shared.changed.wait_for(lambda: key in shared.mail or shared.gone, self._timeout_s)
            if key not in shared.mail:
                raise RunError(f"nothing arrived from rank {peer}: {self._why()}")
            tensor.copy_(shared.mail[key])
            del shared.mail[key]
            shared.changed.notify_all()

    def _together(
        self,
        values: Tensor,
        place: Tensor,
        ranks: tuple[int, ...],
        made_of: Callable[[list[Tensor]], Tensor],
    ) -> Wait:
        arrive = super()._together(values, place, ranks, made_of)
        spoil(place)
        return arrive


def spoil(tensor: Tensor) -> None:
    """What nobody may read yet."""
    with torch.no_grad():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


@contextlib.contextmanager
def late() -> Iterator[None]:
    """While open, ranks that are threads talk through late transports."""
    with mock.patch.object(workers, "ThreadTransport", LateTransport):
        yield
