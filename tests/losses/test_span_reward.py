"""span_reward_loss against DeepSpeed-Chat's rules, written out pair by pair."""

import math

import pytest
import torch
from reference import same_bits
from torch.nn.functional import logsigmoid

import rlkernels as rlk

NAN, INF = math.nan, math.inf
PAD = 0


def truth(rewards, ids, pad=PAD, skipped=0):
    """``(loss, chosen scores, rejected scores, span)``, one pair after the other."""
    pairs, length = ids.shape[0] // 2, ids.shape[1]
    losses, ends = [], ([], [])
    span = torch.zeros(pairs, length, dtype=torch.bool)
    for i in range(pairs):
        c, q = ids[i].tolist(), ids[i + pairs].tolist()
        lengths = []
        for row in (c, q):
            pads = [t for t in range(length) if row[t] == pad]
            lengths.append(pads[skipped] if len(pads) > skipped else length)
        if c == q:
            first, end = length - 1, length
        else:
            first, end = next(t for t in range(length) if c[t] != q[t]), max(lengths)
        span[i, first:end] = True
        if first < end:
            losses.append(-logsigmoid(rewards[i, first:end] - rewards[i + pairs, first:end]).mean())
        for k, n in enumerate(lengths):
            ends[k].append(rewards[i + k * pairs, n - 1])
    loss = torch.stack(losses).mean() if losses else rewards.sum() * 0
    return loss, *(torch.stack(x) for x in ends), span


