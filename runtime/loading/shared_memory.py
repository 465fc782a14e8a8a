"""Shared memory: a value in, the descriptor of memory that holds it out; and back, in any process of this machine.

- The memory has no name. It is gone with the last process that holds it, however that ends, and a small /dev/shm, as
  containers have, does not limit it.
- Tensors stand in it as they are, wherever in the value they are; so do large buffers of numpy arrays. The rest is
  pickled beside them.
- What comes out may be written to: a page is copied on the first write, so that no other process sees it.
"""

import io
import mmap
import os
import pickle
import struct
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import cloudpickle
import torch
from torch import Tensor

ALIGNMENT = 64
SMALL_BYTES = 16 * 2**10  # copied out: what is kept for long, such as a state, keeps no batch in memory
WRITE_BYTES = 2**30  # at once; systems refuse, or cut, more than 2 GiB

_END = struct.Struct("<QQQ")  # where the pickle begins and ends; how many entries of the table follow it
_ENTRY = struct.Struct("<QQ")  # where a buffer begins and ends


def packed(value: object) -> int:
    """The descriptor of shared memory that holds a copy of `value`; to be closed by the caller."""
    body = io.BytesIO()
    packer = _Packer(body)
    try:
        packer.dump(value)
        begin = packer.place(body.getbuffer())
        table = b"".join(_ENTRY.pack(*entry) for entry in packer.buffers)
        end = begin + len(body.getbuffer())
        packer.place(table + _END.pack(begin, end, len(packer.buffers)), at=end)
        return _written(packer.contents)
    finally:
        packer.forget()


def unpacked(descriptor: int) -> Any:
    """The value that was packed. Closes the descriptor; the memory lives as long as a tensor of the value does."""
    try:
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    begin, end, count = _END.unpack_from(memory, len(memory) - _END.size)
    entries = [_ENTRY.unpack_from(memory, end + index * _ENTRY.size) for index in range(count)]
    view = memoryview(memory)
    return _Unpacker(view[begin:end], memory, [view[start:stop] for start, stop in entries]).load()


class _Place(NamedTuple):
    """A tensor in shared memory: its first byte, and what else makes it. `number` is equal for one and the same."""

    number: int
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles a value and finds a place for its tensors and buffers; `contents` are to be written."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=self._buffer)
        self.contents: list[tuple[int, Any]] = []
        self.buffers: list[tuple[int, int]] = []
        self._size = 0
        self._placed: dict[int, tuple[Tensor, _Place]] = {}  # with the tensor, so that no other gets its id

    def place(self, data: Any, *, at: int | None = None) -> int:
        """Where these bytes will stand: behind all others, aligned, or at a given place."""
        start = -(-self._size // ALIGNMENT) * ALIGNMENT if at is None else at
        self._size = start + len(data)
        self.contents.append((start, data))
        return start

    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        """A place for a tensor; None for what is pickled, which are tensors of other classes and layouts too."""
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.is_nested or obj.is_quantized:
            return None
        if obj.requires_grad or obj.device.type == "meta":
            return None
        if id(obj) not in self._placed:
            dense = _dense(obj)
            data = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data
            found = _Place(
                number=len(self._placed),
                start=self.place(data),
                shape=tuple(obj.shape),
                stride=dense.stride(),
                dtype=obj.dtype,
                device=obj.device.type,
            )
            self._placed[id(obj)] = obj, found
        return tuple(self._placed[id(obj)][1])

    def forget(self) -> None:
        """Let go of the value: picklers are part of cycles, which Python frees late."""
        self.contents.clear()
        self._placed.clear()
        self.clear_memo()

    def _buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether a buffer is to be pickled with the rest, being small."""
        data = buffer.raw()
        if data.nbytes < SMALL_BYTES:
            return True
        start = self.place(data)
        self.buffers.append((start, start + data.nbytes))
        return False


class _Unpacker(pickle.Unpickler):
    """Makes the value anew, its tensors and buffers on top of the memory."""

    def __init__(self, pickled: memoryview, memory: mmap.mmap, buffers: Sequence[memoryview]) -> None:
        super().__init__(io.BytesIO(pickled), buffers=iter(buffers))
        self._memory = memory
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, pid: tuple[Any, ...]) -> Tensor:
        """The tensor of a place."""
        place = _Place(*pid)
        if place.number not in self._made:
            self._made[place.number] = self._tensor(place)
        return self._made[place.number]

    def _tensor(self, place: _Place) -> Tensor:
        made = torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device="meta")
        size = made.numel() * made.element_size()
        if size == 0:
            return torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device=place.device)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=place.start)
        found = flat.view(place.dtype).as_strided(place.shape, place.stride)
        if place.device != "cpu":
            return found.to(place.device)
        return found.clone() if size < SMALL_BYTES else found


def _dense(tensor: Tensor) -> Tensor:
    """The tensor on the CPU without gaps or overlaps between its entries, in the order in which they lie in memory."""
    dense = tensor.resolve_conj().resolve_neg().cpu()
    return dense if dense.stride() == torch.empty_like(dense, device="meta").stride() else dense.clone()


def _memory() -> int:
    """The descriptor of new memory without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("spindle-batch", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # without a name too, where there is no memory file
        return os.dup(file.fileno())


def _written(contents: Sequence[tuple[int, Any]]) -> int:
    """The descriptor of new memory with these contents."""
    descriptor = _memory()
    try:
        for start, data in contents:
            _write(descriptor, data, start)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write(descriptor: int, data: Any, start: int) -> None:
    """Write all of it; this takes no page faults as a write to mapped memory would."""
    view, done = memoryview(data).cast("B"), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + WRITE_BYTES], start + done)
