"""DeepSpeed-Chat's reward model under DeepSpeed's own engine, stock and patched: losses, scores, gradient norms.

It needs a checkout, as ``test_deepspeed_chat_originals.py``, and DeepSpeed. Each stage of ZeRO runs in a process of its
own, because an engine leaves hooks behind.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import types

import deepspeed_chat_cases as cases
import pytest
import torch

STEPS = 3


def trained(deepspeed, kind, stage):
    """The numbers of some steps on pairs of random ids: loss, scores at the ends, gradient norm, value of answers."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = kind(LlamaModel(LlamaConfig(vocab_size=29, **sizes)), types.SimpleNamespace(pad_token_id=0))
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    found = []
    for step in range(STEPS):
        ids = torch.randint(3, 29, (4, 9), generator=torch.Generator().manual_seed(step))
        ids[2:, :3], ids[0, 6:], ids[3, 7:] = ids[:2, :3], 0, 0
        out = engine(ids, attention_mask=(ids != 0).long(), use_cache=False)
        engine.backward(out["loss"])
        engine.step()
        values = engine.forward_value(ids, (ids != 0).long(), prompt_length=3)
        found += [out["loss"].item(), out["chosen_mean_scores"].sum().item(), out["rejected_mean_scores"].sum().item()]
        found += [float(engine.get_global_grad_norm() or 0.0), values["chosen_end_scores"].sum().item()]
    return found


def main(stage):
    """Prints the numbers of both, the counts, and the numbers with one percent of error."""
    sys.path.insert(0, str(cases.checkout()))
    import deepspeed

    # Shared memory between ranks would be compiled first, and there is one rank.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    from dschat.utils.model.reward_model import RewardModel

    from rlkernels.integrations import deepspeed_chat
    from rlkernels.integrations.deepspeed_chat import functions

    stock = trained(deepspeed, RewardModel, stage)
    deepspeed_chat.patch()
    ours, status = trained(deepspeed, RewardModel, stage), deepspeed_chat.status()
    right = functions.span_reward_loss
    functions.span_reward_loss = lambda *a, **k: tuple(1.01 * x for x in right(*a, **k))
    wrong = trained(deepspeed, RewardModel, stage)
    print(json.dumps([stock, ours, wrong, status.calls, len(status.delegations)]))


@pytest.mark.skipif(
    cases.checkout() is None or importlib.util.find_spec("deepspeed") is None,
    reason=f"needs DeepSpeed, and a checkout that {cases.VARIABLE} names",
)
@pytest.mark.parametrize("stage", [0, 3])
def test_the_reward_model_trains_as_before_under_the_engine(stage):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    ran = subprocess.run(
        [sys.executable, __file__, str(stage)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **one, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    stock, ours, wrong, calls, delegated = json.loads(ran.stdout.strip().splitlines()[-1])
    assert ours == pytest.approx(stock, rel=1e-4, abs=1e-6) and wrong != pytest.approx(stock, rel=1e-4, abs=1e-6)
    assert calls == {"forward": STEPS, "forward_value": STEPS} and not delegated


if __name__ == "__main__":
    main(int(sys.argv[1]))
