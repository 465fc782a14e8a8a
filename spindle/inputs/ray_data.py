"""Ray Data: a data set of Ray in, the batches of a task out, streamed anew in each pass."""

import sys
from collections.abc import Iterator
from typing import Any

from spindle.errors import WorkloadError


class RayBatches:
    """Batches of a `ray.data.Dataset`, or of the iterator of a whole one: dicts of tensors, in the data set's order.

    The data set is no attribute of a `__dict__`, so that readers share it (spindle/inputs/loaders.py): a pass
    leaves nothing in it.
    """

    __slots__ = ("_batch_size", "_dataset", "_where")

    def __init__(self, where: str, dataset: Any, batch_size: int) -> None:
        """`where`: what errors call the task."""
        self._where, self._dataset, self._batch_size = where, dataset, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import ray

        if not ray.is_initialized():  # Ray Data would start a Ray of its own
            raise WorkloadError(
                f"{self._where}: its data are a data set of Ray, which this process is not connected to; train with "
                "launcher='ray' or inside of a function of Ray Train, or give a torch DataLoader"
            )
        held = self._dataset
        context = held.context if hasattr(held, "context") else held.get_context()
        context.execution_options.preserve_order = True  # all machines, and a resumed run, must get the same batches
        yield from held.iter_torch_batches(batch_size=self._batch_size)


def batches_of(where: str, data: Any, batch_size: int) -> Any:
    """The data of a task as it is given, or the batches of it if it is a data set of Ray.

    Raises WorkloadError for a shard of one, of which each worker of Ray Train would read another.
    """
    ray_data = sys.modules.get("ray.data")
    if ray_data is None or not isinstance(data, (ray_data.Dataset, ray_data.DataIterator)):
        return data
    if hasattr(data, "world_size"):
        raise WorkloadError(
            f"{where}: its data are one of {data.world_size()} shards of a data set of Ray, and each task reads whole "
            "batches: give the trainer dataset_config=ray.train.DataConfig(datasets_to_split=[])"
        )
    return RayBatches(where, data, batch_size)
