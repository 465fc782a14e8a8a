import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from spindle.errors import ClusterError
from spindle.runtime.launch import jobs
from spindle.runtime.launch.jobs import Jobs

REFUSALS = 2


class Dashboard(HTTPServer):
    """As much of Ray's as submitting asks for; its agents come late, or never."""

    def __init__(self, refusals: int) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.refusals, self.asked = refusals, 0


class Answers(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": "2.50", "ray_commit": "x", "session_name": "s"}
        self.tell(200, version) if self.path == "/api/version" else self.tell(404, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        if self.server.asked <= self.server.refusals:
            self.tell(500, "No available agent to submit job, please try again later.")
        else:
            self.tell(200, {"job_id": "j", "submission_id": "j"})

    def tell(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dashboard(request: pytest.FixtureRequest) -> Iterator[Dashboard]:
    with Dashboard(request.param) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RETRY_S", 0.0)
    monkeypatch.setattr(jobs, "AGENTS_S", 0.2)


@pytest.mark.parametrize("dashboard", [REFUSALS], indirect=True)
def test_a_cluster_whose_agents_are_still_starting_is_asked_again(dashboard: Dashboard) -> None:
    Jobs(f"http://127.0.0.1:{dashboard.server_port}").submit("true", {}, "j")
    assert dashboard.asked == REFUSALS + 1


@pytest.mark.parametrize("dashboard", [10**9], indirect=True)
def test_a_cluster_without_agents_is_not_asked_for_ever(dashboard: Dashboard) -> None:
    with pytest.raises(ClusterError, match="No available agent"):
        Jobs(f"http://127.0.0.1:{dashboard.server_port}").submit("true", {}, "j")
    assert dashboard.asked > 1
