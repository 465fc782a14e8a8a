"""Machines: which ranks run on one machine, and sockets between them there.

- Sockets have names while ranks find each other, and none afterwards: nothing is left behind by a rank that dies later.
- Names stand in a directory that only this user may enter.
"""

import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Set
from multiprocessing.util import get_temp_dir
from pathlib import Path

from spindle.errors import RunError

LONGEST_PATH = 80  # of a directory in which a socket gets a name; systems allow about a hundred characters in all

_HELLO = struct.Struct("<II")

Caller = tuple[int, int]
"""Who calls: a rank, and a number that tells which of its calls it is."""


def machine() -> str:
    """A name that is equal for processes that reach each other's sockets: one system, one temporary directory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    system = boot.read_text().strip() if boot.exists() else socket.gethostname()
    directory = os.stat(_directory())
    return f"{system}/{directory.st_dev}/{directory.st_ino}"


def _directory() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) < LONGEST_PATH else "/tmp"


class Door:
    """Where other ranks of this machine reach this one, as long as it is entered."""

    def __init__(self, timeout_s: float) -> None:
        """Nobody waits longer than `timeout_s`."""
        self.timeout_s = timeout_s
        own = get_temp_dir()  # which goes with the rank, or with its group, though the rank is killed meanwhile
        self._room = tempfile.mkdtemp(prefix="spindle-", dir=own if len(own) < LONGEST_PATH else _directory())
        self.address = f"{self._room}/door"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._socket.bind(self.address)
        self._socket.listen(1024)

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        shutil.rmtree(self._room, ignore_errors=True)

    def let_in(self, expected: Set[Caller]) -> dict[Caller, socket.socket]:
        """Sockets to all of these. Raises RunError naming the ranks that do not come in time."""
        found: dict[Caller, socket.socket] = {}
        while expected - found.keys():
            try:
                end, _ = self._socket.accept()
                end.settimeout(self.timeout_s)
                hello = end.recv(_HELLO.size, socket.MSG_WAITALL)
            except OSError as error:
                ranks = sorted({rank for rank, _ in expected - found.keys()})
                raise RunError(
                    f"ranks {ranks} did not come within {self.timeout_s:g} s for the batches that this rank reads"
                ) from error
            end.settimeout(None)
            found[_HELLO.unpack(hello)] = end
        return found


def called(address: str, caller: Caller, timeout_s: float) -> socket.socket:
    """A socket to the rank with this address, which gets the caller's name. Raises RunError when it is not reached."""
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(timeout_s)
    try:
        end.connect(address)
        end.sendall(_HELLO.pack(*caller))
    except OSError as error:
        end.close()
        raise RunError(f"a rank of this machine was not reached at {address}: {error}") from error
    end.settimeout(None)
    return end
