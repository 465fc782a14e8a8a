"""Recorder: the mode under which a task function runs, so that calls on values of the model are recorded.

- A value is lazy when it depends on parameters: a meta tensor, or a real tensor that a lazy value was written into.
- A call without lazy arguments runs for real, so `.tolist()`, masks, grids, tokenizers all work. Any other runs on the
  meta device, which tells its result's shape, and becomes a node.
- Code that needs the number in a lazy value (`if`, `int()`, `.item()`) is refused: that number is not known here.
"""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spindle.record.functions import (
    ARITHMETIC,
    REDUCTIONS,
    UNCHECKED,
    UNSET,
    Into,
    IntoLeaf,
    SetData,
    Written,
    WrittenInLeaf,
    WrittenThroughView,
    by_rows,
    recordable,
    under_autocast,
    updated,
    without_devices,
    writes_first,
    written_by,
)
from spindle.record.lazy import (
    AS_OTHER,
    ATTRIBUTES,
    GIVES_MEMORY,
    GRADIENTS,
    OPENS_GRADIENTS,
    OTHER_DATA,
    PARTS_AT_ONCE,
    READS,
    SET_DATA,
    SETS_GRADIENTS,
    SHOWS,
    SIZES,
    CameOut,
    Forbidden,
    LazyRead,
    Refused,
    Stranger,
    any_lazy,
    covers,
    get_device,
    get_meta,
    is_lazy,
    is_meta,
    memory_of,
    refuse_modes,
    share_versions,
    sharing,
    storage_of,
)
from spindle.record.recording import Assigned, Autocast, Aux, Node, Recording, Ref, takes_gradient, tensors_in, tree
from spindle.record.replay import RealCalls
from spindle.record.sites import Sites, under_checkpoint

_CPU = torch.device("cpu")
_get_flag: Any = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class ByRows(TorchFunctionMode):
    """While open inside a Recorder, reductions of lazy values go row by row first."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace reductions over all entries; leave every other call alone."""
        kwargs = kwargs or {}
        if func in REDUCTIONS and (is_lazy(args[0]) if args else any(map(is_lazy, kwargs.values()))):
            found = by_rows(func, args, kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)


