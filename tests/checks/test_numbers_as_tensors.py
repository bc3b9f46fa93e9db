"""Numbers that come as tensors: on another device (F131), with a tangent (F145), in a subclass (F139); dtypes and
layouts that torch treats in its own way.
"""

import math

import pytest
import torch
from torch.autograd import forward_ad

import rlkernels as rlk

draw = torch.Generator().manual_seed(0)
LOGP, OLD, A = torch.randn(3, 6, 10, generator=draw)
X, Y = torch.randn(6, 10, 4, generator=draw), torch.zeros(6, 10, dtype=torch.long)
HIDDEN, HEAD, SUMS = (
    torch.randn(6, 10, 5, generator=draw),
    torch.randn(4, 5, generator=draw),
    torch.randn(4, generator=draw),
)
MASK, GOOD = torch.rand(6, 10, generator=draw) < 0.7, torch.tensor([True, False, True, True])
NUMBERS = {
    "policy_loss clip_low": lambda n: rlk.policy_loss(LOGP, OLD, A, clip_low=n),
    "policy_loss kl_coef": lambda n: rlk.policy_loss(LOGP, OLD, A, kl_coef=n, ref_logprobs=OLD),
    "policy_loss entropy_coef": lambda n: rlk.policy_loss(LOGP, OLD, A, entropy_coef=n, entropy=A),
    "policy_loss batch_num_tokens": lambda n: rlk.policy_loss(LOGP, OLD, A, normalizers={"batch_num_tokens": n}),
    "logits_policy_loss clip_high": lambda n: rlk.logits_policy_loss(X, Y, OLD, A, clip_high=n),
    "linear_policy_loss clip_low": lambda n: rlk.linear_policy_loss(HIDDEN, HEAD, Y, OLD, A, clip_low=n),
    "value_loss clip_range": lambda n: rlk.value_loss(LOGP, OLD, A, clip_range=n),
    "pairwise_reward_loss center_coef": lambda n: rlk.pairwise_reward_loss(SUMS, -SUMS, center_coef=n),
    "dpo_loss beta": lambda n: rlk.dpo_loss(SUMS, -SUMS, SUMS, SUMS, beta=n),
    "dpo_loss label_smoothing": lambda n: rlk.dpo_loss(SUMS, -SUMS, SUMS, SUMS, label_smoothing=n),
    "dpo_loss loss_weights": lambda n: rlk.dpo_loss(SUMS, -SUMS, SUMS, SUMS, loss_type=("sigmoid",), loss_weights=(n,)),
    "dpo_loss alpha": lambda n: rlk.dpo_loss(SUMS, -SUMS, SUMS, SUMS, f_divergence="alpha_divergence", alpha=n),
    "unpaired_preference_loss beta": lambda n: rlk.unpaired_preference_loss(SUMS, SUMS, GOOD, kl=0.0, beta=n),
    "unpaired_preference_loss kl": lambda n: rlk.unpaired_preference_loss(SUMS, SUMS, GOOD, kl=n),
    "unpaired_preference_loss desirable_weight": lambda n: rlk.unpaired_preference_loss(
        SUMS, SUMS, GOOD, kl=0.0, desirable_weight=n
    ),
    "linear_token_logprobs softcap": lambda n: rlk.linear_token_logprobs(HIDDEN, HEAD, Y, softcap=n),
    "token_logprobs temperature": lambda n: rlk.token_logprobs(X, Y, temperature=n),
    "gae gamma": lambda n: rlk.gae(A, OLD, gamma=n),
    "vtrace c_max": lambda n: rlk.vtrace(A, OLD, LOGP, OLD, c_max=n),
    "assemble_rewards kl_coef": lambda n: rlk.assemble_rewards(
        A, MASK, logprobs=LOGP, ref_logprobs=OLD, kl_coef=n, placement="token-level"
    ),
    "masked_whiten eps": lambda n: rlk.masked_whiten(A, MASK, eps=n),
    "group_advantages eps": lambda n: rlk.group_advantages(SUMS, GOOD.long(), eps=n),
    "token_weights scale": lambda n: rlk.token_weights(MASK, scale=n),
    "length_desensitized_weights ld_alpha": lambda n: rlk.length_desensitized_weights(MASK, MASK, n),
}


@pytest.mark.fault(131)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_on_another_device_is_refused_by_name(name, backend):
    function, argument = name.split(" ")
    with pytest.raises((RuntimeError, TypeError), match=rf"^{function}: .*\b{argument}\b.*\bmeta\b"):
        NUMBERS[name](torch.tensor(0.2, device="meta"))


@pytest.mark.fault(145)
@pytest.mark.parametrize("name", NUMBERS)
def test_the_tangent_of_a_number_is_not_dropped(name):
    with forward_ad.dual_level():
        number = forward_ad.make_dual(torch.tensor(0.2), torch.tensor(1.0))
        with pytest.raises(
            RuntimeError,
            match=f"^{name.split(' ')[0]}: forward-mode AD is not supported by rlkernels; use reverse mode",
        ):
            NUMBERS[name](number)


