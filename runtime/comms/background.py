"""Background: threads beside the work, which Python waits for at its end."""

import threading
import weakref
from collections.abc import Callable

END_S = 5.0  # that the end of Python waits for such a thread: a loader may never come back


def start_thread(
    work: Callable[[], object], name: str, *, end: Callable[[], object], patience_s: float = END_S
) -> threading.Thread:
    """Run `work` in a thread that does not keep Python alive. `end` tells it to return; Python's end calls it and waits
    for the thread up to `patience_s`.

    A thread inside native code when Python ends takes the process down with it: it wants Python's lock back, is ended
    in its place, and C++ answers "terminate called without an active exception" (SIGABRT): a run that succeeded fails.
    """
    thread = threading.Thread(target=work, daemon=True, name=name)
    found = weakref.ref(thread)

    def leave() -> None:
        alive = found()
        if alive is not None and alive is not threading.current_thread() and alive.is_alive():
            end()
            alive.join(patience_s)

    weakref.finalize(thread, leave)  # which runs at the end of Python too
    thread.start()
    return thread
