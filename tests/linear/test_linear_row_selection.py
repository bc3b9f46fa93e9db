"""Which rows enter the products of a loss of the head, and that the others may hold anything."""

import linear_problems as problems
import pytest
import torch
from linear_problems import B, L, gradients, own, problem
from reference import same_bits

import rlkernels as rlk
from rlkernels.linear import matmul, projection
from rlkernels.linear.chunking import ROWS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
POISON = [float("nan"), float("inf"), -float("inf")]


def numbered(dtype=torch.float32, **shape):
    """A problem whose hidden states begin with the number of their row, from 1 on."""
    d = problem(dtype, **shape)
    rows = d["targets"].numel()
    d["hidden"].view(rows, -1)[:, 0] = torch.arange(1, rows + 1).to(dtype)
    d["weight"][:, 0] = 0.0
    logp, _ = problems.rows(d, problems.leaves(d))
    d["old"] = (logp.detach() + 0.4 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(5))).float()
    return d


@pytest.fixture
def entered(monkeypatch):
    """Rows that entered ``hidden weight^T``, and those that entered the products of the gradient with what was wanted
    of it.
    """
    seen = {"logits": [], "gradients": [], "wanted": set()}

    def note(kind, hidden):
        seen[kind] += [int(n) - 1 for n in hidden[:, 0].tolist() if n]

    for name in ("TorchMatmul", "NativeMatmul", "BlockedFp32Matmul"):
        one = getattr(matmul, name)

        def logits(self, hidden, out, to=one.logits):
            note("logits", hidden)
            assert hidden.shape[0] % ROWS == 0, "fewer rows have other bits"
            return to(self, hidden, out)

        def back(self, dlogits, hidden, want_hidden, dweight, first, to=one.gradients):
            note("gradients", hidden)
            seen["wanted"].add((want_hidden, dweight is not None))
            return to(self, dlogits, hidden, want_hidden, dweight, first)

        monkeypatch.setattr(one, "logits", logits)
        monkeypatch.setattr(one, "gradients", back)
    return seen


def rows_where(condition):
    return condition.reshape(-1).nonzero()[:, 0].tolist()


def policy(d, operands, level="token", **options):
    h, w, b = operands
    return rlk.linear_policy_loss(
        h, w, d["targets"], d["old"], d["advantages"], d["mask"], bias=b, ratio_level=level, **options
    )


def cleared(seen):
    found = {k: sorted(v) if k != "wanted" else set(v) for k, v in seen.items()}
    for v in seen.values():
        v.clear()
    return found


@pytest.mark.fault(93)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_a_weight_never_enters_a_product(dtype, entered, backend):
    d = numbered(dtype)
    weights = d["token_weights"].masked_fill(torch.arange(L) % 3 == 1, 0.0)
    live = problems.live_of(d)
    assert 0 < live.sum() < B * L
    for options, enter in (
        ({}, live),
        ({"weights": weights}, live & (weights != 0)),
        ({"chunk_tokens": 4}, live),
        (
            {"weights": weights, "entropy_coef": 0.1, "kl_coef": 0.1, "ref_logprobs": d["ref"], "chunk_tokens": 3},
            live & (weights != 0),
        ),
        ({"max_live_tokens": 19}, live),
    ):
        operands = own(d)
        policy(d, operands, **options).backward()
        assert cleared(entered)["logits"] == rows_where(enter)  # each of them once
    for level in LEVELS[1:]:  # a ratio of a sequence takes all its live tokens
        for options in ({}, {"max_live_tokens": 18}):
            policy(d, own(d), level, weights=weights, **options).backward()
            assert cleared(entered)["logits"] == rows_where(live)  # each of them once: three products, with a bound too
        policy(d, own(d), level, weights=weights, max_live_tokens=18, chunk_tokens=16).backward()
        assert set(cleared(entered)["logits"]) == set(rows_where(live))
    rlk.linear_sft_loss(*own(d)[:2], d["targets"], d["mask"], sample_weights=weights).backward()
    assert cleared(entered)["logits"] == rows_where(live & (weights != 0))
    dead = numbered(dtype, shape=(4, 5))
    rlk.linear_dpo_loss(*own(dead)[:2], dead["targets"], torch.zeros(4, 5), reference_free=True).backward()
    assert cleared(entered)["logits"] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_whose_gradient_is_0_skips_the_products_of_the_gradient(dtype, entered, backend):
    d = numbered(dtype)
    d["advantages"][:, ::2] = 0.0
    live, A = problems.live_of(d), d["advantages"]
    logp, _ = problems.rows(d, problems.leaves(d))
    ratio = (logp.detach() - d["old"]).exp()
    clipped = (A > 0) & (ratio > 1.2) | (A < 0) & (ratio < 0.8)
    moves = live & (A != 0) & ~clipped
    assert (live & clipped).any() and moves.any()
    for options in ({}, {"chunk_tokens": 4}, {"max_live_tokens": 20}, {"chunk_tokens": 1}, {"softcap": 1e4}):
        policy(d, own(d), **options).backward()
        found = cleared(entered)
        assert found["logits"] == rows_where(live) and found["gradients"] == rows_where(moves), options
    for options in ({"entropy_coef": 0.1}, {"kl_coef": 0.1, "ref_logprobs": d["ref"]}):
        policy(d, own(d), **options).backward()
        assert cleared(entered)["gradients"] == rows_where(live), options
    d["advantages"][1] = 0.0
    policy(d, own(d), "sequence").backward()
    assert not set(cleared(entered)["gradients"]) & set(range(L, 2 * L))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_the_sequences_that_cannot_move_have_chunks_of_their_own_without_a_gradient(
    level, entered, monkeypatch, backend
):
    d, made = numbered(shape=(8, 7)), []
    back = projection.HeadProjection.dlogits
    monkeypatch.setattr(
        projection.HeadProjection, "dlogits", lambda self, *a: made.append(len(a[-2][0])) or back(self, *a)
    )
    d["advantages"][[0, 3, 4, 7]] = 0.0
    d["advantages"][1, ::2] = 0.0  # moves all the same
    live = problems.live_of(d)
    moves = live & (d["advantages"] != 0).any(-1, keepdim=True)
    for options in ({}, {"chunk_tokens": 16}, {"chunk_tokens": 4}):
        policy(d, own(d), level, **options).backward()
        found = cleared(entered)
        assert set(found["logits"]) == set(rows_where(live)) and set(found["gradients"]) <= set(rows_where(moves)), (
            options
        )
        assert sum(made) == moves.sum(), options  # known before the logits are: an accelerator skips them too
        made.clear()
    policy(d, own(d), level, kl_coef=0.1, ref_logprobs=d["ref"]).backward()
    assert sum(made) == live.sum()


