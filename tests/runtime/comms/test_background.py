"""Threads beside the work: the end of Python finds none of them in native code."""

import subprocess
import sys

import pytest
import torch

from spindle.runtime.comms.host import threads_of_rank
from spindle.runtime.comms.transport import ThreadTransport
from tests.threads import computing_with

SCRIPT = """
import sys, threading
from torch._C._distributed_c10d import TCPStore
from spindle.runtime.comms.background import start_thread

server = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
store = TCPStore("127.0.0.1", server.port, None, is_master=False)
begun, ended = threading.Event(), threading.Event()

def work():
    while not ended.is_set():
        store.set("key", "value")  # nearly always without Python's lock
        begun.set()

if sys.argv[1] == "waited for":
    start_thread(work, "background", end=ended.set)
else:
    threading.Thread(target=work, daemon=True).start()
begun.wait(30)
"""


@pytest.mark.parametrize(("how", "fails"), [("waited for", False), ("left", sys.version_info < (3, 14))])
def test_the_end_of_python(how: str, fails: bool) -> None:
    """A thread that is left in native code takes the process down (until Python 3.14), so the test would see it."""
    done = [
        subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, timeout=120, check=False)
        for _ in range(3)
    ]
    assert any(run.returncode for run in done) == fails, done


def test_threads_that_do_not_return_are_left() -> None:
    """The end of Python waits for a while."""
    script = (
        "import threading; from spindle.runtime.comms.background import start_thread\n"
        "start_thread(threading.Event().wait, 'stuck', end=lambda: None, patience_s=0.1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == 0


def test_closing_gives_torch_its_threads_back() -> None:
    """Whoever trains in a process goes on in it as before."""
    with computing_with(3):
        transports = ThreadTransport.connect(2)
        torch.set_num_threads(threads_of_rank(2))
        for transport in transports:
            transport.close()
        assert torch.get_num_threads() == 3
