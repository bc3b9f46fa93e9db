"""Records what DeepSpeed-Chat's own code answers to the problems of ``deepspeed_chat_cases``, in float64.

``DEEPSPEED_CHAT=PATH/applications/DeepSpeed-Chat python tests/integrations/recorded/record_deepspeed_chat.py``, with
``tests/support`` on the path. It writes ``deepspeed_chat.json`` beside itself, with the commit and torch's version.
"""

import hashlib
import json
from pathlib import Path

import deepspeed_chat_cases as cases
import torch

SOURCES = ("dschat/rlhf/ppo_trainer.py", "dschat/utils/model/reward_model.py", "training/step2_dpo_finetuning/main.py")


def numbers(x):
    return [float(f"{y:.12g}") for y in x.flatten().tolist()]


def main():
    folder = cases.checkout()
    if folder is None:
        raise SystemExit(f"set {cases.VARIABLE} to the folder applications/DeepSpeed-Chat of DeepSpeedExamples")
    with cases.originals(folder) as modules:
        found = cases.measured(cases.of_originals(modules))
    record = {
        "source": "DeepSpeedExamples",
        "commit": cases.COMMIT,
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SOURCES},
        "torch": torch.__version__,
        "cases": {name: [[list(x.shape), numbers(x)] for x in tensors] for name, tensors in found.items()},
    }
    target = Path(__file__).with_name("deepspeed_chat.json")
    target.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"{target}: {len(record['cases'])} cases, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
