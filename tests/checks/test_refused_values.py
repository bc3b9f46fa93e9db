"""F139: values that would be wrong in silence: weights and additive numbers as masks, counts in 16 bits, negative
lengths, a negative KL.
"""

import math

import host_reads
import pytest
import torch

import rlkernels as rlk

B, L, V, H = 4, 3, 5, 4
draw = torch.Generator().manual_seed(0)
Z, OLD, A = (torch.randn(B, L, generator=draw) for _ in range(3))
X, Y = torch.randn(B, L, V, generator=draw), torch.randint(0, V, (B, L), generator=draw)
HIDDEN, HEAD, SUMS = (
    torch.randn(B, L, H, generator=draw),
    torch.randn(V, H, generator=draw),
    -torch.rand(B, generator=draw),
)
GOOD = torch.tensor([1, 0, 1, 0])
MASKED = {
    "policy_loss": lambda m: rlk.policy_loss(Z, OLD, A, m),
    "policy_loss sequence": lambda m: rlk.policy_loss(
        Z, OLD, A, m, ratio_level="sequence_sum", aggregation="seq-mean-token-mean"
    ),
    "logits_policy_loss": lambda m: rlk.logits_policy_loss(X, Y, OLD, A, m),
    "linear_policy_loss": lambda m: rlk.linear_policy_loss(HIDDEN, HEAD, Y, OLD, A, m),
    "value_loss": lambda m: rlk.value_loss(Z, OLD, A, m),
    "sft_loss": lambda m: rlk.sft_loss(X, Y, m),
    "logprobs_sft_loss": lambda m: rlk.logprobs_sft_loss(Z, m),
    "linear_sft_loss": lambda m: rlk.linear_sft_loss(HIDDEN, HEAD, Y, m),
    "linear_dpo_loss": lambda m: rlk.linear_dpo_loss(
        HIDDEN, HEAD, Y, m, ref_chosen_logps=SUMS[:2], ref_rejected_logps=SUMS[2:]
    ),
    "linear_unpaired_preference_loss": lambda m: rlk.linear_unpaired_preference_loss(
        HIDDEN, HEAD, Y, SUMS, GOOD, m, kl=0.0
    ),
    "aggregate": lambda m: rlk.aggregate(Z, m),
    "token_weights": rlk.token_weights,
    "sequence_sums": lambda m: rlk.sequence_sums(Z, m),
    "sequence_means": lambda m: rlk.sequence_means(Z, m),
    "broadcast_to_tokens": lambda m: rlk.broadcast_to_tokens(SUMS, m),
    "gae": lambda m: rlk.gae(Z, OLD, m)[0],
    "discounted_returns": lambda m: rlk.discounted_returns(Z, m),
    "vtrace": lambda m: rlk.vtrace(Z, OLD, Z, OLD, m)[0],
    "step_advantages": lambda m: rlk.step_advantages(Z, torch.ones_like(Z), torch.arange(len(Z)) % 2, m),
    "optimal_token_advantages": lambda m: rlk.optimal_token_advantages(Z, OLD, OLD, torch.arange(len(Z)) % 2, m)[0],
    "assemble_rewards": lambda m: rlk.assemble_rewards(Z, m, placement="token-level"),
    "extended_mask": rlk.extended_mask,
    "masked_whiten": lambda m: rlk.masked_whiten(Z, m),
    "length_desensitized_weights": lambda m: rlk.length_desensitized_weights(m, m, 0.5)[0],
    "reward_scores attention": lambda m: rlk.reward_scores(HIDDEN, HEAD[:1], attention_mask=m),
}


def mask(*dead, live=1.0, holding=0.0, dtype=torch.float32):
    """Live but at ``dead`` places, which hold ``holding``."""
    m = torch.full((B, L), live, dtype=dtype)
    for i, j in dead:
        m[i, j] = holding
    return m


