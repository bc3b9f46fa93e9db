"""GAE and discounted returns against a loop in Python floats, on every backend."""

import time

import pytest
import torch

from rlkernels.advantages.gae import MASKED, discounted_returns, gae
from rlkernels.advantages.whitening import masked_whiten
from rlkernels.backends import absent, use_backend

HERE = [name for name in ("eager", "cpu") if absent(name) is None]
# Holes at the start, in the middle and at the end; no hole; nothing alive.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
B, L = MASK.shape
BOOTSTRAP = torch.tensor([0.5, -1.0, 2.0, 9.0, 0.25], dtype=torch.float64)


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


REWARDS, VALUES = randn(B, L, seed=0), randn(B, L, seed=1)


def gae_row(rewards, values, live, gamma, lam, masked, bootstrap=0.0):
    """One row, from its end, in Python floats; ``bootstrap`` is the value after the last live token."""
    live = [True] * len(rewards) if masked == "none" else live
    last = max((t for t, m in enumerate(live) if m), default=None)
    next_value = trace = 0.0
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for t in reversed(range(len(rewards))):
        if not live[t] and masked == "skip":
            continue
        reward, value = (rewards[t], values[t]) if live[t] else (0.0, 0.0)
        if t == last:
            next_value = bootstrap
        trace = reward + gamma * next_value - value + gamma * lam * trace
        next_value = value
        if live[t]:
            advantages[t], returns[t] = trace, trace + value
    return advantages, returns


def gae_loop(rewards, values, mask, gamma, lam, masked, bootstrap=None):
    bootstrap = [0.0] * len(rewards) if bootstrap is None else bootstrap.tolist()
    rows = [
        gae_row(*row, gamma, lam, masked, b)
        for *row, b in zip(rewards.double().tolist(), values.double().tolist(), mask.tolist(), bootstrap, strict=True)
    ]
    return tuple(torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))


def pack(*tensors):
    """The packed twin: rows cut after their last live token, so row 3 has length 0."""
    keep = torch.tensor([int(row.nonzero().max()) + 1 if row.any() else 0 for row in MASK])
    inside = torch.arange(L)[None] < keep[:, None]
    return [x[inside] for x in tensors], inside, torch.cat([torch.zeros(1, dtype=torch.int64), keep.cumsum(0)])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("bootstrap", [None, BOOTSTRAP])
@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.0, 0.5), (0.97, 0.0)])
@pytest.mark.parametrize("masked", MASKED)
def test_gae_equals_a_loop_from_the_end(masked, gamma, lam, bootstrap, backend):
    want = gae_loop(REWARDS, VALUES, MASK, gamma, lam, masked, bootstrap)
    with use_backend(backend):
        got = gae(REWARDS, VALUES, MASK, gamma=gamma, lam=lam, masked=masked, bootstrap_values=bootstrap)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)


@pytest.mark.fault(87)
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("bootstrap", [None, BOOTSTRAP])
@pytest.mark.parametrize("masked", ["skip", "zero"])
def test_packed_gae_equals_padded_gae(masked, bootstrap, backend):
    (rewards, values, mask), inside, cu_seqlens = pack(REWARDS, VALUES, MASK)
    with use_backend(backend):
        padded = gae(REWARDS, VALUES, MASK, gamma=0.9, lam=0.8, masked=masked, bootstrap_values=bootstrap)
        packed = gae(
            rewards,
            values,
            mask,
            gamma=0.9,
            lam=0.8,
            masked=masked,
            cu_seqlens=cu_seqlens.int(),
            bootstrap_values=bootstrap,
        )
    for a, b in zip(packed, padded, strict=True):
        assert torch.equal(a, b[inside])


@pytest.mark.fault(85)
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("garbage", [100.0, float("nan"), float("inf")])
@pytest.mark.parametrize("masked", ["skip", "zero"])
def test_what_dead_tokens_hold_changes_nothing(masked, garbage, backend):
    dirty = [torch.where(MASK, x, garbage) for x in (REWARDS, VALUES)]
    with use_backend(backend):
        clean = gae(REWARDS, VALUES, MASK, gamma=0.9, lam=0.8, masked=masked)
        assert all(
            torch.equal(a, b) for a, b in zip(gae(*dirty, MASK, gamma=0.9, lam=0.8, masked=masked), clean, strict=True)
        )
        returns = discounted_returns(REWARDS, MASK, gamma=0.9, masked=masked)
        assert torch.equal(discounted_returns(dirty[0], MASK, gamma=0.9, masked=masked), returns)


