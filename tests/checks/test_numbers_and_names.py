"""F147, F148: numbers as config files and other libraries give them, and names as papers and trainers write them."""

import re

import numpy
import pytest
import torch
from bad_inputs import CASES, NOT_OF_A_FUNCTION
from reference import same_bits

import rlkernels as rlk
from rlkernels import aggregation
from rlkernels.checks import losses
from rlkernels.checks.names import FIELD
from rlkernels.losses.row_options import ROW_KINDS
from rlkernels.objectives import OBJECTIVES

draw = torch.Generator().manual_seed(0)
Z, OLD, A = (torch.randn(2, 3, generator=draw) for _ in range(3))
X, Y = torch.randn(2, 3, 5, generator=draw), torch.randint(5, (2, 3), generator=draw)
HIDDEN, HEAD = torch.randn(2, 3, 4, generator=draw), torch.randn(5, 4, generator=draw)
PAIRS = [-torch.rand(4, generator=draw) - 0.1 for _ in range(4)]
GOOD, LENGTHS = torch.tensor([True, False, True, False]), torch.tensor([3, 1, 2, 2])
GROUPS = torch.tensor([0, 0, 1, 1])


def policy(**options):
    return rlk.policy_loss(Z, OLD, A, **options)


def dpo(**options):
    return rlk.dpo_loss(*PAIRS, **options)


def head(**options):
    return rlk.linear_token_logprobs(HIDDEN, HEAD, Y, **options)


