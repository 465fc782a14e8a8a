"""Jobs: runs on a Ray cluster that is somewhere else, by way of its dashboard: submit, follow, stop.

- Nothing here waits without an end: requests have a timeout, and while a log is quiet the job's state is asked for.
- A log is shown once and whole: after a dropped connection what has been shown already is skipped.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientError, ClientSession, ClientWSTimeout, WSCloseCode, WSMsgType
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from spindle.errors import ClusterError, FormatError, RunError, SpindleError

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
REQUEST_S = 10.0
UPLOAD_S = 120.0
QUIET_S = 5.0  # of a log before its job is asked for
RETRY_S = 0.5
PATIENCE_S = 120.0  # with a cluster that no longer answers
STOP_S = 60.0
AGENTS_S = 60.0  # with a cluster whose nodes have just been started
NO_AGENT = "No available agent"


@dataclass(frozen=True)
class Ended:
    """How a job ended: Ray's status (SUCCEEDED, FAILED, STOPPED), why, and its last lines."""

    job_id: str
    status: str
    message: str
    last_lines: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the job did what it was to do."""
        return self.status == "SUCCEEDED"


class Jobs:
    """The jobs of one cluster.

    `address`: where its dashboard is, `http://HOST:8265`. `patience_s`: how long a lost connection is tried again.
    """

    def __init__(
        self,
        address: str,
        *,
        request_s: float = REQUEST_S,
        quiet_s: float = QUIET_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Raises ClusterError when nothing answers there, or something that is no Ray dashboard."""
        self.address = _checked(address)
        self.quiet_s, self.patience_s = quiet_s, patience_s
        for name in ("dashboard_sdk", "job.sdk"):  # they tell on stderr what they do
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
        with self._answers(), _variable(ADDRESS_VARIABLE, self.address):
            self._client = _Client(self.address, request_s)

    def submit(self, entrypoint: str, runtime_env: Mapping[str, Any], job_id: str) -> None:
        """Send a job; Ray runs it when it can. Raises FormatError when a job of this name was there before."""
        until_s = time.monotonic() + AGENTS_S
        while True:
            try:
                with self._answers():
                    self._client.submit_job(entrypoint=entrypoint, runtime_env=dict(runtime_env), submission_id=job_id)
                return
            except ClusterError as error:
                if self._has(job_id):  # only the answer was lost
                    return
                if NO_AGENT not in str(error) or time.monotonic() > until_s:
                    raise
            time.sleep(RETRY_S)

    def _has(self, job_id: str) -> bool:
        try:
            return bool(self.status(job_id))
        except SpindleError:
            return False

    def status(self, job_id: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        with self._answers(job_id):
            return str(self._client.get_job_info(job_id).status.value)

    def follow(
        self, job_id: str, show: Callable[[str], object], note: Callable[[str], object] = lambda text: None
    ) -> Ended:
        """Show the log from its start until the job has ended. `note` gets a sentence on each lost connection.

        Raises ClusterError when the cluster stays away for `patience_s`; the job may go on.
        """
        log = _Log(show)
        lost_s: float | None = None
        while True:
            try:
                if JobStatus(self.status(job_id)).is_terminal():
                    return self._ended(job_id, log)
                with self._answers(job_id):
                    asyncio.run(self._stream(job_id, log))
                lost_s = None
            except ClusterError as error:
                now_s = time.monotonic()
                if lost_s is None or log.came_s > lost_s:
                    lost_s = now_s
                    note(f"connection to {self.address} lost; trying again for {self.patience_s:g} s")
                if now_s - lost_s > self.patience_s:
                    raise ClusterError(f"{error}\njob {job_id} may still run") from error
            time.sleep(RETRY_S)

    def stop(self, job_id: str) -> str:
        """End a job, and wait until it has; its status then, which may be that it had ended before."""
        with self._answers(job_id):
            self._client.stop_job(job_id)
        deadline_s = time.monotonic() + STOP_S
        while not JobStatus(status := self.status(job_id)).is_terminal():
            if time.monotonic() > deadline_s:
                raise RunError(f"job {job_id} is {status} {STOP_S:g} s after it was asked to stop; see its node")
            time.sleep(RETRY_S)
        return status

    async def _stream(self, job_id: str, log: "_Log") -> None:
        """Feed the log until its stream ends, or the job can no longer be asked for."""
        log.rewind()
        chunks = self._client.tail_job_logs(job_id)
        following = asyncio.ensure_future(_next(chunks))
        while True:
            done, _ = await asyncio.wait({following}, timeout=self.quiet_s)
            if not done:
                await asyncio.to_thread(self._client.get_job_info, job_id)
                continue
            text = following.result()
            if text is None:
                return
            log.feed(text)
            following = asyncio.ensure_future(_next(chunks))

    def _ended(self, job_id: str, log: "_Log") -> Ended:
        with self._answers(job_id):
            log.rewind()
            log.feed(self._client.get_job_logs(job_id))
            info = self._client.get_job_info(job_id)
        message = (info.message or "").partition(", last available logs")[0].splitlines() or [""]
        return Ended(job_id, str(info.status.value), message[0], log.last_lines())

    @contextlib.contextmanager
    def _answers(self, job_id: str | None = None) -> Iterator[None]:
        """What goes wrong between us and the dashboard, as errors of ours."""
        try:
            yield
        except AuthenticationError as error:
            raise FormatError(
                f"the Ray cluster at {self.address} refused us ({str(error).splitlines()[0]}); set RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN as on the cluster"
            ) from error
        except (OSError, ClientError, TimeoutError, json.JSONDecodeError, KeyError) as error:
            raise self._nobody(type(error).__name__) from error
        except (RuntimeError, ValueError) as error:
            raise self._refusal(str(error), job_id) from error

    def _nobody(self, reason: str) -> ClusterError:
        return ClusterError(
            f"no Ray dashboard answers at {self.address} ({reason}); give --address http://HOST:8265 of the head of a "
            "cluster with ray[default], or forward that port to this machine"
        )

    def _refusal(self, text: str, job_id: str | None) -> Exception:
        if "already exists" in text:
            return FormatError(f"{self.address} has a job of this name already; choose another --job-id")
        if job_id is not None and "does not exist" in text:
            return FormatError(
                f"the Ray cluster at {self.address} knows no job {job_id!r}; `ray job list` shows its jobs"
            )
        if "Version check" in text:
            return self._nobody("something else does")
        if "status code 5" in text:
            return self._nobody(_essence(text))
        return RunError(f"the Ray cluster at {self.address} refused: {_essence(text)}")


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a timeout on every request; its own would wait forever for a server that keeps silent."""

    def __init__(self, address: str, request_s: float) -> None:
        self.request_s = request_s
        super().__init__(address)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """As Ray's own, which leaves its connection open when nobody reads on."""
        address = f"{self._address}/api/jobs/{job_id}/logs/tail"
        closing = ClientWSTimeout(ws_close=1.0)
        async with (
            ClientSession(cookies=self._cookies, headers=self._headers) as session,
            session.ws_connect(address, timeout=closing) as connection,
        ):
            async for message in connection:
                if message.type is not WSMsgType.TEXT:
                    raise ConnectionError(f"{message.type.name} in place of text")
                yield message.data
            if connection.close_code == WSCloseCode.ABNORMAL_CLOSURE:
                raise ConnectionError("closed without a word")

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        timeout_s = UPLOAD_S if method in ("PUT", "POST") else self.request_s
        return super()._do_request(method, endpoint, timeout=(self.request_s, timeout_s), **options)


class _Log:
    """A text that comes from its start again after every dropped connection, and is shown once."""

    def __init__(self, show: Callable[[str], object]) -> None:
        self._show = show
        self._shown = self._at = 0
        self._tail: deque[str] = deque([""], maxlen=50)
        self.came_s = 0.0

    def rewind(self) -> None:
        """What comes next is the start of the text."""
        self._at = 0

    def feed(self, text: str) -> None:
        """Show what is new in the next part of the text."""
        new = text[max(0, self._shown - self._at) :]
        self._at += len(text)
        self.came_s = time.monotonic()
        if new:
            self._shown = self._at
            self._show(new)
            first, *others = new.split("\n")
            self._tail[-1] += first
            self._tail.extend(others)

    def last_lines(self) -> tuple[str, ...]:
        """The last lines that are not empty."""
        return tuple(line for line in self._tail if line.strip())


async def _next(chunks: AsyncIterator[str]) -> str | None:
    return await anext(chunks, None)


def _checked(address: str) -> str:
    whole = (address if "://" in address else f"http://{address}").rstrip("/")
    scheme, _, host = whole.partition("://")
    if scheme not in ("http", "https") or not host:
        raise ClusterError(
            f"address {address!r} is not that of a Ray dashboard; give http://HOST:8265, which `ray start` tells (not "
            "that of ray:// or of the GCS)"
        )
    return whole


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Ray's client takes the address of its environment before the one that it is given."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _essence(text: str) -> str:
    """Of a refusal, which may hold a traceback, its last line."""
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip(" .'\"")]
    return lines[-1] if lines else "no reason given"
