"""The backends that this machine has, and the fixture ``backend`` that runs a test on each: import ``on_each_backend`` to have it."""
import pytest

from rlkernels.backends import DEVICES, absent, use_backend

PRESENT = [name for name in DEVICES["cpu"] if absent(name) is None]
native = pytest.mark.skipif(absent("cpu") is not None, reason=f"the native CPU backend is absent: {absent('cpu')}")


@pytest.fixture(params=PRESENT, name="backend")
def on_each_backend(request):
    with use_backend(request.param):
        yield request.param