@pytest.mark.fault(139)
@pytest.mark.parametrize("name", MASKED)
def test_a_float_mask_of_other_values_than_0_and_1_is_refused(name):
    function, argument = (
        name.split()[0],
        {"attention": "attention_mask"}.get(name.split()[-1], "chosen_mask" if "desensitized" in name else "mask"),
    )
    places = [(1, 2), (3, 0)]
    bad = {
        "a weight": (mask(*places, holding=0.5), "0.5"),
        "an additive mask": (mask(*places, live=0.0, holding=-math.inf), "-inf"),
        "an additive mask of large numbers": (mask(*places, live=0.0, holding=-1e9), "-1000000000.0"),
        "NaN": (mask(*places, holding=math.nan), "nan"),
        "16 bits": (mask(*places, holding=0.25, dtype=torch.bfloat16), "0.25"),
        "2": (mask(*places, holding=2.0), "2.0"),
    }
    for what, (m, value) in bad.items():
        with pytest.raises(
            ValueError,
            match=rf"^{function}: {argument} holds {value}, expected 0 and 1 alone; weights "
            rf".* weights=, .* {argument} == 0",
        ):
            pytest.fail(f"{what} was taken: {MASKED[name](m)}")


@pytest.mark.fault(139)
@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_any_dtype_is_the_same_mask(name):
    want = MASKED[name](mask((1, 2), (3, 0)) != 0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8):
        assert torch.equal(MASKED[name](mask((1, 2), (3, 0), dtype=dtype)), want), dtype
    # Integers that are not 0 live: the ids of packed documents.
    assert torch.equal(MASKED[name](mask((1, 2), (3, 0), dtype=torch.int64) * 7), want)


@pytest.mark.fault(139)
def test_on_a_device_masks_are_looked_at_where_that_was_asked_for(monkeypatch):
    """A mask on meta has nothing that could be read: what reads it raises."""
    m, z = torch.empty(B, L, device="meta"), torch.empty(B, L, device="meta")
    assert rlk.policy_loss(z, z, z, m).is_meta
    host_reads.answer(monkeypatch, True)
    with pytest.raises(Exception, match="Meta tensors"):
        rlk.policy_loss(z, z, z, m)


@pytest.mark.fault(139)
@pytest.mark.parametrize("wrong", ["chosen_lengths", "rejected_lengths"])
def test_lengths_below_zero_are_refused(wrong):
    for bad in (torch.tensor([3, -2, 4]), torch.tensor([3.0, math.nan, 1.0])):
        lengths = {"chosen_lengths": torch.tensor([1, 2, 3]), "rejected_lengths": torch.tensor([1, 2, 3]), wrong: bad}
        with pytest.raises(
            ValueError,
            match=rf"^dpo_loss: {wrong} holds (-2|nan), expected numbers of tokens, at "
            r"least 0",
        ):
            rlk.dpo_loss(SUMS[:3], SUMS[1:], loss_type="simpo", **lengths)


@pytest.mark.fault(139)
def test_a_kl_below_zero_is_refused():
    for kl in (-2.0, torch.tensor(-2.0), torch.tensor(-2.0, dtype=torch.float64)):
        with pytest.raises(
            ValueError,
            match=r"^unpaired_preference_loss: kl must be at least 0, got -2.0; clamp the "
            r"estimate",
        ):
            rlk.unpaired_preference_loss(SUMS, SUMS, GOOD, kl=kl)
        with pytest.raises(ValueError, match=r"^linear_unpaired_preference_loss: kl must be at least 0"):
            rlk.linear_unpaired_preference_loss(HIDDEN, HEAD, Y, SUMS, GOOD, kl=kl)
    # A mean reward may be.
    assert rlk.unpaired_preference_loss(SUMS, SUMS, GOOD, loss_type="bco", delta=-2.0).isfinite()
    # A diverging step must be seen.
    assert rlk.unpaired_preference_loss(SUMS, SUMS, GOOD, kl=torch.tensor(math.nan)).isnan()


@pytest.mark.fault(139)
@pytest.mark.parametrize(
    "labels",
    [torch.tensor([1, -1, 1, -1]), torch.tensor([1.0, 0.5, 0.0, 0.0]), torch.tensor([0, 1, 2, 1])],
    ids=["signs", "shares", "classes"],
)
def test_labels_that_are_not_two_classes_are_refused(labels):
    with pytest.raises(ValueError, match="^unpaired_preference_loss: desirable holds .*, expected 0 and 1 alone"):
        rlk.unpaired_preference_loss(SUMS, SUMS, labels, kl=0.0)
    with pytest.raises(ValueError, match="^linear_unpaired_preference_loss: desirable holds"):
        rlk.linear_unpaired_preference_loss(HIDDEN, HEAD, Y, SUMS, labels, kl=0.0)


