"""Objectives of a user: further columns, columns of other policies, defaults, and the function as the argument."""

import pytest
import torch

import rlkernels as rlk
from rlkernels.linear import rank_agreement
from rlkernels.objectives import OBJECTIVES, exp, objective, where

B, L, V, H = 3, 5, 7, 4


def mixed(logp, old_logp, ref_logp, rollout_logp, advantage, gate, shift, beta=0.3, scale=1.5):
    r"""A squared distance to the reference beside a gated surrogate over the rollout engine's log-probabilities."""
    ratio = exp(logp - rollout_logp)
    near = logp - ref_logp - shift
    value = scale * gate * (0.5 * beta * near * near - ratio * advantage) + old_logp
    return value, scale * gate * (beta * near - ratio * advantage)


def by_hand(logp, old, ref, rollout, advantage, gate, shift, beta=0.3, scale=1.5):
    surrogate = (logp - rollout).exp() * advantage
    return scale * gate * (0.5 * beta * (logp - ref - shift) ** 2 - surrogate) + old


@pytest.fixture(autouse=True)
def registered():
    objective(mixed, columns=7)
    yield
    del OBJECTIVES["mixed"]


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(3)
    d = {"logits": torch.randn(B, L, V, generator=draw, dtype=torch.float64)}
    d["hidden"] = torch.randn(B, L, H, generator=draw, dtype=torch.float64)
    d["head"] = torch.randn(V, H, generator=draw, dtype=torch.float64)
    d["targets"] = torch.randint(V, (B, L), generator=draw)
    for name in ("logp", "old", "ref", "rollout", "advantage", "gate", "shift"):
        d[name] = torch.randn(B, L, generator=draw, dtype=torch.float64) * 0.5
    d["mask"] = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 1, 1], [1, 0, 0, 0, 0]]).bool()
    for name in ("old", "ref", "rollout", "advantage", "gate", "shift"):
        d[name][~d["mask"]] = float("nan")
    return d


def columns(d, rows=slice(None)):
    names = {"ref_logprobs": "ref", "rollout_logprobs": "rollout", "gate": "gate", "shift": "shift"}
    return {argument: d[name][rows] for argument, name in names.items()}


def truth(d, logp):
    live = d["mask"]
    inputs = (d[name][live] for name in ("old", "ref", "rollout", "advantage", "gate", "shift"))
    return by_hand(logp[live], *inputs).mean()


def same(got, expected, inputs, others):
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, others), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [mixed, "mixed"], ids=["function", "name"])
def test_policy_loss_hands_every_column_to_the_objective(batch, function):
    logp, other = (batch["logp"].clone().requires_grad_() for _ in range(2))
    got = rlk.policy_loss(logp, batch["old"], batch["advantage"], batch["mask"], objective=function, **columns(batch))
    same(got, truth(batch, other), [logp], [other])


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_policy_loss_hands_every_column_to_the_objective(batch, inplace):
    logits, other = (batch["logits"].clone().requires_grad_() for _ in range(2))
    options = columns(batch) | {"objective": mixed, "inplace_backward": inplace}
    got = rlk.logits_policy_loss(
        logits * 1.0, batch["targets"], batch["old"], batch["advantage"], batch["mask"], **options
    )
    logp = other.log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    same(got, truth(batch, logp), [logits], [other])


