"""Trainers of TRL with options that the first suite leaves out: losses, gradient norms and steps of SGD, stock against
ours, and each again with an error of 1 %. It takes TRL 1.14, too; the wide grid over versions is ``matrix.py``.
"""

import pytest
import torch
from packaging.version import Version

trl = pytest.importorskip("trl", minversion="1.14")

import trl_runs  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl.trainer import utils  # noqa: E402

from rlkernels.integrations import trl as integration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames arguments that TRL still passes
FUSED = Version(trl.__version__) >= Version("1.15")
"""Whether trainers score through the fused head; before that through functions of logits."""
SERVED = "fused_head" if FUSED else "selective_log_softmax_and_entropy"
BEFORE_1_15 = ("dpo/sigmoid", "rloo/plain", "kto/kto", "sft/dft", "reward/margin")
"""Trainers that no other test takes there."""
SINCE_1_15 = ("distillation/jsd", "grpo/tool mask", "async_grpo/tool mask")
CASES = ("grpo/sequence, GAS 2, 4 steps per generation", "cpo/sigmoid", *(SINCE_1_15 if FUSED else BEFORE_1_15))


@pytest.fixture(autouse=True)
def unpatched():
    yield
    integration.unpatch()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return trl_runs.models(str(tmp_path_factory.mktemp("models")))


@pytest.mark.fault(107, 111, 112)
@pytest.mark.parametrize("case", CASES)
def test_losses_gradient_norms_and_sgd_steps_are_those_of_stock_and_one_percent_of_error_shows(case, directory):
    if case.startswith("async"):
        pytest.importorskip("requests", reason="AsyncGRPO needs requests")
    row = trl_runs.compared(case, trl_runs.WIDE[case], directory)
    assert "absent" not in row, row
    assert row["stock"] == "trains" and row["gap"] <= trl_runs.TOLERANCE < 3 * trl_runs.TOLERANCE < row["wrong"]
    assert sum(row["calls"].values()) >= 3 and row["delegations"] == []


@pytest.mark.skipif(not FUSED, reason="the seam of functions of logits has a test of its own")
def test_what_a_tool_wrote_has_no_gradient_and_the_models_own_tokens_have(directory):
    trainer, batch = policy_batch(directory, tools=True, loss_type="dapo")
    displaced(trainer, batch)
    assert batch["tool_mask"].tolist() == [[1] * 6 + [0] * 3 + [1] * 2] * 4
    integration.patch()
    loss, gradients = loss_and_gradients(trainer, batch)
    old = batch["old_per_token_logps"].clone()
    # Numbers of a tool's tokens may be anything.
    batch["old_per_token_logps"] = torch.where(batch["tool_mask"] == 1, old, old - 0.7)
    again, found = loss_and_gradients(trainer, batch)
    assert again == loss and integration.status().calls == {SERVED: 2}
    same(found, gradients)
    batch["old_per_token_logps"] = torch.where(batch["tool_mask"] == 1, old - 0.7, old)
    assert loss_and_gradients(trainer, batch)[0] != loss


def policy_batch(directory, kind="grpo", **options):
    """Returns a trainer of policies and a scored batch of its own."""
    trainer = trl_runs.build(f"{kind}/batch", options, directory)
    rows, trainer.current_gradient_accumulation_steps = [trainer.train_dataset[0]] * 4, 1  # as its loop sets it
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return trainer, batch


def displaced(trainer, batch):
    """Sets the old log-probabilities 0.3 away from those of the weights, so that ratios matter and some are clipped."""
    with torch.no_grad():
        ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        kept = batch["completion_ids"].shape[1]
        now = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept)[0]
    batch["old_per_token_logps"] = now + torch.randn(now.shape, generator=torch.Generator().manual_seed(3)) * 0.3


def same(found, gradients):
    assert any(g.abs().max() > 1e-4 for g in gradients.values())
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def loss_and_gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


# The last ratio is that of Liger-Kernel #1082, where a kernel took the gradient's size from the ratio.
@pytest.mark.parametrize("ratio", [None, 1.7, 0.01])
def test_one_batch_has_the_loss_and_every_gradient_of_stock_also_under_ratios_of_a_rollout_engine(ratio, directory):
    trainer, batch = policy_batch(directory, loss_type="dapo", beta=0.04)
    displaced(trainer, batch)
    if ratio is not None:
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        batch["importance_sampling_ratio"] = torch.full_like(batch["old_per_token_logps"], ratio)
    loss, gradients = loss_and_gradients(trainer, batch)
    integration.patch()
    patched, found = loss_and_gradients(trainer, batch)
    assert integration.status().calls == {SERVED: 1}
    assert abs(patched - loss) <= 1e-6
    same(found, gradients)


def test_old_and_new_log_probabilities_of_the_same_weights_are_the_same_bits_in_any_chunks_and_order(directory):
    trainer, batch = policy_batch(directory)
    integration.patch()
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    arguments = (trainer.model, ids, mask, batch["completion_ids"].shape[1])
    with torch.no_grad():
        old = trainer._get_per_token_logps_and_entropies(*arguments)[0]
    new = trainer._get_per_token_logps_and_entropies(*arguments, compute_entropy=True)[0]
    assert torch.equal(old, new.detach()) and new.requires_grad
    # The head alone, because another batch gives a model's other layers other bits.
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), trainer.model.lm_head.weight.detach()
    targets, order = torch.randint(0, 97, (64,)), torch.randperm(64)

    def score(h, t):
        return utils._ChunkedLogProbFunction.apply(h, weight, None, t, 1.0, 32768)[0]

    whole = score(hidden, targets)
    assert torch.equal(score(hidden[order], targets[order]), whole[order])
    for size in (1, 8):
        parts = [score(hidden[i : i + size], targets[i : i + size]) for i in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.fault(106)
def test_an_experimental_trainer_keeps_its_own_objective(directory):
    trainer, batch = policy_batch(directory, "gmpo")
    displaced(trainer, batch)
    loss, gradients = loss_and_gradients(trainer, batch)
    integration.patch()
    patched, found = loss_and_gradients(trainer, batch)
    assert integration.status().calls == {SERVED: 1} and abs(patched - loss) <= 1e-6
    same(found, gradients)
    parent = GRPOTrainer._compute_loss(trainer, trainer.model, dict(batch))
    assert abs(parent.item() - loss) > 1e-3  # the objective of its parent is another one
