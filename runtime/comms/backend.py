"""Backend: which GPU each rank has to itself, agreed upon by all ranks before they join: NCCL where each has one, else
gloo on CPUs everywhere.
"""

import warnings
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Store

from spindle.errors import LostPeerError, SpindleWarning


def own_gpu(place: tuple[int, int], gpus: Sequence[int]) -> torch.device | None:
    """The GPU that a rank takes, of those with these numbers; None where they are too few for one each. A single one is
    taken all the same: launchers such as Slurm show each process its own, and `agreed_gpu` finds out.
    """
    number, num_ranks = place
    if len(gpus) == 1:
        return torch.device("cuda", gpus[0])
    return torch.device("cuda", gpus[number]) if num_ranks <= len(gpus) else None


def agreed_gpu(
    store: Store, rank: int, num_ranks: int, own: torch.device | None, own_id: str, timeout_s: float
) -> torch.device | None:
    """`own` where every rank has a GPU that no other rank has, else None, on all ranks alike. `own_id`: what tells the
    GPU from all others, of any machine. All ranks call it together.
    """
    store.set(f"gpu/{rank}", own_id if own is not None else "")
    keys = [f"gpu/{other}" for other in range(num_ranks)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise LostPeerError(
            f"not all {num_ranks} ranks came within {timeout_s:g} s to say which GPU they have"
        ) from error
    ids = [store.get(key).decode() for key in keys]
    without = [other for other, each in enumerate(ids) if not each]
    shared = [other for other, each in enumerate(ids) if each and ids.count(each) > 1]
    if not without and not shared:
        return own
    if own is not None:
        which = f"rank {without[0]} has none" if without else f"ranks {shared[0]} and {shared[1]} have the same one"
        warnings.warn(
            SpindleWarning(
                f"rank {rank} computes on the CPU though it has a GPU, since not every rank has one of its own "
                f"({which}); start as many ranks as there are GPUs, and show each machine's to its ranks"
            ),
            stacklevel=2,
        )
    return None