# Each argument that is a number, called with x = 0.25.
REALS = {
    "policy_loss clip_low": lambda x: policy(clip_low=x),
    "policy_loss clip_high": lambda x: policy(clip_high=x),
    "policy_loss tau_pos": lambda x: policy(objective="sapo", tau_pos=x),
    "logits_policy_loss clip_low": lambda x: rlk.logits_policy_loss(X, Y, OLD, A, clip_low=x),
    "policy_loss kl_coef": lambda x: policy(kl_coef=x, ref_logprobs=OLD),
    "policy_loss entropy_coef": lambda x: policy(entropy_coef=x, entropy=OLD),
    "value_loss clip_range": lambda x: rlk.value_loss(Z, OLD, A, clip_range=x, return_metrics=True)[0],
    "dpo_loss beta": lambda x: dpo(beta=x),
    "dpo_loss label_smoothing": lambda x: dpo(label_smoothing=x),
    "dpo_loss loss_weights": lambda x: dpo(loss_type=("sigmoid", "ipo"), loss_weights=(x, 1.0)),
    "dpo_loss alpha": lambda x: dpo(f_divergence="alpha_divergence", alpha=x),
    "dpo_loss simpo_gamma": lambda x: dpo(
        loss_type="simpo", simpo_gamma=x, chosen_lengths=LENGTHS, rejected_lengths=LENGTHS
    ),
    "dpo_loss alphapo_alpha": lambda x: dpo(
        loss_type="simpo", alphapo_alpha=x, chosen_lengths=LENGTHS, rejected_lengths=LENGTHS
    ),
    "dpo_loss discopop_tau": lambda x: dpo(loss_type="discopop", discopop_tau=x),
    "dpo_loss cpo_alpha": lambda x: dpo(loss_type="cpo", cpo_alpha=x, chosen_lengths=LENGTHS),
    "unpaired_preference_loss beta": lambda x: rlk.unpaired_preference_loss(*PAIRS[:2], GOOD, kl=0.1, beta=x),
    "unpaired_preference_loss desirable_weight": lambda x: rlk.unpaired_preference_loss(
        *PAIRS[:2], GOOD, kl=0.1, desirable_weight=x
    ),
    "unpaired_preference_loss undesirable_weight": lambda x: rlk.unpaired_preference_loss(
        *PAIRS[:2], GOOD, kl=0.1, undesirable_weight=x
    ),
    "length_desensitized_weights ld_alpha": lambda x: rlk.length_desensitized_weights(
        torch.ones(1, 3), torch.tensor([[0, 1, 1]]), x
    )[0],
    "pairwise_reward_loss center_coef": lambda x: rlk.pairwise_reward_loss(*PAIRS[:2], center_coef=x),
    "gae gamma": lambda x: rlk.gae(Z, OLD, gamma=x)[0],
    "gae lam": lambda x: rlk.gae(Z, OLD, lam=x)[0],
    "discounted_returns gamma": lambda x: rlk.discounted_returns(Z, gamma=x),
    "gae turn_gamma": lambda x: rlk.gae(Z, OLD, turn_ends=Z > 0, turn_gamma=x)[0],
    "gae turn_lam": lambda x: rlk.gae(Z, OLD, turn_ends=Z > 0, turn_lam=x)[0],
    "vtrace rho_max": lambda x: rlk.vtrace(Z, OLD, Z, OLD, rho_max=x)[0],
    "vtrace lam": lambda x: rlk.vtrace(Z, OLD, Z, OLD, lam=x)[0],
    "rollout_gae gamma": lambda x: rlk.rollout_gae(Z, OLD, time_dim=0, next_values=A, gamma=x)[0],
    "assemble_rewards kl_coef": lambda x: rlk.assemble_rewards(
        Z, Z > 0, logprobs=Z, ref_logprobs=OLD, kl_coef=x, placement="token-level"
    ),
    "length_penalty buffer": lambda x: rlk.length_penalty(PAIRS[0], max_length=1e9, buffer=x),
    "truncation_penalty coef": lambda x: rlk.truncation_penalty(PAIRS[0], PAIRS[0] > 0, x),
    "dynamic_sampling_mask low": lambda x: rlk.dynamic_sampling_mask(PAIRS[0], GROUPS, low=x),
    "gigpo_advantages step_weight": lambda x: rlk.gigpo_advantages(*PAIRS[:2], GROUPS, GROUPS, step_weight=x),
    "linear_token_logprobs softcap": lambda x: head(softcap=x),
    "linear_token_logprobs logit_scale": lambda x: head(logit_scale=x),
    "linear_dpo_loss beta": lambda x: rlk.linear_dpo_loss(
        HIDDEN, HEAD, Y, ref_chosen_logps=PAIRS[0][:1], ref_rejected_logps=PAIRS[1][:1], beta=x
    ),
}
# What a scheduler or a learned parameter may give: a tensor on a device is theirs to take.
COEFFICIENTS = {
    name
    for name in REALS
    if name.split()[0]
    in (
        "policy_loss",
        "logits_policy_loss",
        "value_loss",
        "dpo_loss",
        "unpaired_preference_loss",
        "pairwise_reward_loss",
        "linear_dpo_loss",
        "assemble_rewards",
        "gigpo_advantages",
    )
}
COUNTS = ("token_weights batch_num_tokens", "token_weights horizon", "aggregate num_sequences")
NORMALISERS = {  # of them, too
    "policy_loss scale": lambda x: policy(normalizers={"scale": x}),
    "masked_whiten eps": lambda x: rlk.masked_whiten(Z, eps=x),
    "group_advantages eps": lambda x: rlk.group_advantages(PAIRS[0], GROUPS, eps=x),
    "optimal_token_advantages eps": lambda x: rlk.optimal_token_advantages(Z, OLD, OLD, Y[:, 0], eps=x)[0],
    "step_advantages eps": lambda x: rlk.step_advantages(Z, Z > -9, Y[:, 0], eps=x),
    "token_weights batch_num_tokens": lambda x: rlk.token_weights(Z > 0, batch_num_tokens=x),
    "token_weights horizon": lambda x: rlk.token_weights(Z > 0, "fixed-horizon", horizon=x, scale=x, dp_size=x),
    "aggregate num_sequences": lambda x: rlk.aggregate(Z, None, "seq-mean-token-mean", num_sequences=x),
}
INTEGERS = {  # x = 2
    "token_logprobs ignore_index": lambda x: rlk.token_logprobs(X, Y, ignore_index=x),
    "logits_policy_loss ignore_index": lambda x: rlk.logits_policy_loss(X, Y, OLD, A, ignore_index=x),
    "sft_loss ignore_index": lambda x: rlk.sft_loss(X, Y, ignore_index=x),
    "linear_token_logprobs ignore_index": lambda x: head(ignore_index=x),
    "linear_sft_loss ignore_index": lambda x: rlk.linear_sft_loss(HIDDEN, HEAD, Y, ignore_index=x),
    "linear_token_logprobs chunk_tokens": lambda x: head(chunk_tokens=x),
    "linear_token_logprobs logits_budget": lambda x: head(logits_budget=x),
    "linear_token_logprobs valid_vocab": lambda x: rlk.linear_token_logprobs(HIDDEN, HEAD, Y * 0, valid_vocab=x),
    "linear_token_logprobs max_live_tokens": lambda x: rlk.linear_token_logprobs(
        HIDDEN[:1, :2], HEAD, Y[:1, :2], max_live_tokens=x
    ),
    "masked_whiten dim": lambda x: rlk.masked_whiten(X, dim=x),
    "process_sequences eos_id": lambda x: rlk.process_sequences(Y, 1, eos_id=x, pad_id=0)[0],
    "process_sequences prompt_length": lambda x: rlk.process_sequences(Y, x, eos_id=2, pad_id=0)[2],
    "spans_to_mask length": lambda x: rlk.spans_to_mask([[0, 2]], x, shift=False),
}


