"""The op contract: schema, fakes, autograd, compile, checkpointing; gradients in float64 on every backend, the native
one included.
"""

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import DEVICES, absent, use_backend
from rlkernels.linear import token_stats

PRESENT = [name for name in DEVICES["cpu"] if absent(name) is None]
V = 37  # no multiple of any block or vector


@pytest.fixture(params=PRESENT)
def backend(request):
    with use_backend(request.param):
        yield request.param


def problem(shape=(4,), dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(*shape, V, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_()
    targets = torch.randint(V, shape, generator=draw)
    targets.view(-1)[1] = -100
    mask = torch.rand(*shape, V, generator=draw) > 0.2
    mask.scatter_(-1, targets.clamp(min=0)[..., None], True)
    rest = {k: torch.randn(shape, generator=draw, dtype=torch.float64) for k in ("old", "advantage", "g1", "g2", "g3")}
    rest["ref"] = torch.randn(*shape, V, generator=draw, dtype=torch.float64).to(dtype)
    rest["old"] = rest["old"] * 0.3 - 3.5
    return logits, targets, mask, rest


LAYOUTS = {
    "contiguous": lambda x: x,
    "sliced": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand_as(x),
    "empty": lambda x: x[:0],
    "frozen": lambda x: x.detach(),
}


@pytest.mark.fault(41)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_token_stats(layout, backend):
    logits, targets, mask, rest = problem((2, 3))
    shaped = LAYOUTS[layout]
    x, y, m, ref = shaped(logits), shaped(targets).reshape(-1), shaped(mask).reshape(-1, V), shaped(rest["ref"])
    for temperature, wanted in (
        (ops.number(0.7), 0),
        (torch.full(y.shape, 0.7, dtype=torch.float64), ops.ENTROPY | ops.KL),
    ):
        opcheck(ops.token_stats_op.op, (x, y, temperature, -100, m, ref if wanted else None, wanted, False, backend))


@pytest.mark.fault(41)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_backward_ops(dtype, backend):
    logits, targets, mask, rest = problem((2, 3), dtype)
    x, y, m = logits.detach(), targets.reshape(-1), mask.reshape(-1, V)
    found = ops.token_stats_op(x, y, ops.number(0.7), -100, m, rest["ref"], ops.ENTROPY | ops.KL, False, backend)
    _, shift, sum_exp, entropy, *_, ref_shift, ref_sum, kl = found
    g = [rest[k].reshape(-1).float() for k in ("g1", "g2", "g3")]
    saved = (shift, sum_exp, entropy, ref_shift, ref_sum, kl, backend)
    opcheck(ops.token_stats_backward.op, (*g, x, y, ops.number(0.7), -100, m, rest["ref"], *saved))
    opcheck(ops.token_stats_backward_.op, (*g, x.clone(), y, ops.number(0.7), -100, m, rest["ref"], *saved))


@pytest.mark.fault(41)
def test_opcheck_of_fused_policy(backend):
    logits, targets, mask, rest = problem((2, 3), torch.float32)
    columns = [rest["old"].reshape(-1).float(), rest["advantage"].reshape(-1).float()]
    weight = torch.rand(6)
    for with_grad, extra in ((False, (weight, "k3", columns[0], weight)), (False, (None, None, None, None))):
        entropy_weight, kl, ref, kl_weight = extra
        opcheck(
            ops.fused_policy_op.op,
            (
                "ppo_clip",
                logits,
                targets.reshape(-1),
                ops.number(1.0),
                -100,
                mask.reshape(-1, V),
                columns,
                ops.numbers((0.2, 0.28)),
                weight,
                entropy_weight,
                kl,
                ref,
                kl_weight,
                with_grad,
                False,
                backend,
            ),
        )


@pytest.mark.fault(41)
def test_opcheck_of_elementwise_and_gae(backend):
    _, _, _, rest = problem((6,))
    first = rest["g1"].clone().requires_grad_()
    for weight in (None, rest["g2"].abs()):
        opcheck(
            ops.elementwise.op,
            ("ppo_clip", first, [rest["old"], rest["advantage"]], ops.numbers((0.2, 0.2)), weight, backend),
        )
    opcheck(ops.elementwise_backward.op, (ops.number(0.3), rest["g3"], first.detach(), rest["g2"], rest["g1"]))
    opcheck(
        ops.gae.op,
        (
            rest["g1"].view(2, 3),
            rest["g2"].view(2, 3),
            rest["g3"].view(2, 3) > 0,
            None,
            ops.number(0.9),
            ops.number(0.95),
            "skip",
            backend,
        ),
    )


@pytest.mark.fault(41)
def test_opcheck_of_the_linear_ops(backend):
    _, targets, _, rest = problem((6,))
    draw = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(*s, generator=draw, requires_grad=True) for s in ((6, 5), (V, 5), (V,)))
    g = rest["g1"].float()
    for temperature, softcap, bound in ((ops.number(0.7), ops.number(4.0), None), (torch.full((6,), 0.7), None, 6)):
        head = (
            targets,
            temperature,
            None if bound is None else torch.arange(V) != 3,
            softcap,
            ops.number(1.2),
            -100,
            torch.float32,
            4,
            False,
            bound,
            *(None, 0, 0, 0),  # no shard
            "linear_token_stats",
        )
        opcheck(token_stats.linear_stats.op, (hidden, weight, bias, *head, ops.ENTROPY, backend))
        operands = (hidden.detach(), weight.detach(), bias.detach(), *head)
        found = token_stats.linear_stats(*operands, ops.ENTROPY, backend)
        opcheck(token_stats.linear_stats_backward.op, (g, g, *operands, *found[1:4], True, False, True, backend))


FUNCTIONS = {
    "logprobs": lambda x, y, m, r: rlk.token_logprobs(x, y, temperature=0.7) * r["g1"],
    "entropy": lambda x, y, m, r: rlk.token_stats(x, y, vocab_mask=m).entropy * r["g1"],
    "both": lambda x, y, m, r: (lambda s: s.logprobs * r["g1"] + s.entropy * r["g2"])(
        rlk.token_stats(x, y, temperature=r["g3"].abs() + 0.5)
    ),
    "exact kl": lambda x, y, m, r: rlk.token_stats(x, y, ref_logits=r["ref"], kl="exact", vocab_mask=m).kl * r["g1"],
    "all": lambda x, y, m, r: (lambda s: s.logprobs * r["g1"] + s.entropy * r["g2"] + s.kl * r["g3"])(
        rlk.token_stats(x, y, ref_logits=r["ref"], kl="exact", temperature=1.3)
    ),
    "k3": lambda x, y, m, r: rlk.token_stats(x, y, ref_logits=r["ref"], kl="k3").kl * r["g1"],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_of_row_statistics(name, backend):
    logits, targets, mask, rest = problem()
    assert torch.autograd.gradcheck(
        lambda x: FUNCTIONS[name](x, targets, mask, rest), logits, eps=1e-6, atol=1e-7, rtol=1e-6
    )


OBJECTIVES = {"ppo_clip": {"clip_high": 0.28}, "dual_clip": {}, "sapo": {}, "reinforce": {}}


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck_of_policy_losses(name, level, backend):
    if level != "token" and name == "reinforce":
        return  # no ratio; that this raises is a row of test_bad_inputs
    logits, targets, mask, rest = problem((2, 3))
    live = torch.tensor([[1, 1, 1], [1, 0, 1]])
    aggregation = "seq-mean-token-mean" if level == "sequence" else "token-mean"

    def loss(x):
        return 1.7 * rlk.logits_policy_loss(
            x,
            targets,
            rest["old"],
            rest["advantage"],
            live,
            objective=name,
            temperature=0.7,
            vocab_mask=mask,
            ref_logprobs=rest["old"] - 0.2,
            kl_coef=0.3,
            entropy_coef=0.1,
            ratio_level=level,
            aggregation=aggregation,
            **OBJECTIVES[name],
        )

    assert torch.autograd.gradcheck(loss, logits, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_gradcheck_of_pairs_values_and_linear(backend):
    draw = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(5, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda a, b, c: rlk.pairwise_reward_loss(a, b, margin=c, center_coef=0.1) * 1.3, (a, b, c)
    )
    assert torch.autograd.gradcheck(
        lambda a, b: rlk.dpo_loss(a, b, c.detach(), c.detach() - 0.3, beta=0.4, label_smoothing=0.1) * 1.3, (a, b)
    )
    assert torch.autograd.gradcheck(lambda a: rlk.value_loss(a, b.detach(), c.detach(), clip_range=0.2) * 1.3, (a,))
    hidden, weight, bias = (
        torch.randn(*s, generator=draw, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (V, 5), (V,))
    )
    _, targets, _, rest = problem()

    def statistics(h, w, b):
        s = rlk.linear_token_stats(h, w, targets, bias=b, temperature=0.7, softcap=5.0, logit_scale=1.3, chunk_tokens=2)
        return s.logprobs * rest["g1"] + s.entropy * rest["g2"]

    assert torch.autograd.gradcheck(statistics, (hidden, weight, bias))


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    "chosen", [c for n in (1, 2, 3) for c in itertools.combinations(("logprobs", "entropy", "kl"), n)], ids=" ".join
)
def test_every_subset_of_outputs_gives_its_own_gradient(chosen, backend):
    logits, targets, _, rest = problem()
    stats = rlk.token_stats(logits, targets, ref_logits=rest["ref"], kl="exact")
    (got,) = torch.autograd.grad(
        sum((getattr(stats, k) * rest[g]).sum() for k, g in zip(chosen, ("g1", "g2", "g3"), strict=False)), logits
    )
    log_p, log_q = logits.log_softmax(-1), rest["ref"].log_softmax(-1)
    live = targets != -100
    truth = {
        "logprobs": log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
    }
    (want,) = torch.autograd.grad(
        sum(
            (torch.where(live, truth[k], 0.0) * rest[g]).sum() for k, g in zip(chosen, ("g1", "g2", "g3"), strict=False)
        ),
        logits,
    )
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


COMPILED = {
    "token_logprobs": lambda x, y, t: rlk.token_logprobs(x, y, temperature=t),
    "token_stats": lambda x, y, t: (lambda s: s.logprobs + s.entropy)(rlk.token_stats(x, y, temperature=t)),
    "logits_policy_loss": lambda x, y, t: rlk.logits_policy_loss(
        x,
        y,
        torch.zeros(y.shape),
        torch.ones(y.shape),
        y > 2,
        temperature=t,
        clip_high=t,
        kl_coef=t,
        ref_logprobs=torch.zeros(y.shape),
        entropy_coef=t,
    ),
    "sequence ratio": lambda x, y, t: rlk.logits_policy_loss(
        x,
        y,
        torch.zeros(y.shape),
        torch.ones(y.shape),
        y > 2,
        temperature=t,
        clip_high=t,
        ratio_level="sequence",
        aggregation="seq-mean-token-mean",
    ),
    "pairwise_reward_loss": lambda x, y, t: rlk.pairwise_reward_loss(x[:, 0, 0], x[:, 0, 1], center_coef=t),
    "dpo_loss": lambda x, y, t: rlk.dpo_loss(x[:, 0, 0], x[:, 0, 1], x[:, 0, 0].detach(), x[:, 0, 1].detach(), beta=t),
    "value_loss": lambda x, y, t: rlk.value_loss(
        x[..., 0], x[..., 0].detach(), x[..., 1].detach(), y > 2, clip_range=t
    ),
    "linear": lambda x, y, t: rlk.linear_token_logprobs(
        x, x[0, 0, None] * torch.arange(1.0, 9.0)[:, None], y.clamp(max=7), temperature=t
    ),
    "gae": lambda x, y, t: rlk.gae(x[..., 0].detach(), x[..., 1].detach(), y > 2, gamma=t)[0] + 0 * x[..., 0],
}


@pytest.mark.fault(47, 49)
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_for_every_length_and_number(name, backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend=counter, dynamic=True)
    for length, t in ((3, 0.5), (4, 0.6), (7, 0.9)):  # one more than the graphs that may be made
        x = torch.randn(2, length, V, generator=torch.Generator().manual_seed(length), requires_grad=True)
        y = torch.randint(V, (2, length), generator=torch.Generator().manual_seed(length))
        got, want = compiled(x, y, t), COMPILED[name](x, y, t)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (got, want)]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)
    assert counter.frame_count <= 2, counter.frame_count


