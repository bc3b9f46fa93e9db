"""The benchmarks beside the tests of them."""

import sys

from paths import ROOT

# At the end: where the package is installed that one is under test, not the sources beside the benchmarks.
sys.path.append(str(ROOT))