@pytest.mark.fault(85)
def test_inserted_dead_tokens_leave_skip_gae_alone_and_change_zero_gae():
    rewards, values, mask = (torch.zeros(B, 13, dtype=x.dtype) for x in (REWARDS, VALUES, MASK))
    place = torch.tensor([0, 2, 3, 7, 8, 9, 11, 12])
    rewards[:, place], values[:, place], mask[:, place] = REWARDS, VALUES, MASK
    for masked, same in (("skip", True), ("zero", False)):
        inserted, compact = (
            gae(rewards, values, mask, gamma=0.9, masked=masked),
            gae(REWARDS, VALUES, MASK, gamma=0.9, masked=masked),
        )
        assert torch.equal(inserted[0][:, place], compact[0]) == same


@pytest.mark.fault(86)
def test_more_padding_and_other_rows_leave_the_bits_alone():
    few, many = gae(REWARDS[:2].float(), VALUES[:2].float(), MASK[:2]), gae(REWARDS.float(), VALUES.float(), MASK)
    wide = gae(*(torch.nn.functional.pad(x, (4, 100)) for x in (REWARDS.float(), VALUES.float(), MASK)))
    for a, b, c in zip(few, many, wide, strict=True):
        assert torch.equal(a, b[:2])
        assert torch.equal(c[:, 4:-100], b)


def test_gae_with_lambda_and_gamma_of_one_is_reward_to_go_minus_value():
    advantages, returns = gae(REWARDS, VALUES, lam=1.0)
    to_go = REWARDS.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, to_go - VALUES)
    torch.testing.assert_close(discounted_returns(REWARDS), to_go)


def test_one_token_has_the_advantage_reward_minus_value():
    advantages, returns = gae(torch.tensor([[2.0]]), torch.tensor([[0.75]]))
    assert (advantages.item(), returns.item()) == (1.25, 2.0)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gae_of_16_bit_inputs_is_a_float32_gae_of_their_values(dtype, backend):
    # 2048 tokens without discount: a running sum in 16 bits would stop moving after a few hundred.
    rewards, values = randn(2, 2048, seed=5, dtype=dtype), randn(2, 2048, seed=6, dtype=dtype)
    mask = torch.rand(2, 2048, generator=torch.Generator().manual_seed(7)) < 0.9
    want = gae_loop(rewards, values, mask, 1.0, 1.0, "skip")
    with use_backend(backend):
        got = gae(rewards, values, mask, lam=1.0)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), w, rtol=6e-8, atol=1e-9)


def test_gae_takes_masks_of_any_dtype_and_strided_inputs():
    want = gae(REWARDS, VALUES, MASK)
    assert torch.equal(gae(REWARDS, VALUES, MASK * 3)[0], want[0])
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(gae(REWARDS, VALUES, MASK.to(dtype))[0], want[0])
    transposed = [x.t().contiguous().t() for x in (REWARDS, VALUES, MASK)]
    assert torch.equal(gae(*transposed)[1], want[1])


def test_gae_leaves_inputs_and_graph_alone():
    rewards, values = REWARDS.clone(), VALUES.clone().requires_grad_()
    advantages, returns = gae(rewards, values, MASK, bootstrap_values=BOOTSTRAP)
    assert not advantages.requires_grad and not returns.requires_grad
    assert torch.equal(rewards, REWARDS) and torch.equal(values, VALUES)


@pytest.mark.parametrize("backend", HERE)
def test_gae_of_nothing_is_nothing(backend):
    with use_backend(backend):
        for shape, cu_seqlens in (
            ((0, 5), None),
            ((3, 0), None),
            ((0,), torch.tensor([0])),
            ((0,), torch.tensor([0, 0])),
        ):
            assert gae(torch.zeros(shape), torch.zeros(shape), cu_seqlens=cu_seqlens)[0].shape == shape