@pytest.mark.parametrize("chunk", [None, 2])
def test_linear_policy_loss_hands_every_column_to_the_objective(batch, chunk):
    hidden, weight, h, w = (batch[name].clone().requires_grad_() for name in ("hidden", "head", "hidden", "head"))
    got = rlk.linear_policy_loss(
        hidden,
        weight,
        batch["targets"],
        batch["old"],
        batch["advantage"],
        batch["mask"],
        objective=mixed,
        chunk_tokens=chunk,
        **columns(batch),
    )
    logp = (h @ w.T).log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    same(got, truth(batch, logp), [hidden, weight], [h, w])


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "sequence_sum"])
def test_a_sequence_reduces_log_probabilities_and_keeps_other_columns(batch, level):
    live = batch["mask"]
    logp, other = (batch["logp"].clone().requires_grad_() for _ in range(2))
    for name in ("advantage", "gate", "shift"):  # constant along a sequence: what the levels agree on
        batch[name] = torch.where(live, batch["shift"][[0, 1, 2], [1, 0, 0]][:, None].expand(B, L), float("nan"))
    got = rlk.policy_loss(
        logp,
        batch["old"],
        batch["advantage"],
        live,
        objective=mixed,
        ratio_level=level,
        aggregation="token-sum",
        **columns(batch),
    )
    filled = {k: torch.where(live, batch[k], 0.0) for k in ("old", "ref", "rollout", "advantage", "gate", "shift")}
    now, n = torch.where(live, other, 0.0), live.sum(-1, keepdim=True)
    if level == "sequence_sum":
        reduced = [x.sum(-1, keepdim=True) for x in (now, *(filled[k] for k in ("old", "ref", "rollout")))]
    elif level == "sequence":
        reduced = [x.sum(-1, keepdim=True) / n for x in (now, *(filled[k] for k in ("old", "ref", "rollout")))]
    else:
        fixed = now.detach()
        reduced = [now, *(fixed - (fixed - filled[k]).sum(-1, keepdim=True) / n for k in ("old", "ref", "rollout"))]
    each = by_hand(*reduced, *(filled[k].sum(-1, keepdim=True) / n for k in ("advantage", "gate", "shift")))
    expected = torch.where(live, each.expand(B, L), 0.0).sum()
    same(got, expected, [logp], [other])


def test_packed_is_padded(batch):
    live = batch["mask"]
    packed = {k: x[live] for k, x in columns(batch).items()}
    got = rlk.policy_loss(
        batch["logp"][live],
        batch["old"][live],
        batch["advantage"][live],
        objective=mixed,
        cu_seqlens=[0, 3, 7, 8],
        **packed,
    )
    padded = rlk.policy_loss(batch["logp"], batch["old"], batch["advantage"], live, objective=mixed, **columns(batch))
    torch.testing.assert_close(got, padded)


def test_strided_bf16_columns_give_the_loss_of_what_they_hold(batch):
    short = {k: torch.where(batch["mask"], x, 0.0).bfloat16().T.contiguous().T for k, x in columns(batch).items()}
    wide = {k: x.double() for k, x in short.items()}
    arguments = batch["logp"], torch.where(batch["mask"], batch["old"], 0.0), torch.ones(B, L)
    got, expected = (rlk.policy_loss(*arguments, batch["mask"], objective=mixed, **x) for x in (short, wide))
    assert torch.equal(got, expected)


def test_nothing_live_is_0_with_zero_gradients(batch):
    logp = torch.full((B, L), float("nan"), requires_grad=True)
    loss = rlk.policy_loss(logp, batch["old"], batch["advantage"], torch.zeros(B, L), objective=mixed, **columns(batch))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logp.grad, torch.zeros(B, L))


def test_a_function_serves_in_a_compiled_program(batch):
    def loss(logp):
        return rlk.policy_loss(logp, batch["old"], batch["advantage"], batch["mask"], objective=mixed, **columns(batch))

    torch._dynamo.reset()
    got = torch.compile(loss, backend="eager", fullgraph=True)(batch["logp"])
    torch.testing.assert_close(got, loss(batch["logp"]))


def test_a_default_is_the_number_of_the_signature(batch):
    inputs = (batch["logp"], batch["old"], batch["advantage"], batch["mask"])
    plain, written, other = (
        rlk.policy_loss(*inputs, objective=mixed, **columns(batch), **params)
        for params in ({}, {"beta": 0.3, "scale": 1.5}, {"beta": torch.tensor(0.7)})
    )
    assert torch.equal(plain, written) and not torch.equal(plain, other)
    assert OBJECTIVES["mixed"].defaults == (("beta", 0.3), ("scale", 1.5))


