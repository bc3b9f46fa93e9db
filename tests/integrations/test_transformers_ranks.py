"""Models of transformers in two processes, cut by FSDP2, tensor parallelism or vocabulary, against one process."""

import json
import os
import subprocess
import sys

import pytest
import subprocesses
from paths import SUPPORT

os.environ.update(HF_HUB_OFFLINE="1")
pytest.importorskip("transformers")

import transformers_runs  # noqa: E402
from transformers_ranks import CASES, EVEN  # noqa: E402


# One start of two processes serves every case, because a start is most of the time.
def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    transformers_runs.build(**EVEN).save_pretrained(tmp_path / "model")
    started = [
        subprocess.Popen(
            [sys.executable, SUPPORT / "transformers_ranks.py", str(rank), tmp_path / "rendezvous", tmp_path / "model"],
            cwd=os.sep,
            env=subprocesses.environment(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=(tmp_path / f"{rank}.log").open("w"),
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=180)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, text in enumerate(printed):
        assert text.strip(), f"rank {rank} wrote no report: {(tmp_path / f'{rank}.log').read_text()[-3000:]}"
        found = json.loads(text.splitlines()[-1])
        assert found.keys() == CASES.keys()
        complaints = "\n".join(f"rank {rank}, {name}: {said}" for name, said in found.items() if said)
        assert not complaints, complaints
