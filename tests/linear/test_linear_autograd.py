"""The autograd contract of the losses of the head: upstream gradients, retained graphs, checkpoints, autocast,
compilation.
"""

import linear_problems as problems
import pytest
import torch
import torch._dynamo.testing
from linear_problems import L, assert_gradients, frobenius, gradients, own, problem
from reference import same_bits
from torch.utils.checkpoint import checkpoint

import rlkernels as rlk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GOOD = torch.tensor([True, False, True, True])


def state(dtype=torch.float32, shape=(4, L), seed=0):
    d = problem(dtype, shape, seed=seed)
    d["refs"], d["pair_weights"] = (
        torch.tensor(x, dtype=d["old"].dtype) for x in ([-20.0, -31.0, -17.0, -25.0], [0.5, 2.0])
    )
    d["kl"], d["lengths"] = torch.tensor(0.2), torch.tensor([3.0, 6.0])
    return d


def policy(d, h, w, b, **options):
    return rlk.linear_policy_loss(
        h, w, d["targets"], d["old"], d["advantages"], d["mask"], bias=b, **{"chunk_tokens": 5, **options}
    )


def dpo(d, h, w, b, **options):
    return rlk.linear_dpo_loss(
        h,
        w,
        d["targets"],
        d["mask"],
        bias=b,
        ref_chosen_logps=d["refs"][:2],
        ref_rejected_logps=d["refs"][2:],
        beta=0.05,
        **{"chunk_tokens": 5, **options},
    )


LOSSES = {
    "policy": lambda d, *o: policy(
        d, *o, temperature=d["temperature"], kl_coef=0.1, ref_logprobs=d["ref"], entropy_coef=0.1
    ),
    "policy with weights": lambda d, *o: policy(d, *o, weights=d["token_weights"]),
    "policy of sequences": lambda d, *o: policy(d, *o, ratio_level="sequence", softcap=5.0),
    "policy of sums": lambda d, *o: policy(d, *o, ratio_level="sequence_sum", clip_high=3.0),
    "sft": lambda d, h, w, b: rlk.linear_sft_loss(
        h, w, d["targets"], d["mask"], bias=b, sample_weights=d["advantages"], kind="dft", temperature=d["temperature"]
    ),
    "dpo": lambda d, *o: dpo(
        d,
        *o,
        pair_weights=d["pair_weights"],
        chosen_lengths=d["lengths"],
        rejected_lengths=d["lengths"],
        length_normalized=True,
    ),
    "kto": lambda d, h, w, b: rlk.linear_unpaired_preference_loss(
        h, w, d["targets"], d["refs"], GOOD, d["mask"], bias=b, kl=d["kl"], beta=0.05
    ),
}
UPSTREAM = (1.0, -0.5, 0.0, 2.0**16, float("nan"))