class Named(torch.Tensor):
    """A subclass that adds nothing to a tensor: what Parameter and Buffer are, and what libraries make to tell tensors
    apart.
    """


def named(x, dtype=torch.float32):
    return torch.tensor(x, dtype=dtype).as_subclass(Named)


BAD = {
    "kl must be at least 0": lambda: rlk.unpaired_preference_loss(SUMS, SUMS, GOOD, kl=named(-2.0)),
    "mask holds 0.5": lambda: rlk.policy_loss(LOGP, OLD, A, torch.full((6, 10), 0.5).as_subclass(Named)),
    "beta must be positive": lambda: rlk.dpo_loss(SUMS, SUMS, SUMS, SUMS, beta=named(-2.0)),
    "clip_low must be in": lambda: rlk.policy_loss(LOGP, OLD, A, clip_low=named(-2.0)),
    "kl_coef must be finite": lambda: rlk.policy_loss(LOGP, OLD, A, kl_coef=named(math.inf), ref_logprobs=OLD),
    "batch_num_tokens must be finite and not negative": lambda: rlk.token_weights(
        MASK, batch_num_tokens=named(-3, torch.int64)
    ),
    "chosen_lengths holds -1": lambda: rlk.dpo_loss(
        SUMS,
        SUMS,
        SUMS,
        SUMS,
        loss_type="sigmoid_norm",
        rejected_lengths=torch.ones(4),
        chosen_lengths=named([1, 1, -1, 1], torch.int64),
    ),
}


@pytest.mark.fault(139)
@pytest.mark.parametrize("message", BAD)
def test_values_in_a_subclass_that_adds_nothing_are_looked_at(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


@pytest.mark.fault(148)
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_integers_that_torch_cannot_add_are_refused_by_name(dtype):
    ids, ones = torch.tensor([1, 1, 0, 2]).to(dtype), torch.ones(4).to(dtype)
    for where, call in (
        ("group_advantages", lambda: rlk.group_advantages(SUMS, ids)),
        ("token_weights", lambda: rlk.token_weights(torch.ones(4), "group-mean", group_ids=ids)),
        ("policy_loss", lambda: rlk.policy_loss(SUMS, SUMS, SUMS, ones)),
        (
            "dpo_loss",
            lambda: rlk.dpo_loss(
                SUMS, SUMS, SUMS, SUMS, loss_type="sigmoid_norm", chosen_lengths=ones, rejected_lengths=ones
            ),
        ),
    ):
        with pytest.raises(TypeError, match=f"^{where}: .*{dtype}"):
            call()


@pytest.mark.fault(148)
def test_what_is_no_option_is_refused_by_name():
    for call, error, message in (
        (lambda: rlk.aggregate(A, caller=3), TypeError, r"aggregate\(\) got an unexpected keyword argument 'caller'"),
        (lambda: rlk.aggregate(A, where=3), TypeError, r"aggregate\(\) got an unexpected keyword argument 'where'"),
        (
            lambda: rlk.token_weights(MASK, "seq-mean", count_empty_rows="no"),
            TypeError,
            "token_weights: count_empty_rows must be True or False, got str",
        ),
        (lambda: rlk.spans_to_mask([[1, 2]], 2**62), ValueError, r"spans_to_mask: length must be at most 2\*\*31"),
        (lambda: rlk.objective(3), TypeError, "objective: expected a function with a name, got int"),
        (
            lambda: rlk.objective(lambda logp: (logp, 1.0)),
            TypeError,
            "objective: expected a function with a name, got a lambda",
        ),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call()


@pytest.mark.fault(148)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_weights_on_another_device_are_refused_by_the_name_of_what_was_called(level):
    with pytest.raises(
        RuntimeError, match="^logits_policy_loss: logprobs and weights must be on one device, got cpu and meta"
    ):
        rlk.logits_policy_loss(X, Y, OLD, A, weights=A.to("meta"), ratio_level=level)


@pytest.mark.fault(120)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_plain_torch_do_not_follow_the_layout(dtype):
    x = torch.randn(33, 257, generator=draw, dtype=dtype)
    mask = torch.rand(33, 257, generator=draw) < 0.7

    def turned(x):
        return x.t().contiguous().t()

    for call in (
        lambda x, m: rlk.masked_whiten(x, m, dim=1),
        rlk.masked_whiten,
        lambda x, m: rlk.masked_whiten(x, dim=1),
        rlk.aggregate,
        lambda x, m: rlk.aggregate(x, m, "seq-mean-token-mean"),
        rlk.sequence_sums,
        rlk.sequence_means,
    ):
        want = call(x, mask)
        for a, b in ((turned(x), mask), (x, turned(mask)), (turned(x), turned(mask))):
            assert torch.equal(call(a, b), want)