def from_elsewhere(x):
    kinds = [
        numpy.float32(x),
        numpy.float64(x),
        numpy.float16(x),
        numpy.array(x),
        torch.tensor(x),
        torch.tensor(x, dtype=torch.float64),
        torch.tensor(x, dtype=torch.bfloat16),
    ]
    return [*kinds, numpy.int64(x), numpy.int32(x), torch.tensor(int(x))] if x == int(x) else kinds


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", {**REALS, **NORMALISERS})
def test_a_number_of_numpy_or_torch_is_that_number(name):
    function = {**REALS, **NORMALISERS}[name]
    expected = function(0.25)

    def kinds(number):  # F139: a count in 16 bits is refused, because they skip counts
        return [
            x
            for x in from_elsewhere(number)
            if not (name in COUNTS and isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16)
        ]

    for x in kinds(0.25):
        assert same_bits(function(x), expected), type(x)
    if "beta" in name or "weight" in name:
        assert all(same_bits(function(x), function(1.0)) for x in (1, *kinds(1.0)))


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_of_numpy_or_torch_is_that_integer(name):
    function = INTEGERS[name]
    expected = function(2)
    for x in (
        numpy.int64(2),
        numpy.int32(2),
        numpy.uint8(2),
        numpy.array(2),
        torch.tensor(2),
        torch.tensor(2, dtype=torch.int32),
    ):
        assert same_bits(function(x), expected), type(x)


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", {**REALS, **INTEGERS})
def test_what_is_no_number_is_refused_by_name(name):
    function, (where, argument) = {**REALS, **INTEGERS}[name], name.split(" ")
    said = rf"^{where}: {argument} must "
    wrong = [
        ("1", TypeError, "str '1'; convert it"),
        (True, TypeError, "bool"),
        (torch.tensor([0.25]), TypeError, r"tensor of shape \(1,\) on cpu"),
        (
            torch.tensor(0.25, device="meta"),
            TypeError,
            r"tensor of shape \(\) on "
            r"meta",
        ),
        (numpy.array([0.25]), TypeError, "ndarray"),
        (1j, TypeError, "complex"),
        (object(), TypeError, "object"),
        (numpy.bool_(True), TypeError, "bool"),
        (torch.tensor(True), TypeError, "bool"),
    ]
    for x, error, came in wrong:
        if name in COEFFICIENTS and isinstance(x, torch.Tensor) and x.is_meta:
            continue
        if name == "linear_dpo_loss beta" and isinstance(x, torch.Tensor) and x.shape == (1,):
            continue  # one pair, and its beta
        with pytest.raises(error, match=f"{said}.*{came}"):
            function(x)
    if name in REALS:
        with pytest.raises(ValueError, match=rf"^{where}: {argument} gets no gradient; detach it"):
            function(torch.tensor(0.25, requires_grad=True))
        with pytest.raises(ValueError, match=said):
            function(float("nan"))
        for far in (10**400, -(10**400)):
            try:
                assert torch.isfinite(function(far)).all()
            except ValueError as error:
                assert re.match(said, str(error))
    else:
        for x in (2.0, 2**63, -(2**63) - 1):
            with pytest.raises((TypeError, ValueError), match=said):
                function(x)