class Recorder(TorchFunctionMode):
    """One recording under way."""

    def __init__(
        self,
        recording: Recording,
        leaves: dict[int, int],
        own: Mapping[int, Tensor],
        sites: Sites,
        start: CodeType,
        real_calls: RealCalls,
    ) -> None:
        """`leaves`: value numbers of the meta parameters and buffers by id; `own`: these, by id of the user's. `start`:
        code of the function whose call is the outermost place of a site.
        """
        super().__init__()
        self.recording, self.sites, self.start, self.real_calls = recording, sites, start, real_calls
        self.own = own
        self.sources: list[Tensor] = []  # of each tensor computed from the batch that calls read, the one they read
        self.inside = False  # of a block, whose calls are not recorded
        self.for_real = False  # a block runs for its shapes, on numbers that are made up
        self.component = ""
        self.failed: tuple[Exception, str] | None = None  # what a component raised, and which call of it
        self.block = ""  # whose results are being found
        self.drawn: dict[str, Any] = {}  # what each call of a block draws
        self.autocast = self._autocast_state()
        self._number = dict(leaves)  # of each lazy tensor, by id
        self._versions: dict[int, int] = {}
        self._aux: dict[int, int] = {}
        self._meta: dict[int, Tensor] = {}
        self._updated: list[str] = []  # leaves that the call under way changes without saying so
        self.stateful: Collection[str] = ()  # names of buffers that change
        self.constants: Mapping[int, str] = {}  # buffers that are taken as such, by id
        self.read: set[str] = set()  # those of them that the task reads outside of blocks
        self.kept: Mapping[int, str] = {}  # memory of tensors that outlive the recording and are no buffers, and names
        self.written: list[Tensor] = []  # real tensors that something was written into
        self._given: set[int] = set()  # memory of real tensors that other code may write to unseen
        self.changed: list[Tensor] = []  # real tensors that calls on values of the model changed in place
        self._stands_for: dict[int, Tensor] = {}  # the real tensor in whose place each meta tensor stands, by its id
        self._tainted: dict[int, set[int]] = {}  # memory that lazy values were written into: tensors known since
        self._leaf_by_storage: dict[int, Tensor] = {}  # of meta parameters and buffers
        self._in_checkpoint = False
        self._kept: list[Any] = []  # so that no id is used twice
        self._touched: dict[int, Tensor] = {}  # leaves among the arguments of the call under way, by number

    # -- calls ----------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a call for real, or on the meta device and record it."""
        kwargs = kwargs or {}
        if func is get_device or func == get_device:
            found = func(*args)
            return _CPU if found.type == "meta" else found
        if func == get_meta:
            return False
        if func in ATTRIBUTES:
            if func in SIZES and not self.inside:
                self.real_calls.measured(args)
            return func(*args, **kwargs)
        if func in GRADIENTS and isinstance(args[0], nn.Parameter):
            self._refuse_gradient_of(args[0])
        if func in SETS_GRADIENTS:
            self._refuse_other_flag(args, kwargs)
        if func in UNSET:  # its numbers are whatever memory holds: other ones in each call
            func, kwargs = UNSET[func], {name: value for name, value in kwargs.items() if name != "memory_format"}
        if not self.inside and self._holds_own((*args, *kwargs.values())):
            args, kwargs = tree(self._as_leaf, args), tree(self._as_leaf, kwargs)
        tainted = bool(self._tainted) and self._touches_tainted((*args, *kwargs.values()))
        if not (tainted or any_lazy(args) or any_lazy(kwargs.values())):
            self._refuse_strangers(args)
            return self._real(func, args, kwargs)
        if func in AS_OTHER and not tainted and not is_meta(args[0]):
            return self._real(AS_OTHER[func], (args[0], *args[1].shape), {})
        if func in READS:
            raise LazyRead(self._buffer_behind(args[0]))
        if func in SHOWS:
            return f"<value of the model, shape {tuple(args[0].shape)}>"
        if func in OPENS_GRADIENTS:
            raise Refused(
                f"it calls {getattr(func, '__name__', func)} on a value of the model; return the loss, its gradients "
                "are computed and reduced as planned"
            )
        refuse_modes(inside=self.inside)
        if func in (Tensor.cuda, Tensor.cpu) or (func is Tensor.to and len(args) == 1 and not kwargs):
            return args[0]
        return self._lazy(func, args, kwargs)

    def _holds_own(self, values: Iterable[Any]) -> bool:
        """Whether code has kept hold of the user's own parameters, in whose place meta ones stand in the modules.

        Notes on the way which buffers are read that are taken as constants.
        """
        found = False
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self.constants:
                    self.read.add(self.constants[id(value)])
                found |= id(value) in self.own and not get_meta(value)
            elif type(value) in (list, tuple):
                found |= self._holds_own(value)
        return found

    def _as_leaf(self, value: Any) -> Any:
        return self.own.get(id(value), value) if isinstance(value, Tensor) else value

    def real(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A call for real that no mode sees."""
        with torch._C.DisableTorchFunction():
            return self._real(func, args, {})

    def _real(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for value in written_by(func, args, kwargs):
            self.written.append(value)
            if self.kept and func in ARITHMETIC:
                self._refuse_kept(value)
            self._given |= {memory_of(value)} & self.kept.keys()  # the next recording may write there again
            self._keep_as_read(value)
        if func in GIVES_MEMORY:
            self._keep_as_read(args[0])
            self._given.add(memory_of(args[0]))
        result = func(*args, **kwargs)
        if not self.inside:
            if self._autocast_state() != self.autocast:
                self.real_calls.sound = False
            self.real_calls.note(func, args, kwargs, result)
        return result

    def _run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._real(func, args, kwargs)

    def _lazy(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func, args, kwargs = without_devices(func, args, kwargs)
        if func is Tensor.to and len(args) == 1 and not kwargs:
            return args[0]
        if self.inside:
            func, args, kwargs = recordable(func, args, kwargs, is_meta, self._run)
            return self._on_meta(func, args, kwargs)
        self._refuse_strangers(args)
        if func == SET_DATA:
            return self._set_data(*args)
        func, args, kwargs = recordable(func, args, kwargs, is_meta, self._run)
        if writes_first(func, args, kwargs) and args and self._is_alias(args[0]):
            return self._write_leaf(func, args, kwargs)
        out, plain = kwargs.pop("out", None), func
        if out is not None:
            func, args = Into(func), (out, *args)
        encoded = tree(self.encoded, args), tree(self.encoded, kwargs)  # as they are before the call
        result = self._on_meta(func, args, kwargs)
        self._note_changed(updated(func, args, kwargs))
        if out is not None and self._number.get(id(out)) in self.recording.leaves:
            self._touched.clear()
            self._add(IntoLeaf(plain), *encoded, [-1], writes=(self._name(out),))
            return out
        if out is not None:
            self._refuse_kept(out)
            self._renew(out)
            self._taint(out)
            self._add(func, *encoded, [self._new(out)])
            return out
        return self.record(func, args, encoded, result)

    def _is_alias(self, value: Any) -> bool:
        """Whether a tensor is no parameter or buffer but lies in the memory of one; or several are written at once,
        whose versions need not tell of it.
        """
        if type(value) in (list, tuple):
            return any(is_meta(each) and self._leaf_of(each) is not None for each in value)
        leaf = self._leaf_of(value) if isinstance(value, Tensor) and is_meta(value) else None
        return leaf is not None and leaf is not value

    def _leaf_of(self, value: Tensor) -> Tensor | None:
        """The parameter or buffer in whose memory a meta tensor lies."""
        if not self._leaf_by_storage:
            self._leaf_by_storage = {storage_of(leaf): leaf for leaf in self.own.values()}
        return self._leaf_by_storage.get(storage_of(value))

    def _write_leaf(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A write to memory of parameters or buffers, through views of them or what `.data` and `.detach()` give."""
        given = args[0]
        if type(given) in (list, tuple):
            leaves = [self._whole_leaf(each) for each in given]
            first: Any = leaves
        else:
            leaf = self._leaf_of(given)
            assert leaf is not None
            if not covers(given, leaf):
                func = WrittenInLeaf(func, given)
            leaves, first = [leaf], leaf
        with torch.no_grad():
            encoded = tree(self.encoded, (first, *args[1:])), tree(self.encoded, kwargs)
            names = tuple(map(self._name, leaves))
            unnoticed = not all(map(share_versions, given if type(given) in (list, tuple) else [given], leaves))
            self._on_meta(func, (first, *args[1:]), kwargs)
            self._touched.clear()
            self._versions.update({self._number[id(leaf)]: leaf._version for leaf in leaves})
            outs = [-1] if isinstance(first, Tensor) and func is not Tensor.__setitem__ else []  # which gives None
            self._add(func, *encoded, outs, writes=names, unnoticed=unnoticed)
        return given

    def _whole_leaf(self, value: Tensor) -> Tensor:
        leaf = self._leaf_of(value)
        if leaf is None or not covers(value, leaf):
            raise Refused(PARTS_AT_ONCE)
        return leaf

    def _set_data(self, of: Tensor, value: Tensor) -> None:
        """`tensor.data = value`."""
        leaf = self._leaf_of(of) if is_meta(of) else None
        if leaf is not of or tuple(of.shape) != tuple(value.shape):
            if not is_meta(of):
                self.written.append(of)  # a buffer, say, that was taken as a constant
                return
            raise Refused(OTHER_DATA)
        other = self._leaf_of(value) if is_meta(value) else None
        if other is not None and other is not of:
            raise sharing(self._name(leaf), self._name(other))
        if not (other is of and covers(value, of)):  # else p.data *= 2, which has written there
            encoded = self.encoded(of), self.encoded(value)
            self._add(SetData(), encoded, {}, [], writes=(self._name(leaf),), unnoticed=True)

    def _name(self, leaf: Tensor) -> str:
        return self.recording.leaves[self._number[id(leaf)]]

    def _on_meta(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, named = under_autocast(func, tree(self.as_meta, args), tree(self.as_meta, kwargs))
        return UNCHECKED.get(func, func)(*given, **named)

    def record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        encoded: tuple[Any, Any],
        result: Any,
        block: str = "",
        changes: tuple[str, ...] = (),
    ) -> Any:
        """Note a call that gave `result` on the meta device; what the user's code gets of it. `changes`: buffers that a
        block is known to change.
        """
        writes = (*self._written_leaves(), *changes)
        if writes or block or not writes_first(func, args, encoded[1]):
            outs = [self._out(tensor) for tensor in tensors_in(result)]
            known = not writes and not block and all(not fresh for _, fresh in outs)
            if known or not (outs or writes or block):  # it gave what it got, or sizes and the like
                return result
            self._add(func, *encoded, [n if fresh else -1 for n, fresh in outs], block=block, writes=writes)
            return result
        return self._record_write(func, args, encoded)

    def _record_write(self, func: Callable[..., Any], args: tuple[Any, ...], encoded: tuple[Any, Any]) -> Any:
        """A call that wrote to its first argument: a new value for it, and for the tensor that it is a view of."""
        x, (given, named) = args[0], encoded
        base = x._base
        if base is not None and is_meta(x):
            base = self._stands_for.get(id(base), base)
        if base is not None and (id(base) in self._number or not is_meta(base)):
            place = WrittenThroughView(func, x)
            source = Ref(self._number[id(base)]) if id(base) in self._number else self.encoded(base)
            self._add(place, (source, *given[1:]), named, [self._new(base), self._new(x)])
        else:
            base = x
            self._add(Written(func), given, named, [self._new(x)])
        if not is_meta(base):
            self._refuse_kept(base)
            self._taint(base, x)
        return x

    def _add(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        outs: list[int],
        *,
        block: str = "",
        writes: tuple[str, ...] = (),
        draws: bool = False,
        unnoticed: bool = False,
    ) -> None:
        if writes and (self._in_checkpoint or under_checkpoint()):
            raise Refused(
                f"{writes[0]!r} changes under a checkpoint of the model's own, which one process runs twice; switch "
                "that off (gradient_checkpointing_disable()) and name the component in the workload's recompute="
            )
        state = self._autocast_state()
        site = self.sites.here(self.start)
        self.recording.nodes.append(
            Node(
                func,
                args,
                kwargs,
                outs,
                site,
                component=self.component,
                grad=torch.is_grad_enabled(),
                block=block,
                autocast=None if state == self.autocast else state,
                writes=writes,
                draws=draws,
                line=self.sites.lines[site],
                unnoticed=unnoticed,
            )
        )

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        """While open, code runs that one process runs again in backward."""
        before, self._in_checkpoint = self._in_checkpoint, torch.is_grad_enabled()
        try:
            yield
        finally:
            self._in_checkpoint = before

    def note_assigned(self, name: str, buffer: Tensor, value: Tensor) -> None:
        """Note that a tensor was put in the place of a buffer: a call that stands where the function of the task ends.

        Its place in the code is the buffer's name, which is the same in every process.
        """
        args = (self.encoded(buffer), self.encoded(value))
        maker = self.recording.makers().get(args[1].index) if isinstance(args[1], Ref) else None
        node = Node(
            Assigned(),
            args,
            {},
            [],
            int.from_bytes(hashlib.blake2b(f"assign {name}".encode(), digest_size=7).digest()),
            component="" if maker is None else self.recording.nodes[maker].component,
            writes=(name,),
            line="" if maker is None else self.recording.nodes[maker].line,
        )
        self.recording.nodes.append(node)

    def draw(self, function: Callable[..., Tensor], like: Tensor, result: Tensor) -> Tensor:
        """Note a draw on the device of a lazy value: `function(like)` gives numbers of the shape of `result`."""
        self._add(function, (self.encoded(like),), {}, [self._new(result)], draws=True)
        return result

    @staticmethod
    def _autocast_state() -> Autocast:
        return Autocast(torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))

    # -- values ---------------------------------------------------------------------------------------------------

    def known(self, value: Tensor) -> int:
        """The number of a lazy tensor. Raises Refused where it came from nowhere."""
        found = self.encoded(value)
        return found.index if isinstance(found, Ref) else -1

    def _buffer_behind(self, value: object) -> str:
        """The buffer that a lazy tensor follows from; "" where it follows from parameters or layers too."""
        number = self._number.get(id(value))
        return "" if number is None else self.recording.buffer_behind(number, self.stateful)

    def number(self, value: Tensor) -> int | None:
        """The number of a lazy tensor as it is now."""
        return self._number.get(id(value))

    def _new(self, value: Tensor) -> int:
        recording = self.recording
        number = len(recording.shapes)
        self._number[id(value)], self._versions[number] = number, value._version
        self._kept.append(value)
        recording.shapes.append(tuple(value.shape))
        recording.dtypes.append(value.dtype)
        recording.needs_grad.append(takes_gradient(self._meta.get(id(value), value)))
        return number

    def _out(self, value: Tensor) -> tuple[int, bool]:
        """The number of a result, and whether it is a new one: a call may give what it got."""
        known = self._number.get(id(value))
        return (self._new(value), True) if known is None else (known, False)

    def encoded(self, value: Any) -> Any:
        """A leaf of a call's arguments as it is recorded."""
        if not isinstance(value, Tensor):
            return value
        number = self._number.get(id(value))
        if number in self.recording.leaves:
            self._touched[number] = value
            self._versions.setdefault(number, value._version)
        elif number is not None and self._versions.get(number, value._version) != value._version:
            raise Refused(
                "a tensor is read after its memory was written to through another view of it; write to a clone"
            )
        if number is not None:
            return Ref(number)
        if is_meta(value):
            raise CameOut
        if id(value) not in self._aux or memory_of(value) in self._given:
            self._aux[id(value)] = len(self.recording.aux)
            given = memory_of(value) in self._given
            self.recording.aux.append(value.detach().clone() if given else value.detach())
            self.sources.append(value)
            self._kept.append(value)
        return Aux(self._aux[id(value)])

    def as_meta(self, value: Any) -> Any:
        """A leaf of a call's arguments as a meta tensor."""
        if not isinstance(value, Tensor) or get_meta(value):
            return value
        found = self._meta.get(id(value))
        if found is None:
            found = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            found.requires_grad_(value.requires_grad)
            self._meta[id(value)], self._stands_for[id(found)] = found, value
            self._kept.append(value)
        return found

    def _note_changed(self, values: Iterable[Tensor]) -> None:
        """Note tensors that the last call changes in place, as batch norm does its running statistics."""
        for value in values:
            number = self._number.get(id(value))
            if number in self.recording.leaves:
                self._updated.append(self.recording.leaves[number])
            else:
                self.changed.append(value)

    def _refuse_kept(self, value: Any) -> None:
        """A tensor that outlives the batch and is no buffer would be changed once a recording, not once a step."""
        name = self.kept.get(memory_of(value)) if isinstance(value, Tensor) else None
        if name is not None:
            raise Refused(
                f"tensor {name!r} is changed in place and is no buffer, so that no plan can follow it; make it a "
                "buffer that __init__ of a registered module registers"
            )

    def _renew(self, value: Tensor) -> None:
        self._meta.pop(id(value), None)

    def _taint(self, value: Tensor, *others: Tensor) -> None:
        """Of all tensors that share its memory, what these hold is known from here on."""
        self.written.append(value)
        self._tainted[memory_of(value)] = {id(value), *(id(other) for other in others)}
        self._kept += (value, *others)

    def _touches_tainted(self, values: Iterable[Any]) -> bool:
        found = False
        for value in values:
            if isinstance(value, Tensor):
                known = self._tainted.get(memory_of(value))
                if known is not None and id(value) not in known:
                    raise Refused(
                        "a view of a tensor is read after a value of the model was written into that tensor; write to "
                        "a clone"
                    )
                found |= known is not None
            elif type(value) in (list, tuple):
                found |= self._touches_tainted(value)
        return found

    def _keep_as_read(self, value: Tensor) -> None:
        """Before a real tensor changes: what calls have read of its memory becomes a copy."""
        memory = memory_of(value)
        read = [n for n, tensor in enumerate(self.recording.aux) if memory and memory_of(tensor) == memory]
        for number in read:
            self.recording.aux[number] = self.recording.aux[number].clone()
            self.real_calls.sound = False
        self._aux = {key: number for key, number in self._aux.items() if number not in read}

    def _written_leaves(self) -> tuple[str, ...]:
        """Parameters and buffers that the last call changed in place."""
        found, self._updated = self._updated, []
        for number, tensor in self._touched.items():
            if tensor._version != self._versions[number]:
                self._versions[number] = tensor._version
                found.append(self.recording.leaves[number])
        self._touched.clear()
        return tuple(found)

    @staticmethod
    def _refuse_gradient_of(parameter: nn.Parameter) -> None:
        """Raise Forbidden where code asks for the gradient that a trained parameter holds."""
        with torch._C.DisableTorchFunction():
            trained = parameter.requires_grad
        if trained:
            raise Forbidden(
                "it reads or changes gradients of parameters (p.grad; by zero_grad, clip_grad_norm_ or an optimizer, "
                "say), which a planned step has only when all its tasks are done; leave that out: each step begins "
                "without gradients, and max_grad_norm= of the workload clips them"
            )

    def _refuse_other_flag(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise Forbidden where code freezes or thaws a parameter."""
        number = self._number.get(id(args[0]))
        flag = bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
        if number in self.recording.leaves and flag != bool(_get_flag(args[0])):
            raise Forbidden(
                f"it sets requires_grad of {self.recording.leaves[number]!r}; freeze parameters before the workload is "
                "planned, and call a layer that one task does not train, but another does, under torch.no_grad()"
            )

    def _refuse_strangers(self, args: Iterable[Any]) -> None:
        if not torch.is_grad_enabled():
            return
        for value in args:
            if isinstance(value, nn.Parameter) and value.requires_grad and not get_meta(value):
                raise Stranger(" x ".join(map(str, value.shape)) or "one number")
