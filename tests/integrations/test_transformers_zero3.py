"""A model of transformers in two processes under ZeRO-3: losses and gradient norms of its own and of ours."""

import importlib.util
import os
import socket

import pytest
import subprocesses
import torch

pytest.importorskip("transformers")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero_3_trains_as_before_and_a_loss_behind_the_engine_is_refused(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # DeepSpeed may lie on the path of this process alone.
    path = os.pathsep.join([subprocesses.PATH, *filter(None, [os.environ.get("PYTHONPATH")])])
    for found in subprocesses.reports_of_two_ranks(
        tmp_path, "transformers_zero3.py", port, PYTHONPATH=path, HF_HUB_OFFLINE="1"
    ):
        own, ours, wrong = (torch.tensor(found[name]) for name in ("own", "attach", "wrong"))
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
        assert ((wrong - own).abs() / own).min() > 1e-3
        own, ours = (torch.tensor(found[name]) for name in ("own log-probabilities", "token_logprobs"))
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
        for name, said in zip(("token_logprobs", "compute_loss_func"), found["refused"], strict=True):
            assert said.startswith(f"{name}: ZeRO-3 partitions the head of LlamaForCausalLM"), said
        assert found["without gradients"] < 1e-5