def test_a_pair_beyond_the_hinge_skips_the_products_of_the_gradient(entered, backend):
    d = numbered(shape=(4, 5))
    sums, _ = problems.answers(d, problems.leaves(d))
    gap = (sums[:2] - sums[2:]).detach().float()
    reference = gap - torch.tensor([20.0, 0.0])  # the first pair's margin is 20, the second one's 0
    operands = own(d)
    rlk.linear_dpo_loss(
        *operands[:2],
        d["targets"],
        d["mask"],
        bias=operands[2],
        loss_type="hinge",
        beta=0.1,
        ref_chosen_logps=reference,
        ref_rejected_logps=torch.zeros(2),
    ).backward()
    found, live = cleared(entered), problems.live_of(d)
    assert found["logits"] == rows_where(live)
    assert found["gradients"] == rows_where(live & torch.tensor([False, True, False, True])[:, None])


@pytest.mark.fault(39)
@pytest.mark.parametrize(
    "trained", [(h, w, b) for h in (0, 1) for w in (0, 1) for b in (0, 1)], ids=lambda t: "".join(map(str, t))
)
def test_what_is_frozen_gets_no_gradient_and_no_buffer(trained, entered, monkeypatch, backend):
    d, made = numbered(), []
    for module in ("rlkernels.linear.token_stats", "rlkernels.linear.chunked_loss"):
        gradient_sums = __import__(module, fromlist=["Gradients"]).Gradients
        monkeypatch.setattr(
            f"{module}.Gradients", lambda *a, to=gradient_sums, **k: made.append(to(*a, **k)) or made[-1]
        )
    for level in LEVELS:
        operands = [x.requires_grad_(bool(on)) for x, on in zip(own(d), trained, strict=True)]
        loss = policy(d, operands, level, chunk_tokens=4)
        assert loss.requires_grad == any(trained)
        held = [[x is not None for x in (g.hidden, g.weight, g.bias)] for g in made]
        made.clear()
        assert held == [list(map(bool, trained))]
        if not any(trained):
            assert not cleared(entered)["gradients"]
            continue
        loss.backward()
        assert [x.grad is not None for x in operands] == list(map(bool, trained))
        assert cleared(entered)["wanted"] == {(bool(trained[0]), bool(trained[1]))}
        full = own(d)
        want = gradients(policy(d, full, level, chunk_tokens=4), full)
        cleared(entered), made.clear()
        for x, g in zip(operands, want, strict=True):
            assert x.grad is None or same_bits(x.grad, g)