@pytest.mark.fault(42)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_bits(reentrant, backend):
    logits, targets, mask, rest = problem((2, 3), torch.float32)

    def loss(x):
        return rlk.logits_policy_loss(x * 1.5, targets, rest["old"], rest["advantage"], entropy_coef=0.1)

    plain, saved = loss(logits), checkpoint(loss, logits, use_reentrant=reentrant)
    gradients = [torch.autograd.grad(out * 0.7, logits)[0] if not reentrant else None for out in (plain, saved)]
    assert torch.equal(plain, saved)
    if reentrant:  # reentrant checkpointing supports .backward() alone
        for out in (plain, saved):
            logits.grad = None
            (out * 0.7).backward()
            gradients.append(logits.grad.clone())
    assert torch.equal(*gradients[-2:])


@pytest.mark.fault(36)
@pytest.mark.parametrize("name", ["token_logprobs", "logits_policy_loss", "pairwise_reward_loss", "value_loss"])
def test_double_backward_is_refused(name, backend):
    x = torch.randn(2, 3, V, requires_grad=True)
    y = torch.full((2, 3), 5)
    (first,) = torch.autograd.grad(COMPILED[name](x, y, 0.7).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        first.square().sum().backward()


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    "name", ["token_logprobs", "logits_policy_loss", "pairwise_reward_loss", "dpo_loss", "value_loss", "linear"]
)
def test_forward_mode_is_refused(name, backend):
    x, y = torch.randn(2, 3, V), torch.full((2, 3), 5)
    with pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
        torch.func.jvp(lambda x: COMPILED[name](x, y, 0.7), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
        COMPILED[name](torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), y, 0.7)
