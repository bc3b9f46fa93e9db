"""Where the suite and the sources lie. No other module counts folders upwards, so that a test may move."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SUPPORT = TESTS / "support"
ROOT = TESTS.parent