def test_nan_in_a_live_token_stays_in_its_row():
    rewards = REWARDS.clone()
    rewards[1, 6] = float("nan")
    assert gae(rewards, VALUES, MASK)[0].isnan().any(-1).tolist() == [False, True, False, False, False]


@pytest.mark.fault(97)
@pytest.mark.skipif("cpu" not in HERE, reason=f"the native cpu backend is absent: {absent('cpu')}")
def test_gae_over_131072_tokens_takes_at_most_10_ms():
    rewards, values = torch.randn(1, 131072), torch.randn(1, 131072)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        gae(rewards, values)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 0.010


def test_gae_and_whitening_compile_without_a_graph_break():
    def advantages(rewards, values, mask, gamma):
        return masked_whiten(gae(rewards, values, mask, gamma=gamma)[0], mask) + discounted_returns(rewards, mask)

    torch._dynamo.reset()
    compute = torch.compile(advantages, backend="eager", fullgraph=True)
    for length, gamma in ((8, 0.9), (5, 0.99), (7, 1.0)):
        arguments = REWARDS[:, :length], VALUES[:, :length], MASK[:, :length], gamma
        torch.testing.assert_close(compute(*arguments), advantages(*arguments))


@pytest.mark.parametrize("masked", MASKED)
def test_discounted_returns_equal_a_loop(masked):
    want = gae_loop(REWARDS, torch.zeros_like(REWARDS), MASK, 0.9, 1.0, masked)[1]
    torch.testing.assert_close(discounted_returns(REWARDS, MASK, gamma=0.9, masked=masked), want)
    if masked != "none":
        (rewards, mask), inside, cu_seqlens = pack(REWARDS, MASK)
        torch.testing.assert_close(
            discounted_returns(rewards, mask, gamma=0.9, masked=masked, cu_seqlens=cu_seqlens), want[inside]
        )


ZEROS = torch.zeros(2, 3)
BAD = {
    "B49 gamma": (ValueError, r"^gae: gamma must be in \[0, 1\], got 1.5", lambda: gae(ZEROS, ZEROS, gamma=1.5)),
    "B49 lam": (ValueError, r"^gae: lam must be in \[0, 1\], got nan", lambda: gae(ZEROS, ZEROS, lam=float("nan"))),
    "B49 returns": (
        ValueError,
        r"^discounted_returns: gamma must be in \[0, 1\], got "
        r"-0.1",
        lambda: discounted_returns(ZEROS, gamma=-0.1),
    ),
    "B50": (ValueError, r"^gae: values has shape \(2, 4\), expected \(2, 3\)", lambda: gae(ZEROS, torch.zeros(2, 4))),
    "B44": (
        ValueError,
        r"^gae: masked must be one of skip, zero, none; got "
        r"'drop'",
        lambda: gae(ZEROS, ZEROS, masked="drop"),
    ),
    "B15": (ValueError, r"^gae: mask has shape \(3,\), expected \(2, 3\)", lambda: gae(ZEROS, ZEROS, torch.ones(3))),
    "B16": (
        TypeError,
        "^gae: mask must be bool, integer or floating",
        lambda: gae(ZEROS, ZEROS, ZEROS.to(torch.complex64)),
    ),
    "B40": (
        ValueError,
        "^gae: cu_seqlens ends at 2, expected the number of tokens, 3",
        lambda: gae(ZEROS[0], ZEROS[0], cu_seqlens=torch.tensor([0, 2])),
    ),
    "no layout": (
        ValueError,
        r"^gae: rewards has shape \(3,\), expected \[B, L\], or \[N\] together with cu_seqlens",
        lambda: gae(ZEROS[0], ZEROS[0]),
    ),
    "B03 complex": (
        TypeError,
        "^gae: rewards has dtype torch.complex64; supported: ",
        lambda: gae(ZEROS.to(torch.complex64), ZEROS),
    ),
    "F73": (
        ValueError,
        r"^gae: bootstrap_values has shape \(2, 1\), expected \(2,\)",
        lambda: gae(ZEROS, ZEROS, bootstrap_values=torch.zeros(2, 1)),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call()