def cispo(logp):
    """A function that is not registered, under the name of one that is."""
    return logp


# What somebody may write: the argument, the name, what the message offers. The last element is what is called.
MEANT = [
    ("objective", "ppo", "did you mean ppo_clip?", policy),
    ("objective", "grpo", "did you mean ppo_clip with advantages of group_advantages", policy),
    ("objective", "gspo", 'did you mean ppo_clip with ratio_level="sequence"', policy),
    ("objective", "dapo", 'clip_high=0.28 and aggregation="token-mean"', policy),
    ("objective", "dr_grpo", 'aggregation="fixed-horizon"', policy),
    ("objective", "PPO-clip", "did you mean ppo_clip?", policy),
    ("objective", "capo", "did you mean (sapo|cispo)", policy),
    ("objective", cispo, "pass its name, 'cispo'", policy),
    ("aggregation", "mean", "did you mean token-mean?", policy),
    ("aggregation", "sum", "did you mean token-sum?", policy),
    ("aggregation", "dapo", "did you mean token-mean?", policy),
    ("aggregation", "bnpo", "did you mean token-mean?", policy),
    ("aggregation", "grpo", "did you mean seq-mean-token-mean?", policy),
    ("aggregation", "dr_grpo", "did you mean fixed-horizon with normalizers", policy),
    ("aggregation", "seq_mean_token_mean", "did you mean seq-mean-token-mean?", policy),
    ("ratio_level", "gspo", "did you mean sequence?", policy),
    ("ratio_level", "sequnce", "did you mean sequence?", policy),
    ("kl", "low_var_kl", "did you mean k3?", policy),
    ("kl", "mse", "did you mean k2?", policy),
    ("kl", "K1", "did you mean k1?", policy),
    ("loss_type", "dpo", "did you mean sigmoid?", dpo),
    ("loss_type", "kto", "did you mean kto of unpaired_preference_loss", dpo),
    ("loss_type", "simp", "did you mean simpo?", dpo),
    (
        "loss_type",
        "apo_zero",
        "did you mean apo_zero_unpaired?",
        lambda **o: rlk.unpaired_preference_loss(*PAIRS[:2], GOOD, **o),
    ),
    ("f_divergence", "js", "did you mean js_divergence?", dpo),
    ("kind", "cross_entropy", "did you mean nll?", lambda **o: rlk.sft_loss(X, Y, **o)),
    ("baseline", "rloo", "did you mean leave-one-out?", lambda **o: rlk.group_advantages(PAIRS[0], GROUPS, **o)),
    ("scale", "batch", "did you mean batch-std?", lambda **o: rlk.group_advantages(PAIRS[0], GROUPS, **o)),
    ("scale", "none", "did you mean None?", lambda **o: rlk.group_advantages(PAIRS[0], GROUPS, **o)),
    ("masked", "skp", "did you mean skip?", lambda **o: rlk.gae(Z, OLD, **o)),
    ("outputs", ("entropi",), "did you mean entropy?", lambda **o: rlk.token_stats(X, Y, **o)),
]


