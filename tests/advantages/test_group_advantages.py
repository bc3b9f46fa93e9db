"""Advantages within groups against a loop over the responses, in Python floats."""

import math

import pytest
import torch

from rlkernels.advantages.group import BASELINES, SCALES, broadcast_advantages, group_advantages

# Unsorted groups of 4, 2, 1 and 3, an unscorable response in two of them, one of them left alone by that; equal rewards
# in group 5.
R = torch.tensor([1.0, 2.0, 0.0, 7.0, float("nan"), 0.5, 0.1, 1.0, 0.1, 0.1, 3.0, float("nan")], dtype=torch.float64)
IDS = torch.tensor([4, -1, 4, 9, 4, 4, 5, 4, 5, 5, 2**40, -1])


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def group_loop(rewards, ids, baseline, scale, eps, unbiased, weights):
    """Each response in turn: its group's scorable rewards, their baseline, their scale."""

    def std(xs):
        centre = math.fsum(xs) / len(xs)
        return math.sqrt(math.fsum((x - centre) ** 2 for x in xs) / max(len(xs) - unbiased, 1))

    everyone = [r for r in rewards if not math.isnan(r)]
    result = []
    for i, own in enumerate(rewards):
        group = [j for j, g in enumerate(ids) if g == ids[i] and not math.isnan(rewards[j])]
        scores = [rewards[j] for j in group]
        if math.isnan(own) or (len(scores) == 1 and (baseline not in ("batch-mean", None) or scale in ("std", "mean"))):
            result.append(0.0)
            continue
        centred = (
            own
            - {
                "mean": lambda s=scores: math.fsum(s) / len(s),
                "leave-one-out": lambda s=scores, o=own: (math.fsum(s) - o) / (len(s) - 1),
                "length-mean": lambda s=scores, g=group: (
                    sum(weights[j] * rewards[j] for j in g) / sum(weights[j] for j in g)
                ),
                "batch-mean": lambda: math.fsum(everyone) / len(everyone),
                "runner-up": lambda s=scores, o=own: sorted(s)[-2] if o == max(s) else o,
                None: lambda: 0.0,
            }[baseline]()
        )
        size = {
            "std": lambda s=scores: std(s),
            "batch-std": lambda: std(everyone),
            "mean": lambda s=scores: math.fsum(s) / len(s),
            "nonzero-share": lambda: sum(r != 0 for r in everyone) / len(everyone),
            None: lambda: None,
        }[scale]()
        equal = scale == "std" and len(set(scores)) == 1
        result.append(centred if size is None else 0.0 if equal else centred / (size + eps))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_group_advantages_equal_a_loop_over_the_responses(baseline, scale, unbiased):
    lengths = torch.arange(1, 13) if baseline == "length-mean" else None
    want = group_loop(R.tolist(), IDS.tolist(), baseline, scale, 1e-4, unbiased, list(range(1, 13)))
    got = group_advantages(R, IDS, baseline=baseline, scale=scale, eps=1e-4, unbiased=unbiased, lengths=lengths)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.fault(89)
@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-4])
@pytest.mark.parametrize("scale", ["std", "batch-std", None])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_equal_rewards_and_groups_of_one_get_exactly_zero(baseline, scale, eps):
    # 0.1 three times: the mean of the float64 sum is not 0.1, so a plain (r - mean) / std is 1e-17 / 1e-17.
    rewards, ids = (
        torch.tensor([0.1, 0.1, 0.1, 5.0, float("nan"), 3.0], dtype=torch.float64),
        torch.tensor([0, 0, 0, 1, 2, 2]),
    )
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert group_advantages(rewards.to(dtype), ids, baseline=baseline, scale=scale, eps=eps).tolist() == [0.0] * 6
        assert (
            group_advantages(rewards[:3].to(dtype), ids[:3], baseline=baseline, scale=scale, eps=eps).tolist()
            == [0.0] * 3
        )


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    got = group_advantages(
        torch.tensor([1.0, 4.0, 7.0]), torch.zeros(3, dtype=torch.int64), baseline="leave-one-out", scale=None
    )
    assert got.tolist() == [1 - 11 / 2, 4 - 8 / 2, 7 - 5 / 2]


