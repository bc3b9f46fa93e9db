"""Small models of transformers, stock and with ours. Prints the table of docs/parity.md.

``python tests/integrations/transformers_table.py``, with a Python that has torch, transformers and peft.
"""

import datetime
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]


def main():
    import peft
    import torch
    import transformers
    from transformers_runs import CASES, gaps

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{datetime.date.today()}, {versions}, CPU.\n")
    columns = ("log-probabilities", "losses", "gradient", "way of the parameters", "the least, with an error of 1 %")
    print("| model |", " | ".join(columns), "|")
    print(f"|{'---|' * 6}")
    failed = False
    for name, case in CASES.items():
        right, wrong = gaps(name), min(gaps(name, 1.01))
        rounds = getattr(case, "autocast", False)
        bad = not rounds and (max(right) > TOLERANCE or wrong < 10 * TOLERANCE)
        failed |= bad
        cells = " | ".join(f"{gap:.0e}" for gap in (*right, wrong))
        print(f"| {name} | {cells} |{' FAILED' if bad else ''}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