@pytest.mark.fault(148)
@pytest.mark.parametrize(
    "argument,name,offered,function", MEANT, ids=[f"{a}-{getattr(n, '__name__', n)}" for a, n, *_ in MEANT]
)
def test_an_unknown_name_is_told_what_was_meant(argument, name, offered, function):
    with pytest.raises(ValueError, match=rf"^\w+: {argument}.*(got|unknown) .*;.* ({offered})"):
        function(**{argument: name})


def test_a_count_of_the_whole_batch_beside_normalizers_is_told_where_it_belongs():
    named = {name for mode in aggregation._MODES.values() for name in (*mode.required, *mode.optional)}
    assert named | {"count_empty_rows", "dp_size", "scale"} == set(losses.NORMALIZERS)
    x = torch.zeros(2, 3)
    for name in losses.NORMALIZERS:
        with pytest.raises(TypeError, match=rf"^policy_loss: .*takes no '{name}'; pass normalizers={{'{name}': ...}}"):
            rlk.policy_loss(x, x, x, **{name: 2})


@pytest.mark.fault(148)
@pytest.mark.parametrize("argument", ["scale", "baseline"])
def test_a_number_where_None_is_among_the_names_is_refused_by_name(argument):
    with pytest.raises(ValueError, match=f"group_advantages: {argument} must be one of .*None; got 1.0"):
        rlk.group_advantages(PAIRS[0], GROUPS, **{argument: 1.0})


@pytest.mark.fault(148)
def test_a_name_that_resembles_none_is_offered_none():
    for function, argument in ((policy, "objective"), (policy, "aggregation"), (dpo, "loss_type")):
        for name in ("zzzz", "", 3, None, [], object(), torch.tensor(1.0), numpy.array([1, 2])):
            if argument == "loss_type" and not isinstance(name, str):
                continue
            with pytest.raises(ValueError) as caught:
                function(**{argument: name})
            assert "did you mean" not in str(caught.value)


@pytest.mark.fault(148)
def test_what_is_offered_exists():
    known = {name for name, entry in OBJECTIVES.items() if "advantage" in entry.columns} | set(ROW_KINDS)
    for offered in FIELD["objective"].values():
        assert offered.split(" ")[0] in known
    for name, offered in FIELD["aggregation"].items():
        with pytest.raises(ValueError, match=f"did you mean {offered.split(' ')[0]}"):
            policy(aggregation=name)


@pytest.mark.fault(148)
def test_every_error_of_the_table_begins_with_the_function_that_was_called():
    for case, (function, error, _) in CASES.items():
        if case[:3] not in NOT_OF_A_FUNCTION:
            with pytest.raises(error, match=r"^[a-z_]+: "):
                function()


