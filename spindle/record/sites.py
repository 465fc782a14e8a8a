"""Sites: the place in code that a call was made from, as one number that is equal in every process and every step."""

import dis
import hashlib
import os
import sys
from types import CodeType, FrameType

import torch

_PACKAGE = __name__.rpartition(".")[0]
_SKIPPED = frozenset(f"{_PACKAGE}.{module}" for module in ("patches", "recorder", "replay", "run", "sites", "skeleton"))
"""Modules that pass calls on. Modules that make calls of their own (functions, replacements) are places like others."""


class Sites:
    """Numbers places: the chain of (file, function, instruction) from the call up to the start of the recording."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[CodeType, str]] = {}  # by id of the code, which is kept so that ids stay
        self._numbers: dict[tuple[int, ...], int] = {}
        self.lines: dict[int, str] = {}
        """Of each place the innermost line that is not torch's, as "line 12 of model.py"."""

    def here(self, start: CodeType) -> int:
        """The place of the call under way, up to the function whose code is `start`."""
        frame: FrameType | None = sys._getframe(1)
        key: list[int] = []
        codes: list[CodeType] = []
        while frame is not None and frame.f_code is not start:
            code = frame.f_code
            if frame.f_globals.get("__name__", "") not in _SKIPPED:
                key += (id(code), frame.f_lasti)
                codes.append(code)
            frame = frame.f_back
        found = self._numbers.get(tuple(key))
        if found is None:
            texts = [f"{self._text(code)}:{_settled(code, at)}" for code, at in zip(codes, key[1::2], strict=True)]
            found = int.from_bytes(hashlib.blake2b("\n".join(texts).encode(), digest_size=7).digest())
            self._numbers[tuple(key)] = found
            self.lines[found] = innermost_line(start)
        return found

    def _text(self, code: CodeType) -> str:
        if id(code) not in self._texts:
            name = os.path.basename(code.co_filename)
            self._texts[id(code)] = (code, f"{name}:{code.co_qualname}:{code.co_firstlineno}")
        return self._texts[id(code)][1]


def _settled(code: CodeType, at: int) -> int:
    """Where a call stands. Python 3.11 calls by two instructions, PRECALL and CALL (four bytes on), and by the first
    alone once it has seen what is called a few times.
    """
    return at + 4 if code.co_code[at] == dis.opmap.get("PRECALL") else at


def innermost_line(start: CodeType | None = None) -> str:
    """The innermost line under way that is neither torch's nor ours, up to the function whose code is `start`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not start:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", _PACKAGE.partition(".")[0]):
            return f"line {frame.f_lineno} of {os.path.basename(frame.f_code.co_filename)}"
        frame = frame.f_back
    return ""


def under_checkpoint() -> bool:
    """Whether a checkpoint of torch runs the code at hand, which we did not see begin."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == torch.utils.checkpoint.__name__