@pytest.mark.parametrize("missing", ["ref_logprobs", "rollout_logprobs", "gate"])
@pytest.mark.parametrize("name", ["policy_loss", "logits_policy_loss", "linear_policy_loss"])
def test_a_missing_column_is_named(batch, name, missing):
    first = {"policy_loss": ("logp",), "logits_policy_loss": ("logits", "targets")}
    inputs = [batch[k] for k in first.get(name, ("hidden", "head", "targets"))]
    given = {k: x for k, x in columns(batch).items() if k != missing}
    with pytest.raises(ValueError, match=f"^{name}: objective 'mixed' needs a column .*; pass {missing}="):
        getattr(rlk, name)(*inputs, batch["old"], batch["advantage"], batch["mask"], objective=mixed, **given)


def test_wrong_columns_are_refused(batch):
    inputs = (batch["logp"], batch["old"], batch["advantage"], batch["mask"])
    with pytest.raises(ValueError, match=r"^policy_loss: gate has shape \(3,\), expected \(3, 5\)"):
        rlk.policy_loss(*inputs, objective=mixed, **(columns(batch) | {"gate": torch.ones(3)}))
    with pytest.raises(ValueError, match="gate .*gradient"):
        gate = torch.ones(B, L, requires_grad=True)
        rlk.policy_loss(*inputs, objective=mixed, **(columns(batch) | {"gate": gate}))
    with pytest.raises(TypeError, match="^policy_loss: objective 'ppo_clip' takes no 'gate'"):
        rlk.policy_loss(*inputs, gate=batch["gate"])
    with pytest.raises(ValueError, match="^policy_loss: objective 'ppo_clip' has no column 'rollout_logp'"):
        rlk.policy_loss(*inputs, rollout_logprobs=batch["rollout"])
    with pytest.raises(ValueError, match="^policy_loss: objective must be one of"):
        rlk.policy_loss(*inputs, objective=by_hand)


def test_a_column_with_the_name_of_an_argument_is_to_be_renamed(batch):
    @objective(columns=3)
    def of_entropy(logp, advantage, entropy):
        """d"""
        return -entropy * advantage * logp, -entropy * advantage

    with pytest.raises(ValueError, match="policy_loss has an argument of that name, so rename the column"):
        rlk.policy_loss(batch["logp"], None, batch["advantage"], objective=of_entropy, entropy=batch["gate"])
    del OBJECTIVES["of_entropy"]


def test_a_parameter_with_the_name_of_an_argument_is_to_be_renamed(batch):
    @objective
    def of_a_coefficient(logp, advantage, kl_coef=0.5):
        """d"""
        return -kl_coef * advantage * logp, -kl_coef * advantage

    with pytest.raises(ValueError, match="parameter 'kl_coef' of objective 'of_a_coefficient' has the name of an"):
        rlk.policy_loss(batch["logp"], None, batch["advantage"], objective=of_a_coefficient, kl_coef=0.0)
    del OBJECTIVES["of_a_coefficient"]


def test_ranks_know_an_objective_by_its_name():
    assert rank_agreement._text(mixed) == rank_agreement._text("mixed")


def test_a_function_that_another_has_replaced_is_refused(batch):
    def make(k):
        def twice(logp, advantage):
            """d"""
            return -2.0 * advantage * logp, -2.0 * advantage

        return objective(twice)

    old, new = make(0), make(1)
    assert OBJECTIVES["twice"].function is new
    with pytest.raises(ValueError, match="objective must be one of"):
        rlk.policy_loss(batch["logp"], None, batch["advantage"], objective=old)
    del OBJECTIVES["twice"]


def late(logp, gate, advantage):
    """d"""
    return where(gate > 0.0, logp, 0.0), advantage


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (2, TypeError, "columns=2 leaves the column 'advantage' among the parameters"),
        (4, ValueError, "columns=4, expected 1 to 3"),
        (0, ValueError, "columns=0, expected 1 to 3"),
        (True, TypeError, "columns must be int, got bool"),
        (None, TypeError, r"with @objective\(columns=k\) the first k"),
    ],
)
def test_a_count_of_columns_is_checked(columns, error, message):
    with pytest.raises(error, match=message):
        objective(late, columns=columns)