def problem(seed=0, pairs=7, length=9, dtype=torch.float64):
    """Prompts of one token at least; padding inside of answers, answers without any, one identical pair."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(PAD, 5, (2 * pairs, length), generator=draw)
    ids[:, 0] = 7
    ids[3], ids[3 + pairs] = torch.arange(1, length + 1), torch.arange(1, length + 1)
    ids[4] = 8
    ids[4 + pairs] = 8
    ids[4 + pairs, -1] = 9
    return (2 * torch.randn(2 * pairs, length, generator=draw, dtype=torch.float64)).to(dtype), ids


@pytest.mark.parametrize("skipped", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_scores_and_gradient_are_those_of_every_pair_by_itself(dtype, skipped, backend):
    for seed in range(3):
        rewards, ids = problem(seed, dtype=dtype)
        leaf, wide = rewards.requires_grad_(), rewards.detach().double().requires_grad_()
        got = rlk.span_reward_loss(leaf, ids.int(), PAD, num_padding_at_beginning=skipped)
        want = truth(wide, ids, skipped=skipped)[:3]
        rtol = 1e-12 if dtype == torch.float64 else 1e-6
        for a, b in zip(got, want, strict=True):
            assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol)
        factors = [torch.randn(x.shape, dtype=torch.float64) for x in want]
        (slope,) = torch.autograd.grad(want, wide, factors)
        (found,) = torch.autograd.grad(got, leaf, [f.to(x.dtype) for f, x in zip(factors, got, strict=True)])
        coarse = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(found.double(), slope, rtol=coarse, atol=coarse)


def test_an_identical_pair_is_compared_at_the_last_column_alone():
    rewards = torch.tensor([[0.0, 1.0, 0.25], [0.0, -1.0, 0.25]], requires_grad=True)
    loss, chosen, rejected = rlk.span_reward_loss(rewards, torch.tensor([[5, 6, PAD], [5, 6, PAD]]), PAD)
    assert loss.item() == pytest.approx(math.log(2)) and chosen.item() == 1.0 and rejected.item() == -1.0
    (gradient,) = torch.autograd.grad(loss, rewards)
    assert gradient.tolist() == [[0.0, 0.0, -0.5], [0.0, 0.0, 0.5]]


def test_positions_behind_the_shorter_answer_count_up_to_the_end_of_the_longer_one():
    rewards = torch.zeros(2, 5, requires_grad=True)
    ids = torch.tensor([[5, 6, PAD, PAD, PAD], [5, 7, 8, 9, PAD]])
    (gradient,) = torch.autograd.grad(rlk.span_reward_loss(rewards, ids, PAD)[0], rewards)
    assert gradient[0].tolist() == pytest.approx([0.0, -1 / 6, -1 / 6, -1 / 6, 0.0])


def test_padding_inside_of_an_answer_ends_it_and_a_row_of_padding_gives_its_last_column():
    ids = torch.tensor([[5, 6, PAD, 7], [5, 8, 9, PAD], [PAD, 5, 6, 7], [PAD, 8, 6, 7]])
    rewards = torch.arange(16.0).view(4, 4)
    _, chosen, rejected = rlk.span_reward_loss(rewards, ids[[0, 2, 1, 3]], PAD)
    assert chosen.tolist() == [1.0, 7.0] and rejected.tolist() == [10.0, 15.0]


def test_a_pair_whose_span_is_empty_does_not_count():
    # The second pair differs behind the ends of both of its answers.
    ids = torch.tensor([[5, 6, 7], [5, PAD, 6], [5, 8, 7], [5, PAD, 7]])
    rewards = torch.tensor([[0.0, 1.0, 2.0], [NAN, 1.0, NAN], [0.0, 0.5, 1.0], [1.0, 2.0, NAN]], requires_grad=True)
    loss = rlk.span_reward_loss(rewards, ids, PAD)[0]
    assert loss.item() == pytest.approx((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1.0))) / 2)
    (gradient,) = torch.autograd.grad(loss, rewards)
    assert not gradient[1].any() and not gradient[3].any()
    counted = rlk.span_reward_loss(rewards.nan_to_num(), ids, PAD, normalizers={"count_empty_rows": True})[0]
    assert counted.item() == pytest.approx(loss.item() / 2)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_what_lies_outside_of_the_span_reaches_neither_loss_nor_gradient(garbage, backend):
    rewards, ids = problem(1, dtype=torch.float32)
    span = truth(rewards, ids)[3].repeat(2, 1)
    results = []
    for poison in (0.5, garbage):
        leaf = rewards.masked_fill(~span, poison).requires_grad_()
        loss = rlk.span_reward_loss(leaf, ids, PAD)[0]
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert results[1][1].isfinite().all() and not results[1][1][~span].any()


def test_no_pair_gives_zero_with_a_gradient(backend):
    for shape in ((0, 4), (0, 0)):
        leaf = torch.zeros(shape, requires_grad=True)
        loss, chosen, rejected = rlk.span_reward_loss(leaf, torch.zeros(shape, dtype=torch.int64), PAD)
        assert loss.item() == 0.0 and chosen.shape == rejected.shape == (0,)
        assert torch.autograd.grad(loss, leaf)[0].shape == shape


def test_micro_batches_with_the_number_of_pairs_of_the_batch_add_up_to_it(backend):
    rewards, ids = problem(2)
    pairs = len(ids) // 2
    live = truth(rewards, ids)[3].any(-1).sum()
    parts = [
        rlk.span_reward_loss(rewards[i::pairs], ids[i::pairs], PAD, normalizers={"num_sequences": live})[0]
        for i in range(pairs)
    ]
    torch.testing.assert_close(sum(parts), rlk.span_reward_loss(rewards, ids, PAD)[0], rtol=1e-12, atol=0)


def test_a_first_token_that_differs_is_refused_unless_it_is_allowed():
    rewards, ids = problem(3)
    ids[5, 0] = 6
    with pytest.raises(ValueError, match="^span_reward_loss: pair 5 differs at its first token"):
        rlk.span_reward_loss(rewards, ids, PAD)
    got = rlk.span_reward_loss(rewards, ids, PAD, allow_first_difference=True)
    torch.testing.assert_close(got, truth(rewards, ids)[:3], rtol=1e-12, atol=0)


def test_the_derivative_is_that_of_the_differences():
    rewards, ids = problem(4)
    with rlk.use_backend("eager"):
        assert torch.autograd.gradcheck(lambda x: rlk.span_reward_loss(x, ids, PAD), rewards.requires_grad_())


R, IDS = torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.int64)
BAD = {
    "one dimension": (
        ValueError,
        r"rewards has shape \(12,\), expected \[2 B, L\]",
        (R.view(-1), IDS.view(-1), PAD),
        {},
    ),
    "no token": (ValueError, "answers without a token have no score", (R[:, :0], IDS[:, :0], PAD), {}),
    "rewards as integers": (TypeError, "rewards has dtype torch.int64", (IDS, IDS, PAD), {}),
    "ids as floats": (TypeError, "input_ids must be an integer tensor", (R, R, PAD), {}),
    "ids of another shape": (ValueError, r"input_ids has shape \(4, 2\)", (R, IDS[:, :2], PAD), {}),
    "pad as a float": (TypeError, "pad_id must be int", (R, IDS, 0.5), {}),
    "negative": (
        ValueError,
        "num_padding_at_beginning must not be negative",
        (R, IDS, 0),
        {"num_padding_at_beginning": -1},
    ),
    "flag": (TypeError, "allow_first_difference must be True or False", (R, IDS, 0), {"allow_first_difference": 1}),
    "normaliser": (ValueError, "takes no horizon", (R, IDS, 0), {"normalizers": {"horizon": 3}}),
}


@pytest.mark.parametrize("case", BAD)
def test_span_reward_loss_refuses_what_it_would_guess(case):
    error, message, arguments, options = BAD[case]
    with pytest.raises(error, match=f"^span_reward_loss: .*{message}"):
        rlk.span_reward_loss(*arguments, **options)