def test_group_advantages_follow_a_permutation_of_the_responses():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(8))
    for scale in SCALES:
        want = group_advantages(R.float(), IDS, scale=scale)
        assert torch.equal(group_advantages(R[order].float(), IDS[order], scale=scale), want[order])


def test_a_group_does_not_feel_the_other_groups():
    alone = group_advantages(R[IDS == 4], IDS[IDS == 4])
    assert torch.equal(group_advantages(R, IDS)[IDS == 4], alone)


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_group_advantages_of_16_bit_rewards_are_float32(dtype, offset):
    # Groups of 64: their sum has more digits than 16 bits hold. Offset 100: so has r - mean.
    rewards = (offset + randn(256, seed=9)).to(dtype)
    ids = torch.arange(256) % 4
    got = group_advantages(rewards, ids)
    assert got.dtype == torch.float32
    want = group_loop(rewards.tolist(), ids.tolist(), "mean", "std", 1e-6, True, None)
    torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=1e-9)


def test_group_advantages_carry_no_gradient_and_keep_their_input():
    rewards = R.clone().requires_grad_()
    assert not group_advantages(rewards, IDS).requires_grad
    assert torch.equal(rewards.detach().nan_to_num(99), R.nan_to_num(99))
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_group_advantages_compile_into_one_graph_whatever_the_number_of_groups():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    compute = torch.compile(group_advantages, backend=backend, fullgraph=True)
    for n, groups in ((12, 3), (9, 9), (30, 1), (17, 4)):
        rewards, ids = randn(n, seed=n), torch.arange(n) % groups
        torch.testing.assert_close(compute(rewards, ids), group_advantages(rewards, ids))
    assert len(compiled) <= 2  # once as it comes and once for every size


def test_every_row_of_a_trajectory_gets_its_last_steps_advantage():
    # Rows of two trajectories, interleaved; steps before the last hold anything.
    rows = torch.tensor([float("nan"), 0.5, 3.0, 1.0, -0.25])
    got = broadcast_advantages(rows, torch.tensor([0, 1, 0, 0, 1]), torch.tensor([7, 7, 2, 7, 2]))
    assert got.tolist() == [0.5, 0.5, -0.25, 0.5, -0.25]


ZEROS, IDS0 = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
BAD = {
    "B44 baseline": (
        ValueError,
        "^group_advantages: baseline must be one of",
        lambda: group_advantages(ZEROS, IDS0, baseline="median"),
    ),
    "B44 scale": (
        ValueError,
        "^group_advantages: scale must be one of",
        lambda: group_advantages(ZEROS, IDS0, scale="group"),
    ),
    "B51 dtype": (
        TypeError,
        "^group_advantages: group_ids must be an integer tensor, got torch.float32",
        lambda: group_advantages(ZEROS, IDS0.float()),
    ),
    "B51 shape": (
        ValueError,
        r"^group_advantages: group_ids has shape \(2,\), expected \(3,\)",
        lambda: group_advantages(torch.zeros(3), IDS0),
    ),
    "per token": (
        ValueError,
        r"^group_advantages: rewards has shape \(2, 3\), expected \[N\]",
        lambda: group_advantages(torch.zeros(2, 3), IDS0),
    ),
    "eps": (
        ValueError,
        "^group_advantages: eps must be finite and not negative, got -1",
        lambda: group_advantages(ZEROS, IDS0, eps=-1),
    ),
    "lengths missing": (
        ValueError,
        "^group_advantages: baseline 'length-mean' needs lengths",
        lambda: group_advantages(ZEROS, IDS0, baseline="length-mean"),
    ),
    "lengths unused": (
        ValueError,
        "^group_advantages: baseline 'mean' takes no lengths",
        lambda: group_advantages(ZEROS, IDS0, lengths=torch.ones(2)),
    ),
    "trajectories": (
        ValueError,
        r"^broadcast_advantages: trajectory_ids has shape \(1,\), expected \(2,\)",
        lambda: broadcast_advantages(ZEROS, torch.ones(2), IDS0[:1]),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call()
