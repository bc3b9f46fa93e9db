"""``vocab_mask`` of the functions over a head: masked columns count as logits of -inf, in values and gradients."""

import linear_problems as problems
import pytest
import torch

import rlkernels as rlk

CHUNKS = (None, 4)


def masks(d, kind):
    """A mask that keeps about half of the columns, and every target."""
    draw = torch.Generator().manual_seed(5)
    vocab = d["weight"].shape[0]
    per_row = torch.rand(*d["targets"].shape, vocab, generator=draw) < 0.5
    known = d["targets"].clamp_min(0)
    if kind == "per row":
        return per_row.scatter(-1, known[..., None], True)
    return per_row.flatten(0, -2)[0].index_fill(0, known.flatten(), True)


def gradients(loss, operands):
    return torch.autograd.grad(loss, operands)


def check(got, want, dtype):
    tolerance = 1e-9 if dtype == torch.float64 else 3e-5
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("fp32", "fp64"))
@pytest.mark.parametrize(
    ("kind", "chunk", "more"),
    [("per row", 4, {}), ("one", None, {"softcap": 5.0, "logit_scale": 0.7}), ("per row", None, {"valid_vocab": 120})],
    ids=("per row", "one for all", "padded vocabulary"),
)
def test_statistics_are_those_of_logits_with_minus_infinity(backend, kind, chunk, dtype, more):
    d = problems.problem(dtype, **more)
    vocab_mask, temperature = masks(d, kind), d["temperature"]
    ours, truth = problems.own(d), problems.leaves(d)
    stats = rlk.linear_token_stats(
        *ours[:2],
        d["targets"],
        bias=ours[2],
        temperature=temperature,
        vocab_mask=vocab_mask,
        chunk_tokens=chunk,
        **more,
    )
    logp, entropy = problems.rows(d, truth, temperature=temperature, vocab_mask=vocab_mask, **more)
    check((stats.logprobs, stats.entropy), (logp.detach(), entropy.detach()), dtype)
    upstream = d["token_weights"]
    got = gradients((upstream * (stats.logprobs - 0.3 * stats.entropy)).sum(), ours)
    want = gradients((upstream * (logp - 0.3 * entropy)).sum(), truth)
    check(got, want, dtype)
    if kind == "one":
        dead = ~vocab_mask
        assert torch.equal(got[1][dead], torch.zeros_like(got[1][dead]))


@pytest.mark.parametrize("kind", ("per row", "one"))
def test_the_logsumexp_is_differentiated_under_a_mask_and_beside_a_target_that_it_leaves_out(backend, kind):
    d = problems.problem(torch.float64)
    vocab_mask, targets = masks(d, kind), d["targets"].clone()
    place = tuple((targets != -100).nonzero()[0].tolist())
    targets[place] = (~(vocab_mask if kind == "one" else vocab_mask[place])).nonzero()[-1, 0]
    ours, truth = problems.own(d), problems.leaves(d)
    stats = rlk.linear_token_stats(*ours[:2], targets, bias=ours[2], vocab_mask=vocab_mask, chunk_tokens=4)
    logits = (truth[0] @ truth[1].T + truth[2]).masked_fill(~vocab_mask, -torch.inf)
    lse = torch.where(targets != -100, logits.logsumexp(-1), 0.0)
    logp = torch.where(targets != -100, logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0] - lse, 0.0)
    check((stats.logsumexp, stats.logprobs), (lse.detach(), logp.detach()), torch.float64)
    assert stats.logprobs[place] == -torch.inf
    upstream, known = d["token_weights"], logp.detach() != -torch.inf
    got = gradients((upstream * (stats.logsumexp + torch.where(known, stats.logprobs, 0.0))).sum(), ours)
    check(got, gradients((upstream * (lse + torch.where(known, logp, 0.0))).sum(), truth), torch.float64)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", ("token", "sequence", "sft", "dpo", "kto"))
