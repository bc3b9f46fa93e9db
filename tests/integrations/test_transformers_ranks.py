"""Models of transformers in two processes, cut by FSDP2, tensor parallelism or vocabulary, against one process."""

import os

import pytest
import subprocesses

os.environ.update(HF_HUB_OFFLINE="1")
pytest.importorskip("transformers")

import transformers_runs  # noqa: E402
from transformers_ranks import CASES, EVEN  # noqa: E402


# One start of two processes serves every case, because a start is most of the time.
def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    transformers_runs.build(**EVEN).save_pretrained(tmp_path / "model")
    reports = subprocesses.reports_of_two_ranks(
        tmp_path, "transformers_ranks.py", tmp_path / "rendezvous", tmp_path / "model"
    )
    for rank, found in enumerate(reports):
        assert found.keys() == CASES.keys()
        complaints = "\n".join(f"rank {rank}, {name}: {said}" for name, said in found.items() if said)
        assert not complaints, complaints
