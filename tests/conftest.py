"""Shared set-up: hypothesis runs the same examples everywhere, and says what to do when one fails."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "spindle",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("spindle")
