"""A user's script that a strict type checker passes: the public functions with the arguments that they are made for."""

import torch
from torch import Tensor

import rlkernels as rlk
from rlkernels.objectives import exp, where
from rlkernels.trajectories import TokenBatch, TokenRow, Trajectory, from_openai, token_batch
from rlkernels.types import Aggregation, Normalizers


@rlk.objective
def bounded(logp: Tensor, old_logp: Tensor, advantage: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    r"""``-min(rho, bound) A``. A bound on the ratio alone, without a paper."""
    ratio = exp(logp - old_logp)
    return -where(bound < ratio, bound, ratio) * advantage, -where(bound < ratio, 0.0, ratio) * advantage


@rlk.objective(columns=3)
def gated(logp: Tensor, advantage: Tensor, gate: Tensor, scale: float = 0.5) -> tuple[Tensor, Tensor]:
    r"""``-scale g A log pi``, with a column of its own."""
    return -scale * gate * advantage * logp, -scale * gate * advantage


@rlk.objective
def squared(margin: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    r"""``(beta m - 1)^2``."""
    gap = beta * margin - 1.0
    return gap * gap, 2.0 * beta * gap


rlk.check_objective(gated, grid={"gate": [0.5, 1.0]}, scale=2.0)
logits = torch.randn(2, 3, 5, requires_grad=True)
targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
rewards = torch.tensor([1.0, 0.0])
group_ids = torch.tensor([7, 7])

stats = rlk.token_stats(
    logits, targets, temperature=0.7, outputs=("entropy", "is_top1"), kl="exact", ref_logits=logits.detach()
)
kl: Tensor | None = stats.kl
old: Tensor = rlk.token_logprobs(logits, targets).detach()
advantages: Tensor = rlk.group_advantages(rewards, group_ids, baseline="leave-one-out", scale=None)

loss: Tensor = rlk.policy_loss(stats.logprobs, old, advantages, mask, clip_high=0.28, kl_coef=0.01, ref_logprobs=old)
loss = rlk.policy_loss(stats.logprobs, old, advantages, mask, objective="bounded", bound=torch.tensor(1.2))
loss = rlk.policy_loss(stats.logprobs, None, advantages, mask, objective=gated, gate=torch.ones(2, 3), scale=1.0)
loss = rlk.dpo_loss(rewards, -rewards, rewards, rewards, loss_type=(squared, "sigmoid"))
loss = rlk.policy_loss(
    stats.logprobs, old, advantages, ratio_level="sequence", aggregation="fixed-horizon", normalizers={"horizon": 3}
)
term = rlk.KLTerm("k3", ratio_weighted=True, value_clamp=(None, 10.0), mask=mask)
loss = rlk.policy_loss(stats.logprobs, old, advantages, mask, kl=term, kl_coef=0.01, ref_logprobs=old)
loss = rlk.logits_policy_loss(
    logits, targets, old, advantages, mask, kl="reverse_kl", kl_coef=0.01, ref_logits=logits.detach()
)
each: Tensor = rlk.kl_estimate(stats.logprobs, old, "abs", mask=mask, diff_clamp=20.0)
loss, metrics = rlk.logits_policy_loss(logits, targets, old, advantages, mask, entropy_coef=0.01, return_metrics=True)
ratio: Tensor = metrics["ratio"]
for wanted in (True, False):
    found = rlk.value_loss(stats.logprobs, old, old, mask, clip_range=0.2, return_metrics=wanted)
    loss = found[0] if isinstance(found, tuple) else found
(gradient,) = torch.autograd.grad(loss, logits)

totals: Normalizers = {"batch_num_tokens": torch.tensor(5), "dp_size": 2}
mode: Aggregation = "global-token-mean"
loss = rlk.sft_loss(logits, targets, mask, kind="dft", aggregation=mode, normalizers=totals)
loss, metrics = rlk.logprobs_sft_loss(old, mask, sample_weights=rewards, return_metrics=True)
weights: Tensor = rlk.token_weights(mask, "prompt-mean", group_ids=group_ids, scale=0.5)
one: Tensor = rlk.aggregate(old, mask, "seq-mean-token-mean", num_sequences=2)
sums: Tensor = rlk.sequence_sums(torch.ones(4), cu_seqlens=[0, 1, 4])
per_token: Tensor = rlk.broadcast_to_tokens(rlk.sequence_means(old, mask), mask)
spans: Tensor = rlk.spans_to_mask([[1, 2]], 4)
packed: rlk.Packed = rlk.pack({"targets": targets, "old": old}, mask, pad_to=8, fill={"targets": -100})
padded: dict[str, Tensor] = rlk.unpack(packed.tensors, packed.cu_seqlens, mask)
shifted: Tensor = rlk.shift_targets(targets, attention_mask=mask)
log: list[dict[str, object]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo", "token_ids": [7, 2]},
]
trajectory: Trajectory = from_openai(log, reward=1.0)
row = TokenRow((5, 7, 2), (False, True, True), (0.0, -0.1, -0.2), (0.0, 0.0, 0.0), ())
batch: TokenBatch = token_batch([row], layout="packed")
loss = rlk.policy_loss(
    batch.rollout_logprobs, batch.rollout_logprobs, rewards[:1], batch.mask, cu_seqlens=batch.cu_seqlens
)

loss = rlk.dpo_loss(
    rewards, -rewards, rewards, rewards, loss_type=("sigmoid", "ipo"), loss_weights=(1.0, 0.5), beta=0.2
)
loss, metrics = rlk.dpo_loss(rewards, -rewards, reference_free=True, return_metrics=True)
loss = rlk.unpaired_preference_loss(rewards, rewards, rewards > 0, loss_type="bco", delta=torch.tensor(0.1))
loss = rlk.pairwise_reward_loss(rewards, -rewards, center_coef=0.01)
scores: Tensor = rlk.reward_scores(torch.ones(2, 3, 4), torch.ones(1, 4), attention_mask=mask)
shorter, longer = rlk.length_desensitized_weights(mask, mask, 0.5)

head, states = torch.ones(8, 4), torch.ones(2, 3, 4)
head_logprobs: Tensor = rlk.linear_token_logprobs(states, head, targets, logits_dtype=torch.float32, chunk_tokens=2)
loss = rlk.linear_policy_loss(states, head, targets, old, old, mask, clip_low=0.1, ratio_level="sequence")
loss, metrics = rlk.linear_sft_loss(states, head, targets, kind="dft", return_metrics=True)
loss = rlk.linear_dpo_loss(states, head, targets, reference_free=True, loss_type="simpo")

gained, returns = rlk.gae(old, old, mask, gamma=0.99, lam=0.95, masked="zero", bootstrap_values=rewards)
gained, returns = rlk.gae(old, old, mask, lam=rewards, turn_ends=mask, turn_gamma=0.9)
gained, targets_of_values = rlk.vtrace(old, old, old, old, mask, rho_max=1.0, bootstrap_values=rewards)
gained, returns = rlk.rollout_gae(old, old, rewards, time_dim=1, dones=mask, dones_at="start")
several: Tensor = rlk.group_advantages(old, group_ids, reward_weights=(1.0, 0.5, 0.5), singleton="raw")
of_steps: Tensor = rlk.step_advantages(old, mask, group_ids, mask, scale=None)
of_agents: Tensor = rlk.gigpo_advantages(rewards, rewards, group_ids, group_ids, trajectory_ids=group_ids)
over_baseline, returns = rlk.optimal_token_advantages(old, old, old, group_ids, mask, alignment="live")
assembled: Tensor = rlk.assemble_rewards(rewards, mask, score_clip=(-1, 1), placement="trl-end")
ended: rlk.ProcessedSequences = rlk.process_sequences(targets, 1, eos_id=2, pad_id=0)
controller = rlk.KLController(0.1, kind="adaptive", target=6.0, horizon=10000)
controller.update(torch.tensor(5.0), 64)
coefficient: Tensor = controller.coef
discounted: Tensor = rlk.discounted_returns(old, mask, gamma=0.9)
white: Tensor = rlk.masked_whiten(gained, mask, eps_mode="clamp", dim=(0, 1))

ends, answers = torch.tensor([[0, 0, 1], [0, 1, 0]]), torch.tensor([[3, 4, 0], [3, 1, 0]])
distilled: Tensor = rlk.divergence_loss(logits, logits.detach(), mask, kind="jsd", beta=0.3, temperature=2.0)
distilled, metrics = rlk.divergence_loss(logits, teacher_topk=(targets[..., None], old[..., None]), return_metrics=True)
each = rlk.token_divergences(logits, logits.detach(), mask, kind="reverse_kl")
loss, metrics = rlk.linear_distillation_loss(
    states, head, states, head, mask, kind="cross_entropy", return_metrics=True
)
more: rlk.TokenStats = rlk.linear_token_stats(states, head, targets, outputs=("entropy", "mean_logits"), softcap=30.0)
loss = rlk.linear_unpaired_preference_loss(states, head, targets, rewards, rewards > 0, kl=0.0, bias=torch.zeros(8))

corrected = rlk.Correction("mask", low=0.5, high=2.0, gate="ratio", opsm_delta=0.1)
loss = rlk.policy_loss(stats.logprobs, old, advantages, mask, rollout_logprobs=old, correction=corrected)
loss = rlk.policy_loss(stats.logprobs, old, advantages, mask, rollout_logprobs=old, correction={"high": 2.0})
factors: Tensor = rlk.rollout_weights(old, old, mask, level="sequence", mode="clip", high=2.0)
factors, metrics = rlk.rollout_weights(old, old, mask, high=2.0, return_metrics=True)
factors = rlk.rho_correction(old, old, mask, mask_high=5.0, clamp_high=2.0)
passed: Tensor = rlk.rejection_mask(old, old, mask, rules={"token_k1": (0.5, 2.0), "seq_mean_k3": 0.1})
passed, metrics = rlk.rejection_mask(old, old, mask, rules={"token_k1": 2.0}, return_metrics=True)
passed = rlk.off_policy_sequence_mask(old, old, advantages, mask, delta=0.1)
passed = rlk.m2po_mask(old, old, mask, threshold=0.04)
mismatch: dict[str, Tensor] = rlk.rollout_metrics(old, old, mask, nan_ratio=1.0)
loss = rlk.policy_loss(stats.logprobs, old, advantages, rlk.top_entropy_mask(old.exp(), mask, 0.5))

ranked: Tensor = rlk.rank_list_loss(old, kind="logsigmoid", aggregation="list-mean")
judged: Tensor = rlk.process_reward_loss(logits, targets, mask=mask, reward_token_ids=[0, 1, 2, 3, 4])
judged, metrics = rlk.process_reward_loss(logits, targets, mask=mask, return_metrics=True)
solved: Tensor = rlk.solution_scores(old.exp(), ends, kind="product")
at_the_end, places = rlk.end_scores(old, mask)
loss, chosen_end, rejected_end = rlk.span_reward_loss(old, answers, 0)
running = rlk.RewardNormalizer(unbiased=False)
running.update(rewards)
even: Tensor = running.normalize(rewards)
pair_weights: Tensor = rlk.wpo_weights(old, mask)

best: Tensor = rlk.best_of_n(rewards, group_ids, count=1)
shared: Tensor = rlk.broadcast_advantages(rewards, torch.tensor([False, True]), group_ids)
mixed: Tensor = rlk.dynamic_sampling_mask(rewards, group_ids, low=0.0, high=1.0)
shaped: Tensor = rlk.length_penalty(torch.tensor([3, 9]), max_length=10, buffer=4.0)
shaped = rlk.truncation_penalty(rewards, torch.tensor([True, False]), 0.5)
whole: Tensor = rlk.extended_mask(mask)
moments: rlk.Moments = rlk.merge_moments([rlk.masked_moments(old, mask), rlk.masked_moments(old)])
white = rlk.masked_whiten(old, mask, moments=moments)
bonus = rlk.EntropyController(0.01, target=0.2)
bonus.update(torch.tensor(0.1))
average = rlk.WeightAverage([head], decay=0.9)
average.update([head])

known: dict[str, object] = rlk.presets.settings("dapo", rlk.policy_loss)
coefficients: dict[str, float] = rlk.presets.coefficients("dapo")
told: str = rlk.presets.describe(rlk.presets.names()[0])
registered: list[str] = list(rlk.objectives.OBJECTIVES)


@rlk.use_backend("eager")
def entropy(x: Tensor, ids: Tensor) -> Tensor:
    found = rlk.token_stats(x, ids).entropy
    assert found is not None
    return found


with rlk.use_backend("eager"):
    total: Tensor = entropy(logits, targets).sum()
serves: dict[str, str] = rlk.available_backends()["serves"]["cpu"]
patched: list[str] = [line for host in rlk.status().values() for line in host.replaced]