WHO = {
    "targets of a head": (
        lambda: rlk.linear_token_stats(HIDDEN, HEAD, Y + 9),
        IndexError,
        r"^linear_token_stats: target \d+ at row "
        r"0",
    ),
    "targets of a loss of a head": (
        lambda: rlk.linear_policy_loss(HIDDEN, HEAD, Y + 9, OLD, A),
        IndexError,
        r"^linear_policy_loss: target",
    ),
    "targets of answers": (
        lambda: rlk.linear_dpo_loss(HIDDEN, HEAD, Y + 9, reference_free=True),
        IndexError,
        r"^linear_dpo_loss: target",
    ),
    "targets of logits": (lambda: rlk.sft_loss(X, Y + 9), IndexError, r"^sft_loss: target"),
    "temperature": (
        lambda: rlk.token_stats(X, Y, temperature=torch.zeros(2, 3)),
        ValueError,
        "^token_stats: temperature must be positive and finite, got 0.0 at row 0",
    ),
    "live tokens": (
        lambda: rlk.linear_sft_loss(HIDDEN, HEAD, Y, max_live_tokens=1),
        ValueError,
        r"^linear_sft_loss: "
        r"max_live_tokens=1, "
        r"but 6 tokens are "
        r"live",
    ),
    "ratio of packed logits": (
        lambda: rlk.logits_policy_loss(X.view(6, 5), Y.view(6), OLD.view(6), A.view(6), ratio_level="sequence"),
        ValueError,
        r"^logits_policy_loss: ratio_level 'sequence' needs",
    ),
    "aggregation of sequences of logits": (
        lambda: rlk.logits_policy_loss(X, Y, OLD, A, ratio_level="sequence", aggregation="mean"),
        ValueError,
        "^logits_policy_loss: aggregation must be one of .*did you mean token-mean",
    ),
    "sparse offsets": (
        lambda: rlk.sequence_sums(Z.view(6), None, torch.tensor([0, 6]).to_sparse()),
        TypeError,
        "^sequence_sums: cu_seqlens .*dense",
    ),
    "weight without dimensions": (
        lambda: rlk.linear_token_logprobs(HIDDEN, torch.ones(()), Y),
        ValueError,
        "^linear_token_logprobs: .* weight has no",
    ),
    "weight of one dimension": (
        lambda: rlk.linear_token_logprobs(HIDDEN, torch.ones(4), Y),
        ValueError,
        r"^linear_token_logprobs: "
        r".*expected \[..., H\] "
        r"and",
    ),
    "bias of a reward": (
        lambda: rlk.reward_scores(HIDDEN, HEAD[:1], bias=[1.0]),
        TypeError,
        "^reward_scores: bias must be a torch.Tensor, got list",
    ),
    "a mixture": (
        lambda: dpo(loss_type=3),
        TypeError,
        "^dpo_loss: loss_type must be a tuple, one entry for each loss of a mixture, got int",
    ),
    "weights of a mixture": (lambda: dpo(loss_weights=0.5), TypeError, "^dpo_loss: loss_weights must be a tuple"),
    "outputs": (
        lambda: rlk.token_stats(X, Y, outputs=None),
        TypeError,
        "^token_stats: outputs must be a tuple of names, got NoneType",
    ),
    "normalizers": (
        lambda: policy(normalizers=3),
        TypeError,
        "^policy_loss: normalizers must be a dict of keywords of token_weights, got int",
    ),
    "a normaliser that is none": (
        lambda: policy(normalizers={"dtype": torch.float64}),
        TypeError,
        "^policy_loss: normalizers takes no 'dtype'",
    ),
    "spans": (
        lambda: rlk.spans_to_mask([["a", "b"]], 4),
        TypeError,
        "^spans_to_mask: spans must be a tensor or a nested list of integers, got list",
    ),
    "spans of floats": (
        lambda: rlk.spans_to_mask(torch.tensor([[0.5, 2.0]]), 4),
        TypeError,
        "^spans_to_mask: spans must hold integers, got torch.float32",
    ),
    "length": (lambda: rlk.spans_to_mask([[0, 1]], 0), ValueError, "^spans_to_mask: length must be at least 1, got 0"),
    "dim": (
        lambda: rlk.masked_whiten(Z, dim=2),
        ValueError,
        "^masked_whiten: dim must name dimensions of x, each once, from -2 to 1; got 2",
    ),
    "dim twice": (
        lambda: rlk.masked_whiten(Z, dim=(0, -2)),
        ValueError,
        "^masked_whiten: dim must name dimensions of x, each once",
    ),
    "a mask without rows": (
        lambda: rlk.length_desensitized_weights(torch.ones(1, 3), torch.tensor(1), 0.5),
        ValueError,
        r"^length_desensitized_weights: rejected_mask has shape \(\), expected \[B, L\]",
    ),
}


@pytest.mark.fault(148)
@pytest.mark.parametrize("case", WHO)
def test_an_error_names_the_function_and_the_argument(case):
    function, error, message = WHO[case]
    with pytest.raises(error, match=message) as caught:
        function()
    assert type(caught.value) is error
