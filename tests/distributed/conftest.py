"""Real processes: what they share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine for all Ray tests: it takes seconds to start."""
    import ray

    from spindle.runtime.launch.ray_crew import start_local_ray

    start_local_ray(4)
    yield
    ray.shutdown()
