"""Runs the cases of ``openrlhf_cases`` through OpenRLHF itself in float64, and writes what it returned.

    pip install --no-deps --target A openrlhf==0.11.2 && PYTHONPATH=.:A python tests/integrations/record_openrlhf.py
    pip install --no-deps --target B openrlhf==0.9.5 && PYTHONPATH=.:B python tests/integrations/record_openrlhf.py
    pip install --no-deps --target C openrlhf==0.5.5 && PYTHONPATH=.:C python tests/integrations/record_openrlhf.py

Each run replaces the cases of its version in ``recorded/openrlhf.json`` and leaves the others.
"""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import openrlhf_cases
import openrlhf_host

RECORD = Path(__file__).parent / "recorded" / "openrlhf.json"
CASES = {"0.11.2": openrlhf_cases.cases, "0.5.5": openrlhf_cases.legacy_cases, "0.9.5": openrlhf_cases.cases_of_09}


def written(x):
    """A tensor as nested lists of numbers with nine digits."""
    if x is None:
        return None
    nested = x.double().tolist()

    def rounded(y):
        return [rounded(z) for z in y] if isinstance(y, list) else float(f"{y:.9g}")

    return rounded(nested)


def main():
    version = importlib.metadata.version("openrlhf")
    stock = openrlhf_host.stock(version)
    if version == "0.5.5":  # its KTOLoss reduces over the default group
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    found = {
        case.name: {name: written(x) for name, x in case.run(stock, torch.float64).items()} for case in CASES[version]()
    }
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[version] = {"torch": torch.__version__, "python": platform.python_version(), "cases": found}
    lines = ["{"]
    for i, (key, entry) in enumerate(sorted(record.items())):
        lines.append(f' "{key}": {{"torch": "{entry["torch"]}", "python": "{entry["python"]}", "cases": {{')
        cases = [f"  {json.dumps(name)}: {json.dumps(x)}" for name, x in entry["cases"].items()]
        lines += [",\n".join(cases), " }}" + ("," if i + 1 < len(record) else "")]
    RECORD.write_text("\n".join([*lines, "}", ""]))
    print(f"{RECORD.name}: {len(found)} cases of OpenRLHF {version}")


if __name__ == "__main__":
    main()
