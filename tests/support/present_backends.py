"""The backends that this machine has; the fixture ``backend`` of ``conftest.py`` runs a test on each."""

import pytest

from rlkernels.backends import DEVICES, absent

PRESENT = [name for name in DEVICES["cpu"] if absent(name) is None]
native = pytest.mark.skipif(absent("cpu") is not None, reason=f"the native CPU backend is absent: {absent('cpu')}")
