"""Runs verl's own functions on the calls of ``verl_cases`` and writes ``recorded/verl.json``.

    python tests/integrations/record_verl.py    # with verl, and tests/support on PYTHONPATH

The suite holds our functions to that file where verl is not installed.
"""

import json
import pathlib

import torch
import verl_cases
import verl_originals

SEEDS = 2
OUT = pathlib.Path(__file__).parent / "recorded" / "verl.json"


def rounded(x):
    return [float(f"{v:.7g}") for v in x.reshape(-1).tolist()]


def main():
    found = {}
    for name, case in verl_cases.cases(SEEDS).items():
        if case.name.endswith("bypass_mode"):
            continue  # ours asks verl for the correction
        ran = verl_originals.run(case)
        found[name] = {
            "results": [rounded(x) for x in ran["results"]],
            "gradients": [rounded(x) for x in ran["gradients"]],
            "metrics": {key: float(f"{x:.7g}") for key, x in ran["metrics"].items()},
        }
    versions = {"verl": verl_originals.version(), "torch": torch.__version__.split("+")[0]}
    lines = [f"{json.dumps(name)}: {json.dumps(ran)}" for name, ran in found.items()]
    body = ",\n".join(lines)
    OUT.write_text(f'{{"versions": {json.dumps(versions)}, "seeds": {SEEDS}, "cases": {{\n{body}\n}}}}\n')


if __name__ == "__main__":
    main()