def test_a_loss_is_that_of_the_masked_log_probabilities(backend, name, chunk):
    d = problems.problem(torch.float64, shape=(4, 7))
    vocab_mask = masks(d, "per row")
    ours, truth = problems.own(d), problems.leaves(d)
    logp, _ = problems.rows(d, truth, vocab_mask=vocab_mask)
    live = problems.live_of(d)
    head = {"bias": ours[2], "vocab_mask": vocab_mask, "chunk_tokens": chunk}
    if name in ("token", "sequence"):
        options = {"ratio_level": name, "kl_coef": 0.1, "ref_logprobs": d["ref"]}
        got = rlk.linear_policy_loss(*ours[:2], d["targets"], d["old"], d["advantages"], d["mask"], **head, **options)
        want = rlk.policy_loss(logp, d["old"], d["advantages"], live, **options)
    elif name == "sft":
        got = rlk.linear_sft_loss(*ours[:2], d["targets"], d["mask"], **head)
        want = -logp[live].mean()
    else:
        sums, ref = (logp * live).sum(-1), torch.tensor([-9.0, -8.0, -12.0, -10.0], dtype=torch.float64)
        if name == "dpo":
            got = rlk.linear_dpo_loss(
                *ours[:2], d["targets"], d["mask"], ref_chosen_logps=ref[:2], ref_rejected_logps=ref[2:], **head
            )
            gap = 0.1 * ((sums - ref)[:2] - (sums - ref)[2:])
            want = torch.nn.functional.softplus(-gap).mean()
        else:
            desirable = torch.tensor([True, False, True, False])
            got = rlk.linear_unpaired_preference_loss(
                *ours[:2], d["targets"], ref, desirable, d["mask"], kl=torch.zeros((), dtype=ref.dtype), **head
            )
            want = torch.sigmoid(torch.where(desirable, -0.1, 0.1) * (sums - ref)).mean()
    check((got.detach(),), (want.detach(),), torch.float64)
    check(gradients(got, ours), gradients(want, truth), torch.float64)


@pytest.mark.parametrize("kind", ("per row", "one"))
@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl"))
def test_a_divergence_is_over_the_columns_that_the_mask_keeps(backend, divergence, kind):
    d, teacher = problems.problem(torch.float64), problems.problem(torch.float64, seed=1)
    vocab_mask, ours, truth = masks(d, kind), problems.own(d), problems.leaves(d)
    got = rlk.linear_distillation_loss(
        *ours[:2],
        teacher["hidden"],
        teacher["weight"],
        d["mask"],
        bias=ours[2],
        kind=divergence,
        vocab_mask=vocab_mask,
        chunk_tokens=4,
    )
    student = truth[0] @ truth[1].t() + truth[2]
    logits = [student, teacher["hidden"] @ teacher["weight"].t()]
    log_p, log_q = (x.masked_fill(~vocab_mask, -torch.inf).log_softmax(-1) for x in logits)
    if divergence == "forward_kl":
        log_p, log_q = log_q, log_p
    gap = torch.where(vocab_mask, log_p - log_q, 0.0)
    want = (log_p.exp() * gap).sum(-1)[d["mask"]].mean()
    check((got.detach(),), (want.detach(),), torch.float64)
    check(gradients(got, ours), gradients(want, truth), torch.float64)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("per_row", (False, True), ids=("one", "per row"))
def test_the_logsumexp_of_a_head_is_differentiated_over_the_columns_that_the_mask_keeps(per_row, chunk, backend):
    draw = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(*x, generator=draw, dtype=torch.float64) for x in ((2, 3, 5), (7, 5)))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    targets = torch.tensor([[0, 3, -1], [5, 1, 6]])  # some outside of the support; -1 is ignored
    mask = torch.rand(2, 3, 7, generator=draw) < 0.5 if per_row else torch.arange(7) % 3 != 0
    mask[..., 4] = True
    options = {"vocab_mask": mask, "ignore_index": -1}
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)
    got = rlk.linear_token_stats(*leaves, targets, chunk_tokens=chunk, **options).logsumexp
    want = rlk.token_stats(hidden @ weight.T, targets, **options).logsumexp
    support = torch.where(mask, hidden @ weight.T, -torch.inf).logsumexp(-1)
    truth = torch.where(targets != -1, support, 0.0)
    found = [(x, *torch.autograd.grad((x * upstream).sum(), leaves)) for x in (got, want, truth)]
    for ours in found[:2]:
        for x, y in zip(ours, found[2], strict=True):
            torch.testing.assert_close(x, y)


def test_a_second_backward_has_the_mask_of_the_call():
    d = problems.problem(torch.float64)
    mask, ours = masks(d, "one"), problems.own(d)
    loss = rlk.linear_sft_loss(*ours[:2], d["targets"], d["mask"], bias=ours[2], vocab_mask=mask)
    first = torch.autograd.grad(loss, ours, retain_graph=True)
    mask.fill_(True)
    for before, after in zip(first, torch.autograd.grad(loss, ours), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(5, dtype=torch.bool), ValueError, "vocab_mask has shape"),
        (torch.ones(problems.V), TypeError, "must be bool"),
        ([True], TypeError, "vocab_mask"),
    ],
    ids=("shape", "dtype", "list"),
)
def test_a_mask_that_does_not_fit_is_refused(mask, error, words):
    d = problems.problem()
    with pytest.raises(error, match=words):
        rlk.linear_token_logprobs(d["hidden"], d["weight"], d["targets"], vocab_mask=mask)
