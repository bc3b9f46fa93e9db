"""Rewards of tokens, masks of sequences, penalties of length, controllers, averages: against loops and hand numbers."""

import math

import pytest
import torch

import rlkernels as rlk

NAN, INF = float("nan"), float("inf")
MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0] * 6, [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
B, L = MASK.shape
LAST, BEHIND = [4, 5, 5, 0], [5, 5, 5, 1]


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LOGP, REF, SCORES = randn(B, L, seed=0), randn(B, L, seed=1), torch.tensor([3.0, -20.0, 0.5, 7.0], dtype=torch.float64)
KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


def rewards_loop(placement, kl, coef, clip):
    want = torch.zeros(B, L, dtype=torch.float64)
    for i in range(B):
        place = (LAST if placement == "last-action" else BEHIND)[i]
        for t in range(L):
            if MASK[i, t] or (placement == "deepspeed-end" and t == place):
                want[i, t] = -coef * KL[kl]((LOGP[i, t] - REF[i, t]).item())
        want[i, place] += min(max(SCORES[i].item(), -clip), clip)
    return want


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("placement", ["last-action", "trl-end", "deepspeed-end"])
def test_a_score_lies_at_its_token_and_the_kl_at_all_live_ones(placement, kl):
    want = rewards_loop(placement, kl, 0.3, 5.0)
    seen = MASK if placement != "deepspeed-end" else want != 0
    policy, reference = torch.where(seen, LOGP, NAN), torch.where(seen, REF, INF)
    options = {"kl": kl, "kl_coef": 0.3, "score_clip": (-5, 5), "placement": placement}
    got = rlk.assemble_rewards(SCORES, MASK, logprobs=policy, ref_logprobs=reference, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    columns = {"logprobs": policy.view(-1), "ref_logprobs": reference.view(-1)}
    scores = torch.cat([SCORES[:1], torch.tensor([99.0]), SCORES[1:]])  # an empty sequence behind the first
    cu_seqlens = [0, L, L, 2 * L, 3 * L, 4 * L]
    flat = rlk.assemble_rewards(scores, MASK.view(-1), **columns, **options, cu_seqlens=cu_seqlens)
    assert torch.equal(flat.view(B, L), got)


def test_scores_of_tokens_stay_at_their_tokens():
    scores = torch.where(MASK, randn(B, L, seed=2), NAN)
    got = rlk.assemble_rewards(
        scores, MASK, logprobs=LOGP, ref_logprobs=REF, kl_coef=torch.tensor(0.5), placement="token-level"
    )
    want = torch.where(MASK, scores - 0.5 * (LOGP - REF), 0.0)
    torch.testing.assert_close(got, want)
    assert torch.equal(
        rlk.assemble_rewards(SCORES, MASK, logprobs=LOGP, ref_logprobs=REF, kl_coef=-1.0),
        rlk.assemble_rewards(SCORES, MASK),
    )


@pytest.mark.parametrize("kl_coef", (0.0, -1.0, torch.tensor(0.0)), ids=str)
def test_a_coefficient_of_zero_takes_no_penalty_of_an_impossible_token(kl_coef):
    impossible, zeros = torch.full_like(LOGP, -torch.inf), torch.zeros_like(LOGP)
    got = rlk.assemble_rewards(SCORES, MASK, logprobs=impossible, ref_logprobs=zeros, kl_coef=kl_coef)
    assert torch.equal(got, rlk.assemble_rewards(SCORES, MASK))


def test_the_kl_in_the_reward_of_rloo_is_the_sum_of_the_row():
    rewards = rlk.assemble_rewards(SCORES, MASK, logprobs=LOGP, ref_logprobs=REF, kl_coef=0.05)
    rows = rlk.sequence_sums(rewards)
    torch.testing.assert_close(rows, SCORES - 0.05 * torch.where(MASK, LOGP - REF, 0.0).sum(-1))


def test_a_baseline_comes_before_the_clip_and_the_kl():
    # OpenRLHF: reward less the mean of the group, then the range, then the KL of each token, then returns.
    ids, options = torch.tensor([1, 2, 1, 2]), {"logprobs": LOGP, "ref_logprobs": REF, "kl_coef": 0.1}
    gap = torch.stack([SCORES[0] - 1.75, SCORES[1] + 6.5, SCORES[2] - 1.75, SCORES[3] + 6.5]).clamp(-5, 5)
    want = torch.where(MASK, -0.1 * (LOGP - REF), 0.0)
    want[range(4), LAST] += gap
    baseline = rlk.group_advantages(SCORES, ids, scale=None)
    got = rlk.assemble_rewards(baseline, MASK, score_clip=(-5, 5), **options)
    torch.testing.assert_close(got, want)
    returns = rlk.discounted_returns(got, MASK, masked="zero")
    torch.testing.assert_close(
        returns, torch.where(MASK, torch.where(MASK, want, 0.0).flip(-1).cumsum(-1).flip(-1), 0.0)
    )
    # RLOO: the sum of the KL in the reward, the mean of the others, and TRL's normalisation of the batch.
    rows = SCORES - 0.1 * torch.where(MASK, LOGP - REF, 0.0).sum(-1)
    others = rows - rows[[2, 3, 0, 1]]
    got = rlk.group_advantages(
        rlk.sequence_sums(rlk.assemble_rewards(SCORES, MASK, **options)), ids, baseline="leave-one-out", scale=None
    )
    torch.testing.assert_close(got, others)
    got = rlk.group_advantages(got, ids, baseline="batch-mean", scale="batch-std", eps=1e-4)
    torch.testing.assert_close(got, (others - others.mean()) / (others.std() + 1e-4))


def test_the_mask_of_values_goes_one_token_further():
    want = MASK.clone()
    want[0, 5] = want[3, 1] = True
    assert torch.equal(rlk.extended_mask(MASK), want)
    flat = rlk.extended_mask(MASK.view(-1), [0, 0, L, 2 * L, 3 * L, 4 * L])
    assert torch.equal(flat.view(B, L), want)


def sequences_loop(rows, prompt, eos, pad):
    """OpenRLHF's rule, one row at a time."""
    found = []
    for row in rows:
        real = [t for t, x in enumerate(row) if x not in (eos, pad)]
        end = min(real[-1] + 1, len(row) - 1) if real else len(row) - 1
        ended = [eos if t == end else x for t, x in enumerate(row)]
        attention = [(real[0] if real else 0) <= t <= end for t in range(len(row))]
        actions = [x not in (eos, pad) for x in ended[prompt - 1 : -1]]
        found.append((ended, attention, [True, *actions[1:]]))
    return [torch.tensor(x) for x in zip(*found, strict=True)]


def test_sequences_end_with_eos_and_the_action_of_eos_is_live():
    generator = torch.Generator().manual_seed(3)
    sequences = torch.randint(0, 5, (64, 7), generator=generator)
    sequences[0], sequences[1] = 0, 2
    got = rlk.process_sequences(sequences, 3, eos_id=2, pad_id=0)
    for g, w in zip(got, sequences_loop(sequences.tolist(), 3, 2, 0), strict=True):
        assert torch.equal(g, w)
    assert got.action_mask.shape == (64, 4)


def test_an_id_that_the_dtype_of_the_sequences_does_not_have_is_refused():
    for name in ("eos_id", "pad_id"):
        with pytest.raises(ValueError, match=f"process_sequences: {name} is 256, which torch.uint8 does not have"):
            rlk.process_sequences(torch.zeros(1, 4, dtype=torch.uint8), 2, **{"eos_id": 2, "pad_id": 0, name: 256})


def test_the_penalty_of_length_grows_over_the_buffer():
    lengths = torch.tensor([0, 80, 90, 100, 1000])
    got = rlk.length_penalty(lengths, max_length=100, buffer=20, factor=2.0)
    assert got.tolist() == [0.0, 0.0, -1.0, -2.0, -2.0]


def test_a_truncated_answer_is_scaled_or_replaced():
    scores, cut = torch.tensor([1.0, NAN, -2.0]).bfloat16(), torch.tensor([False, False, True])
    assert rlk.truncation_penalty(scores, cut, 0.5).tolist()[::2] == [1.0, -1.0]
    assert rlk.truncation_penalty(scores, ~cut, -0.5).tolist() == [-0.5, -0.5, -2.0]
    assert rlk.truncation_penalty(scores, cut, 0.0).dtype == torch.float32


def test_groups_that_fail_or_succeed_everywhere_are_left_out():
    scores = torch.tensor([0.1, 0.0, 0.1, 1.0, 0.1, NAN, 1.0, NAN])
    ids = torch.tensor([5, 3, 5, 3, 5, 3, 8, 9])
    got = rlk.dynamic_sampling_mask(scores, ids)
    assert got.tolist() == [True, True, True, True, True, False, False, False]
    # 0.1 three times is exactly 0.1, whose sum is not 0.3.
    assert not rlk.dynamic_sampling_mask(scores, ids, low=scores[0])[ids == 5].any()


def test_the_coefficient_of_a_kl_follows_its_rule():
    fixed, adaptive, paper = (
        rlk.KLController(0.2),
        rlk.KLController(0.2, kind="adaptive", target=6.0, horizon=100),
        rlk.KLController(1.0, kind="ppo-paper", target=0.3),
    )
    for controller, kl, want in (
        (fixed, 9.0, 0.2),
        (adaptive, 6.6, 0.2 * (1 + 0.1 * 0.5)),
        (adaptive, torch.tensor(99.0), 0.21 * 1.1),
        (paper, 0.19, 0.5),
        (paper, torch.tensor(0.3).bfloat16(), 0.5),
        (paper, NAN, 0.5),
        (paper, 0.449, 0.5),
        (paper, 0.46, 1.0),
    ):
        controller.update(kl, 50)
        assert controller.coef.item() == pytest.approx(want)
    again = rlk.KLController(3.0, kind="ppo-paper", target=0.3)
    again.load_state_dict(paper.state_dict())
    again.update(1.0)
    assert again.coef.item() == 2.0 and paper.coef.item() == 1.0


def test_the_bonus_of_an_entropy_is_that_of_the_step_before():
    controller = rlk.EntropyController(0.5, target=0.2, delta=0.3, high=1.0)
    seen = []
    for entropy in (0.1, torch.tensor(0.2), NAN, 0.3, 0.1):
        seen.append(controller.applied.item())
        controller.update(entropy)
    assert seen == pytest.approx([0.0, 0.8, 1.0, 1.0, 0.0])
    other = rlk.EntropyController()
    other.load_state_dict(controller.state_dict())
    assert other.applied.item() == controller.applied.item() == pytest.approx(1.0)


def test_the_average_of_weights_keeps_its_share():
    weights = [randn(2, 3, seed=4), randn(3, seed=5).bfloat16()]
    average = rlk.WeightAverage(weights, decay=0.9)
    truth = [x.double() for x in weights]
    for k in range(3):
        moved = [x + k for x in weights]
        average.update(moved)
        truth = [0.9 * a + 0.1 * x.double() for a, x in zip(truth, moved, strict=True)]
    assert [x.dtype for x in average.tensors] == [torch.float64, torch.float32]
    for got, want in zip(average.tensors, truth, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    average.copy_to(weights)
    assert weights[1].dtype == torch.bfloat16 and torch.equal(weights[0], average.tensors[0])
    other = rlk.WeightAverage(weights)
    other.load_state_dict(average.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.tensors, average.tensors, strict=True))


def test_nothing_gives_nothing():
    zeros, none = torch.zeros(2, 0), torch.zeros(0)
    for placement in ("last-action", "trl-end", "deepspeed-end"):
        given = {"logprobs": zeros, "ref_logprobs": zeros, "kl_coef": 1.0, "placement": placement}
        assert rlk.assemble_rewards(torch.ones(2), zeros, **given).shape == (2, 0)
    assert rlk.assemble_rewards(none, none, cu_seqlens=[0]).shape == rlk.extended_mask(none, [0]).shape == (0,)
    assert rlk.dynamic_sampling_mask(none, none.long()).shape == (0,)
    assert rlk.length_penalty(none, max_length=2, buffer=1).shape == (0,)


Z, ONES = torch.zeros(2, 3), torch.ones(2)
REFUSED = [
    (lambda: rlk.assemble_rewards(ONES, Z, placement="end"), "assemble_rewards: placement must be one of last-action"),
    (lambda: rlk.assemble_rewards(ONES, Z, kl_coef=0.1), "assemble_rewards: logprobs is None; a KL needs"),
    (lambda: rlk.assemble_rewards(ONES, Z, logprobs=Z), "assemble_rewards: ref_logprobs is None; a KL needs"),
    (lambda: rlk.assemble_rewards(Z, Z), r"assemble_rewards: scores has shape \(2, 3\), expected \(2,\)"),
    (
        lambda: rlk.assemble_rewards(ONES, Z, score_clip=(1, -1)),
        r"assemble_rewards: score_clip must be a pair \(low, high\)",
    ),
    (lambda: rlk.assemble_rewards(ONES, Z, score_clip=5), "assemble_rewards: score_clip must be a pair"),
    (
        lambda: rlk.process_sequences(Z.long(), 3, eos_id=1, pad_id=0),
        "process_sequences: prompt_length must be from 1 to 2, got 3",
    ),
    (lambda: rlk.length_penalty(ONES, max_length=4, buffer=5), "length_penalty: buffer must be at most max_length"),
    (lambda: rlk.truncation_penalty(ONES, ONES, 1.5), "truncation_penalty: coef must be at most 1, got 1.5"),
    (lambda: rlk.dynamic_sampling_mask(ONES, ONES.long(), low=1.0), "dynamic_sampling_mask: low must be below high"),
    (lambda: rlk.KLController(0.1, target=1.0), "KLController: kind 'fixed' takes no target"),
    (lambda: rlk.KLController(0.1, kind="adaptive", target=1.0), "KLController: kind 'adaptive' needs horizon"),
    (lambda: rlk.KLController(-0.1), "KLController: coef must not be negative, got -0.1"),
    (lambda: rlk.KLController(0.1).update(Z[0]), r"KLController.update: kl has shape \(3,\), expected \(\)"),
    (lambda: rlk.EntropyController(2.0), r"EntropyController: coef must be in \[low, high\] = \[0.0, 1.0\], got 2.0"),
    (lambda: rlk.WeightAverage([Z]).update([Z, Z]), "WeightAverage.update: parameters has 2 tensors, expected 1"),
    (
        lambda: rlk.WeightAverage([Z]).update([ONES]),
        r"WeightAverage.update: parameters\[0\] has shape \(2,\), expected",
    ),
]


@pytest.mark.parametrize("call,message", REFUSED, ids=range(len(REFUSED)))
def test_what_these_cannot_take_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