@pytest.mark.fault(40)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_the_bits_are_the_same_and_no_gradient_is_made(mode, dtype, entered, backend):
    d = numbered(dtype)
    d["advantages"][0] = 0.0
    for level in LEVELS:
        trained = policy(d, own(d), level, entropy_coef=0.1, chunk_tokens=4)
        plain = policy(d, own(d), level, chunk_tokens=4)
        cleared(entered)
        with mode():
            for expected, options in ((trained, {"entropy_coef": 0.1}), (plain, {})):
                loss = policy(d, own(d), level, chunk_tokens=4, **options)
                assert not loss.requires_grad and same_bits(loss, expected.detach())
        assert not cleared(entered)["gradients"]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_2_what_stands_in_dead_rows_changes_no_bit(level, poison, dtype, backend):
    d = problem(dtype)
    live, weights = problems.live_of(d), d["token_weights"].masked_fill(torch.arange(L) % 3 == 1, 0.0)
    runs = [({}, live), ({"max_live_tokens": 18}, live), ({"max_live_tokens": 18, "chunk_tokens": 32}, live)]
    if level == "token":
        weighed = live & (weights != 0)
        runs += [({"weights": weights}, weighed), ({"weights": weights, "max_live_tokens": 18}, weighed)]
    for options, kept in runs:
        results = []
        for filling in (0.25, poison):
            inputs = {
                k: v.masked_fill(~kept, filling) if k in ("old", "ref", "advantages") else v for k, v in d.items()
            }
            inputs["hidden"] = d["hidden"].masked_fill(~kept[..., None], filling)
            more = {k: v.masked_fill(~live, filling) if k == "weights" else v for k, v in options.items()}
            operands = own(inputs)
            loss, metrics = policy(
                inputs,
                operands,
                level,
                entropy_coef=0.1,
                kl_coef=0.1,
                ref_logprobs=inputs["ref"],
                return_metrics=True,
                temperature=torch.where(kept, d["temperature"], 1.0),
                **{"chunk_tokens": 8, **more},
            )
            results.append([loss.detach(), *gradients(loss, operands), *metrics.values()])
        assert all(same_bits(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True)), options


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_2_what_stands_at_ignored_targets_changes_no_bit_of_statistics(poison, dtype, backend):
    d = problem(dtype)
    dead, g = ~problems.live_of(d), d["advantages"]
    # A bound takes dead rows along.
    for options in ({}, {"max_live_tokens": B * L}, {"max_live_tokens": B * L, "chunk_tokens": 4}):
        results = []
        for filling in (0.25, poison):
            inputs = {**d, "hidden": d["hidden"].masked_fill(dead[..., None], filling)}
            h, w, b = operands = own(inputs)
            stats = rlk.linear_token_stats(h, w, d["targets"].masked_fill(dead, -100), bias=b, **options)
            found = torch.autograd.grad(
                (stats.logprobs, stats.entropy), operands, (g.masked_fill(dead, filling), g.flip(0))
            )
            results.append([stats.logprobs.detach(), stats.entropy.detach(), *found])
        assert all(same_bits(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True)), options


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("poison", POISON[:2])
def test_law_2_a_nan_in_a_live_row_reaches_the_loss_and_no_other_row(level, poison, backend):
    d = problem()
    d["mask"][1, 2], d["targets"][1, 2] = True, 4
    results = []
    for filling in (d["hidden"][1, 2].clone(), poison):
        d["hidden"][1, 2] = filling
        operands = own(d)
        loss = policy(d, operands, level, entropy_coef=0.1, chunk_tokens=5)
        results.append((loss.detach(), gradients(loss, operands)))
    (clean, (expected, *_)), (loss, (got, weight, _)) = results
    assert clean.isfinite() and loss.isnan() and got[1, 2].isnan().all() and weight.isnan().any()
    others = torch.ones(B, L, dtype=torch.bool)
    others[1, 2 if level == "token" else slice(None)] = False
    torch.testing.assert_close(got[others], expected[others], rtol=1e-6, atol=1e-8)


@pytest.mark.fault(23)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_alive_costs_nothing_and_stays_differentiable(level, dtype, backend):
    d = problem(dtype)
    changes = [{"mask": torch.zeros_like(d["mask"])}, {"targets": torch.full_like(d["targets"], -100)}]
    changes += [{"hidden": d["hidden"].masked_fill(torch.tensor(True), float("nan")), **changes[0]}]
    for change in changes:
        operands = own({**d, **change})
        loss, metrics = policy(
            {**d, **change}, operands, level, entropy_coef=0.1, kl_coef=0.1, ref_logprobs=d["ref"], return_metrics=True
        )
        assert loss.item() == 0.0 and all(m.item() == 0.0 for m in metrics.values())
        assert all(
            g.shape == x.shape and g.dtype == dtype and not g.any()
            for g, x in zip(gradients(loss, operands), operands, strict=True)
        )


@pytest.mark.fault(11)
@pytest.mark.parametrize("level", LEVELS)
def test_no_token_at_all(level, backend):
    for shape, cu in (((0, L), None), ((B, 0), None), ((0,), torch.tensor([0, 0])), ((0,), torch.tensor([0]))):
        d = problem(shape=shape)
        operands = own(d)
        loss = policy(d, operands, level, cu_seqlens=cu)
        assert loss.item() == 0.0
        assert [g.shape for g in gradients(loss, operands)] == [x.shape for x in operands]
