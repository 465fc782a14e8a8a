"""Shared set-up: hypothesis runs the same examples everywhere, and says what to do when one fails."""

import os

from hypothesis import HealthCheck, settings

# Two workers on two cores: threads of torch's would wait for each other. Set before torch is imported; processes that
# tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# MKL's products differ in the last bit with the alignment of their operands, unless it is told otherwise before its
# first call. Tests that compare two runs bit for bit ask for the same operations, not for the same addresses.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

settings.register_profile(
    "spindle",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("spindle")