@pytest.mark.fault(139)
@pytest.mark.parametrize(
    "name,mode",
    [("batch_num_tokens", "token-mean"), ("num_sequences", "seq-mean-token-mean"), ("horizon", "fixed-horizon")],
)
def test_a_count_in_16_bits_is_refused_and_any_other_read_exactly(name, mode):
    more = {} if name != "horizon" else {"num_sequences": 4}
    for dtype, bound in ((torch.bfloat16, 256), (torch.float16, 2048)):
        with pytest.raises(
            TypeError,
            match=rf"^policy_loss: {name} has dtype {dtype}, which skips counts beyond "
            rf"{bound}; keep it an integer or float32",
        ):
            rlk.policy_loss(Z, OLD, A, aggregation=mode, normalizers={name: torch.tensor(257.0, dtype=dtype), **more})
    want = rlk.token_weights(Z > 0, mode, **{name: 16777217, **more}, dtype=torch.float64)
    for x in (
        torch.tensor(16777217),
        torch.tensor(16777217, dtype=torch.int32),
        torch.tensor(16777217.0, dtype=torch.float64),
    ):
        assert torch.equal(rlk.token_weights(Z > 0, mode, **{name: x, **more}, dtype=torch.float64), want)


@pytest.mark.fault(139)
def test_a_normaliser_in_a_tensor_is_held_to_the_range_of_a_number():
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="^token_weights: batch_num_tokens must be finite and not negative"):
            rlk.token_weights(Z > 0, batch_num_tokens=torch.tensor(bad))
    with pytest.raises(ValueError, match="^token_weights: scale gets no gradient; detach it"):
        rlk.token_weights(Z > 0, scale=torch.tensor(1.0, requires_grad=True))


@pytest.mark.fault(139)
@pytest.mark.parametrize("function", ["policy_loss", "logits_policy_loss", "linear_policy_loss"])
def test_a_reference_without_a_coefficient_is_for_the_metric_alone(function):
    inputs = {"policy_loss": (Z,), "logits_policy_loss": (X, Y), "linear_policy_loss": (HIDDEN, HEAD, Y)}[function]
    want = getattr(rlk, function)(*inputs, OLD, A)
    loss, metrics = getattr(rlk, function)(*inputs, OLD, A, ref_logprobs=OLD - 0.5, return_metrics=True)
    assert torch.equal(loss, want) and metrics["kl"] > 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, 3, [], "float32"], ids=str)
def test_weights_have_a_floating_dtype(dtype):
    with pytest.raises(
        TypeError, match="^token_weights: dtype must be one of float32, bfloat16, float16, float64, got"
    ):
        rlk.token_weights(mask(), dtype=dtype)
    with pytest.raises(TypeError, match="^aggregate: dtype must be"):
        rlk.aggregate(Z, mask(), dtype=dtype)


@pytest.mark.fault(148)
@pytest.mark.parametrize("group", ["x", 3, [0, 1]], ids=str)
def test_what_is_no_process_group_is_refused_by_name(group):
    for where, call in (
        ("linear_token_logprobs", lambda: rlk.linear_token_logprobs(HIDDEN, HEAD, Y, process_group=group)),
        ("linear_policy_loss", lambda: rlk.linear_policy_loss(HIDDEN, HEAD, Y, OLD, A, process_group=group)),
    ):
        with pytest.raises(TypeError, match=f"^{where}: process_group must be a torch.distributed.ProcessGroup"):
            call()


@pytest.mark.parametrize(
    "call",
    (
        lambda: rlk.masked_whiten(torch.ones(2), unbiased=None),
        lambda: rlk.masked_whiten(torch.ones(2), shift_mean="no"),
        lambda: rlk.group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.int64), unbiased=None),
    ),
    ids=("whiten", "whiten, a word", "group"),
)
def test_a_switch_of_a_spread_is_true_or_false(call):
    with pytest.raises(TypeError, match="(masked_whiten|group_advantages): .* must be True or False"):
        call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("function", ("sequence_means", "aggregate", "policy_loss"))
def test_a_nested_tensor_beside_offsets_is_refused_by_name(function):
    x = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    more = (x, torch.ones(2)) if function == "policy_loss" else ()
    with pytest.raises(TypeError, match=f"{function}: .* dense"):
        getattr(rlk, function)(x, *more, cu_seqlens=torch.tensor([0, 2, 5]))
