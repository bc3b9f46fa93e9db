import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # oracles and reference are modules of the suite, not a package