@pytest.mark.fault(31, 33, 34)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_every_backward_of_a_retained_graph_is_that_of_a_fresh_one(name, dtype, backend):
    d = state(dtype)
    fresh = {}
    for g in UPSTREAM:
        operands = own(d)
        fresh[g] = gradients(LOSSES[name](d, *operands), operands, g)
    assert all(x.any() for x in fresh[1.0])
    for first in UPSTREAM:
        inputs, operands = {k: v.clone() for k, v in d.items()}, own(d)
        loss, given = LOSSES[name](inputs, *operands), []
        for k, v in inputs.items():
            if k not in ("hidden", "weight", "bias"):
                v.fill_(1)  # a buffer that the caller uses for the next batch
        for g in (first, 1.0, *UPSTREAM):
            got = torch.autograd.grad(loss, operands, torch.tensor(g), retain_graph=True)
            for x, expected in zip(got, fresh[g], strict=True):
                assert same_bits(x, expected) or g != g and x.isnan().equal(expected.isnan()), (first, g)
                assert all(x.data_ptr() != other.data_ptr() for other in given)
            given += got
            for x in got:
                x.fill_(float("nan"))  # what was given away is the caller's


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", LOSSES)
def test_inputs_are_never_changed(name, backend):
    for dtype in DTYPES:
        d, before = state(dtype), state(dtype)
        operands = own(d)
        loss = LOSSES[name](d, *operands)
        for g in (0.7, -2.0):
            torch.autograd.grad(loss, operands, torch.tensor(g), retain_graph=True)
        for x, key in zip(operands, ("hidden", "weight", "bias"), strict=True):
            assert same_bits(x.detach(), before[key])
        assert all(same_bits(d[k], before[k]) for k in d if k != "kl")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_an_operand_changed_before_the_backward_is_noticed(name, changed, backend):
    d = state()
    operands = own(d)
    inputs = [x * 1 for x in operands]
    loss = LOSSES[name](d, *inputs)
    with torch.no_grad():
        inputs[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.fault(36, 37)
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_and_forward_mode_are_refused(name, backend):
    d = state()
    operands = own(d)
    with pytest.raises(RuntimeError, match="double backward is not supported by rlkernels"):
        torch.autograd.grad(LOSSES[name](d, *operands), operands, create_graph=True)
    with pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
        torch.func.jvp(
            lambda w: LOSSES[name](d, d["hidden"], w, d["bias"]), (d["weight"],), (torch.ones_like(d["weight"]),)
        )
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
        LOSSES[name](
            d, torch.autograd.forward_ad.make_dual(d["hidden"], torch.ones_like(d["hidden"])), d["weight"], d["bias"]
        )


CHECKED = {name: LOSSES[name] for name in ("policy", "policy of sequences", "policy of sums", "sft", "dpo", "kto")}


@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck_in_float64(name, backend):
    d = state(torch.float64, (4, 3))
    d["hidden"], d["weight"] = d["hidden"][..., :3].contiguous(), d["weight"][:11, :3].contiguous()
    d["bias"], d["targets"] = d["bias"][:11].contiguous(), d["targets"].clamp(max=10)
    d["old"], d["refs"], d["kl"] = (
        problems.rows(d, problems.leaves(d))[0].detach() + 0.3 * d["old"].sin(),
        d["refs"] / 5,
        d["kl"].double(),
    )
    function = CHECKED[name]
    if name == "sft":  # the derivative of dft is not that of its value

        def function(d, h, w, b):
            return rlk.linear_sft_loss(
                h, w, d["targets"], d["mask"], bias=b, sample_weights=d["advantages"], temperature=d["temperature"]
            )

    operands = own(d)
    assert torch.autograd.gradcheck(lambda *o: 1.7 * function(d, *o), operands, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.fault(42)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_checkpointing_recomputes_the_same_bits(name, reentrant, backend):
    d, results = state(torch.bfloat16), []
    for run in (
        lambda *o: LOSSES[name](d, *o),
        lambda *o: checkpoint(lambda *o: LOSSES[name](d, *o), *o, use_reentrant=reentrant),
    ):
        operands = own(d)
        loss = run(*operands)
        (loss * 0.7).backward()
        results.append([loss.detach(), *(x.grad for x in operands)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.fault(43)
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_casts_what_it_is_given_and_nothing_inside(name, hidden, weight, autocast, backend):
    d = state()
    mixed = [
        d["hidden"].to(hidden).requires_grad_(),
        d["weight"].to(weight).requires_grad_(),
        d["bias"].clone().requires_grad_(),
    ]
    with torch.autocast("cpu", dtype=autocast):
        loss = LOSSES[name](d, *mixed)
    assert loss.dtype == torch.float32
    cast = [x.detach().to(autocast).requires_grad_() for x in mixed]
    expected = LOSSES[name](d, *cast)
    assert same_bits(loss.detach(), expected.detach())
    got, want = gradients(loss, mixed, 0.3), gradients(expected, cast, 0.3)
    for x, g, e in zip(mixed, got, want, strict=True):
        assert g.dtype == x.dtype and same_bits(g, e.to(x.dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_a_backward_under_autocast_multiplies_in_the_dtype_of_its_forward(name, backend):
    d = state()
    operands = own(d)
    loss = LOSSES[name](d, *operands)
    first = torch.autograd.grad(loss, operands, torch.tensor(0.3), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = torch.autograd.grad(loss, operands, torch.tensor(0.3))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.fault(70)
def test_a_tied_embedding_gets_both_gradients(backend):
    d = state()
    ids = torch.randint(problems.V, (4, L), generator=torch.Generator().manual_seed(9))
    wide, weight = d["weight"].double().requires_grad_(), d["weight"].clone().requires_grad_()
    truth = problems.policy(d, [torch.tanh(wide[ids]), wide, None])
    loss = policy(d, torch.tanh(weight[ids]), weight, None, clip_high=0.28)
    assert_gradients([None, *gradients(loss, [weight], 1.3)][1:], gradients(truth, [wide], 1.3))


@pytest.mark.fault(105)
def test_an_adapter_on_the_head_moves_the_loss_and_gets_gradients(backend):
    d, draw = state(), torch.Generator().manual_seed(3)
    down, up = (torch.randn(s, generator=draw).mul(0.2).requires_grad_() for s in ((3, problems.H), (problems.V, 3)))
    loss = policy(d, d["hidden"], d["weight"] + up @ down, d["bias"], clip_high=0.28)  # the base weight is frozen
    wide = [x.detach().double().requires_grad_() for x in (down, up)]
    truth = problems.policy(d, [d["hidden"].double(), d["weight"].double() + wide[1] @ wide[0], d["bias"].double()])
    assert loss.item() != policy(d, d["hidden"], d["weight"], d["bias"], clip_high=0.28).item()
    assert_gradients(gradients(loss, [down, up], 1.3), gradients(truth, wide, 1.3))


LAYOUTS = {
    "weight [H, V] transposed": lambda h, w: (h, w.t().contiguous().t()),
    "weight inside a larger one": lambda h, w: (h, torch.cat([w, w])[: len(w)]),
    "weight of every other row": lambda h, w: (h, w.repeat_interleave(2, 0)[::2]),
    "hidden without its last token": lambda h, w: (torch.cat([h, h[:, :1]], 1)[:, :-1], w),
    "hidden, tokens first": lambda h, w: (h.transpose(0, 1).contiguous().transpose(0, 1), w),
    "hidden expanded": lambda h, w: (h[:1].expand_as(h), w),
    "hidden of every other feature": lambda h, w: (h.repeat_interleave(2, -1)[..., ::2], w),
}


@pytest.mark.fault(7)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_that_of_a_copy(layout, dtype, backend):
    d = state(dtype)
    for name in ("policy", "policy of sequences", "dpo"):
        results = []
        for dense in (False, True):
            leaves = own(d)
            h, w = LAYOUTS[layout](leaves[0], leaves[1])
            loss = LOSSES[name](d, h.contiguous() if dense else h, w.contiguous() if dense else w, leaves[2])
            results.append([loss.detach(), *gradients(loss, leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6 if dtype == torch.float32 else 1e-3
            )


COMPILED = {
    "policy": lambda d, h, w, t: rlk.linear_policy_loss(
        h,
        w,
        d["targets"],
        d["old"],
        d["advantages"],
        d["mask"],
        temperature=t,
        clip_high=t,
        kl_coef=t,
        ref_logprobs=d["ref"],
        entropy_coef=t,
    ),
    "sequences": lambda d, h, w, t: rlk.linear_policy_loss(
        h,
        w,
        d["targets"],
        d["old"],
        d["advantages"],
        d["mask"],
        temperature=t,
        ratio_level="sequence",
        aggregation="seq-mean-token-mean",
    ),
    "sft": lambda d, h, w, t: rlk.linear_sft_loss(h, w, d["targets"], d["mask"], temperature=t, kind="dft"),
    "dpo": lambda d, h, w, t: rlk.linear_dpo_loss(
        h,
        w,
        d["targets"],
        d["mask"],
        ref_chosen_logps=d["refs"][:2],
        ref_rejected_logps=d["refs"][2:],
        temperature=t,
        beta=t,
    ),
    "kto": lambda d, h, w, t: rlk.linear_unpaired_preference_loss(
        h, w, d["targets"], d["refs"], GOOD, d["mask"], temperature=t, beta=t, kl=t
    ),
}


# A graph holds ops, whatever backend they name: test_ops compiles them on each.
@pytest.mark.fault(47, 49)
@pytest.mark.parametrize(
    "name,dtype", [*((name, torch.float32) for name in COMPILED), ("policy", torch.bfloat16), ("kto", torch.bfloat16)]
)
def test_one_graph_for_every_length_and_number(name, dtype):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend=counter, dynamic=True)
    for length, t in ((3, 0.5), (4, 0.6), (7, 0.9)):  # one more than the graphs that may be made
        d, found = state(dtype, (4, length), seed=length), []
        for function in (compiled, COMPILED[name]):
            operands = own(d, bias=False)[:2]
            loss = function(d, *operands, t)
            found.append([loss.detach(), *gradients(loss, operands, 1.3)])
        for a, b in zip(*found, strict=True):
            assert frobenius(a, b.double()) <= (2e-5 if a.dtype == torch.float32 else 4e-3)
    assert counter.frame_count <= 2, counter.frame_count


@pytest.mark.fault(62)
def test_threads_share_no_buffer(backend):
    from concurrent.futures import ThreadPoolExecutor

    from rlkernels.backends import use_backend

    def run(seed):
        with use_backend(backend):
            one = state(seed=seed)
            operands = own(one)
            loss = policy(one, *operands)
            return [loss.detach(), *gradients(loss, operands)]

    expected = [run(seed) for seed in range(4)] * 4
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(run, [0, 1, 2, 3] * 4), expected, strict=True):
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
