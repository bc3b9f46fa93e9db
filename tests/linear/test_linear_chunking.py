"""Chunks of the head: any size gives the same result, bytes stay within the budget, and a row has the same bits
whatever comes with it.
"""

from pathlib import Path

import linear_problems as problems
import pytest
import torch
from linear_problems import H, V, assert_gradients, assert_loss, frobenius, gradients, own, problem
from peak_memory import peak_bytes
from present_backends import native
from reference import same_bits, statistics
from subprocesses import code

import rlkernels as rlk
from rlkernels.backends import cpu_matmul, cpu_memory, use_backend
from rlkernels.linear import chunking, matmul

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (
    {"chunk_tokens": 1},
    {"chunk_tokens": 5},
    {"chunk_tokens": 16},
    {},
    {"logits_budget": 1},
    {"logits_budget": 24 * V * 4},
)
CU = torch.tensor([0, 2, 2, 40, 41, 63])  # empty, of one token, and longer than any chunk but the last


def policy(d, operands, **options):
    h, w, b = operands
    return rlk.linear_policy_loss(
        h, w, d["targets"], d["old"], d["advantages"], d["mask"], bias=b, clip_high=0.28, **options
    )


def test_the_rows_of_a_chunk_may_be_a_graph_of_their_own():
    """Behind a graph break of the caller's, Dynamo traces what it finds: here it made rows by ``_make``, which took
    their number for that of the fields.
    """
    rows = chunking.RowSelection(torch.arange(16))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(lambda rows: rows.part(2, 9), backend="eager")(rows).index, torch.arange(2, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_sum"])
def test_any_chunk_size_and_budget_gives_the_same_loss_and_gradients(level, dtype, backend):
    d = problem(dtype, shape=(63,), seed=7)
    # The log-ratio adds up the rounding of the sequence's tokens.
    wide, slope = problems.leaves(d), 38.0 if level == "sequence_sum" else 1.0
    truth = problems.policy(d, wide, ratio_level=level, cu_seqlens=CU, kl_coef=0.1)
    want = gradients(truth, wide, -1.9)
    for size in SIZES:
        operands = own(d)
        loss = policy(d, operands, ratio_level=level, cu_seqlens=CU, kl_coef=0.1, ref_logprobs=d["ref"], **size)
        assert_loss(loss, truth, slope)
        assert_gradients(gradients(loss, operands, -1.9), want, slope=slope)


@pytest.fixture
def sizes(monkeypatch):
    """``(rows that hold anything, rows, bytes between rows)`` of each product that gives logits."""
    found = []
    for one in (matmul.TorchMatmul, matmul.NativeMatmul, matmul.BlockedFp32Matmul):

        def logits(self, hidden, out, to=one.logits):
            found.append((int((hidden != 0).any(-1).sum()), out.shape[0], out.stride(0) * out.element_size()))
            return to(self, hidden, out)

        monkeypatch.setattr(one, "logits", logits)
    return found


def test_a_sequence_larger_than_a_chunk_is_multiplied_twice_but_for_its_last_part_and_no_other_is(sizes, backend):
    d = problem(shape=(63,), seed=7)
    d["mask"][:], d["targets"][-1] = True, 3
    once = {63: [63], 40: [40, 23], 39: [2, 39, 22], 22: [2, 22, 16, 1, 22]}
    for chunk, rows in once.items():
        # Of 38 tokens; the logits of the 16 are there when the loss is known.
        twice = [2, 22, 16, 22, 1, 22] if chunk == 22 else rows
        for trained, expected in ((True, twice), (False, rows)):
            sizes.clear()
            with torch.set_grad_enabled(trained):
                policy(d, own(d), ratio_level="sequence", cu_seqlens=CU, chunk_tokens=chunk)
            assert [live for live, _, _ in sizes] == expected


@pytest.mark.fault(21)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence_token"])
def test_the_error_of_the_weight_gradient_does_not_grow_with_the_number_of_chunks(level, dtype, backend):
    d = problem(dtype, shape=(8, 96), seed=2)
    # Many sums into a few rows.
    d["targets"][:] = torch.randint(7, d["targets"].shape, generator=torch.Generator().manual_seed(0))
    wide = problems.leaves(d)
    want = gradients(problems.policy(d, wide, ratio_level=level), wide)
    errors = {}
    for chunk in (1, 16, 100, None):
        operands = own(d)
        errors[chunk] = frobenius(
            gradients(policy(d, operands, ratio_level=level, chunk_tokens=chunk), operands)[1], want[1]
        )
    assert max(errors.values()) <= 2e-3, errors
    assert max(errors.values()) <= 1.02 * min(errors.values()), errors


SUBSETS = (1, 2, 3, 7, 31, 100)


@pytest.mark.fault(53)
@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden,vocab", [(32, 133), (96, 1000), (1024, 517)])
def test_a_row_has_the_same_bits_in_any_batch_order_and_chunk_with_and_without_gradients(dtype, hidden, vocab):
    d = problem(dtype, shape=(128,), hidden=hidden, vocab=vocab)
    d["targets"][-1] = 3
    draw = torch.Generator().manual_seed(0)
    with use_backend("cpu"):

        def logp(index, grad=False, **options):
            h, w = d["hidden"][index], d["weight"].clone().requires_grad_(grad)
            stats = rlk.linear_token_stats(
                h, w, d["targets"][index], bias=d["bias"], temperature=d["temperature"][index], **options
            )
            assert stats.logprobs.requires_grad == grad
            return stats.logprobs.detach(), stats.entropy.detach()

        whole = logp(torch.arange(128))
        for count in SUBSETS:
            index = torch.randperm(128, generator=draw)[:count]
            for options in (
                {},
                {"grad": True},
                {"chunk_tokens": 1},
                {"chunk_tokens": 48},
                {"chunk_tokens": 7},
                {"max_live_tokens": count + 5},
            ):
                for got, expected in zip(logp(index, **options), whole, strict=True):
                    assert same_bits(got, expected[index]), (count, options)


@pytest.mark.fault(72, 84)
@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_the_ratio_of_unchanged_weights_is_exactly_1(level, dtype):
    d = problem(dtype, shape=(6, 19), hidden=96, vocab=1000)
    with use_backend("cpu"):
        with torch.no_grad():  # two sequences at a time, as a sampler scores them
            old = torch.cat(
                [
                    rlk.linear_token_logprobs(
                        d["hidden"][i : i + 2], d["weight"], d["targets"][i : i + 2], bias=d["bias"], temperature=0.7
                    )
                    for i in range(0, 6, 2)
                ]
            )
        for execution in ({}, {"chunk_tokens": 5}, {"chunk_tokens": 33}):
            for mask in (d["mask"], None):
                operands = own(d)
                _, metrics = policy(
                    {**d, "old": old, "mask": mask},
                    operands,
                    temperature=0.7,
                    ratio_level=level,
                    return_metrics=True,
                    **execution,
                )
                assert (
                    metrics["ratio"].item() == 1.0
                    and metrics["approx_kl"].item() == 0.0
                    and metrics["clip_fraction"].item() == 0.0
                )


@pytest.mark.fault(67)
def test_log_probabilities_from_bf16_are_within_2e_6_of_float64(backend):
    d = problem(torch.bfloat16, shape=(4,), hidden=1024, vocab=32_000)
    d["targets"][-1] = 5
    logits = d["hidden"].double() @ d["weight"].double().t()
    truth = statistics(logits, d["targets"])["logprobs"]
    logp = rlk.linear_token_logprobs(d["hidden"], d["weight"], d["targets"])
    assert (logp - truth).abs().max() <= 2e-6
    # the loss of a policy reads the same numbers: reinforce with advantages of -1 sums them
    total = rlk.linear_policy_loss(
        d["hidden"], d["weight"], d["targets"], None, -torch.ones(4), objective="reinforce", aggregation="token-sum"
    )
    assert abs(total.item() - truth.sum().item()) <= 1e-5
    rounded = rlk.linear_token_logprobs(d["hidden"], d["weight"], d["targets"], logits_dtype=torch.bfloat16)
    assert (rounded - truth).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_logits_are_those_of_an_engine_that_rounds(rounded, dtype, backend):
    draw = torch.Generator().manual_seed(0)
    # Every product and sum is exact.
    hidden, weight = (torch.randint(-100, 101, s, generator=draw).to(dtype) / 64 for s in ((40, H), (V, H)))
    targets, noise, advantages = (
        torch.randint(V, (40,), generator=draw),
        0.2 * torch.randn(40, generator=draw),
        torch.randn(40, generator=draw),
    )
    logits = (hidden.double() @ weight.double().t()).to(rounded)
    assert (logits.double() != hidden.double() @ weight.double().t()).any()
    want = rlk.token_logprobs(logits, targets, temperature=0.7)
    got = rlk.linear_token_logprobs(hidden, weight, targets, logits_dtype=rounded, temperature=0.7, chunk_tokens=16)
    torch.testing.assert_close(got, want, rtol=0, atol=0 if backend == "cpu" else 1e-6)
    old, leaf = want + noise, logits.clone().requires_grad_()
    operands = [x.clone().requires_grad_() for x in (hidden, weight)]
    for level in ("token", "sequence"):
        options = {"ratio_level": level, "cu_seqlens": torch.tensor([0, 17, 40]), "temperature": 0.7, "clip_high": 0.5}
        theirs = rlk.logits_policy_loss(leaf, targets, old, advantages, **options)
        ours = rlk.linear_policy_loss(
            *operands, targets, old, advantages, logits_dtype=rounded, chunk_tokens=16, **options
        )
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
        (dlogits,) = torch.autograd.grad(theirs, leaf)  # rounded to the logits' dtype, as ours is before its products
        want = dlogits.double() @ weight.double(), dlogits.double().t() @ hidden.double()
        for got, expected in zip(torch.autograd.grad(ours, operands), want, strict=True):
            assert frobenius(got, expected) <= 4e-3


@pytest.mark.fault(95)
def test_a_chunk_takes_as_many_rows_as_the_budget_holds(sizes, monkeypatch, backend):
    d, row = problem(shape=(8, 40)), (V + 16) * 4
    d["mask"][:], d["targets"][-1, -1] = True, 3

    def taken(**options):
        sizes.clear()
        policy(d, own(d), **options)
        assert sum(live for live, _, _ in sizes) == 320
        return sizes

    assert [rows for _, rows, _ in taken()] == [320]
    for rows in (16, 48, 320):
        # With a softcap the way back needs the logits beside their gradient.
        for softcap, copies in ((None, 1), (30.0, 2)):
            found = taken(logits_budget=rows * row * copies, softcap=softcap)
            assert found[0][1] == rows and all(count * stride <= rows * row for _, count, stride in found)
    monkeypatch.setenv("RLKERNELS_LOGITS_BUDGET", str(64 * row))
    assert taken()[0][1] == 64
    assert taken(logits_budget=32 * row)[0][1] == 32  # an argument goes before the environment
    assert taken(chunk_tokens=20)[0][:2] == (20, 32)  # and rows before bytes
    for bad in ("1 GiB", "0", "-5", ""):
        monkeypatch.setenv("RLKERNELS_LOGITS_BUDGET", bad)
        with pytest.raises(ValueError, match="RLKERNELS_LOGITS_BUDGET must be a positive number of bytes, got "):
            taken()


def test_the_budget_without_a_word_is_that_of_the_device(monkeypatch):
    monkeypatch.delenv("RLKERNELS_LOGITS_BUDGET", raising=False)
    for of_sum in (0, 2**29, 2**32):
        assert chunking.budget_bytes(None, "cpu", of_sum) == 256 * 2**20
        assert chunking.budget_bytes(None, "cuda", of_sum) == max(2**30, of_sum)
        assert chunking.budget_bytes(7, "cuda", of_sum) == 7
    monkeypatch.setenv("RLKERNELS_LOGITS_BUDGET", "99")
    assert chunking.budget_bytes(None, "cuda", 2**32) == 99 and chunking.budget_bytes(7, "cuda", 2**32) == 7
    assert chunking.rows_within(2**30, 4 * 128_256) >= 1024  # no tiny products


MIB = 2**20
# Without instructions for bf16 the weight is widened beside the budget, a block at a time.
BESIDE = {torch.float32: 0, torch.bfloat16: 0 if cpu_matmul.available() else matmul.BLOCK_BYTES}


@pytest.mark.fault(92, 95)
@native
@pytest.mark.parametrize("kind", ["policy", "sequences", "sft", "dpo", "log-probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_the_gradients_and_the_budget(kind, dtype, monkeypatch):
    monkeypatch.setattr(
        cpu_memory, "LARGE", 2**62
    )  # every buffer from torch's allocator, which is the one that is watched
    # 4: each sequence outgrows its chunk.
    tokens, vocab, budget = 1024 if kind == "policy" else 512, 32_000, (4 if kind == "sequences" else 16) * MIB
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(8, tokens // 8, 256, generator=draw).to(dtype).requires_grad_()
    w = (torch.randn(vocab, 256, generator=draw) / 16).to(dtype).requires_grad_()
    y, old = torch.randint(vocab, h.shape[:-1], generator=draw), torch.full(h.shape[:-1], -11.0)
    loss = {
        "policy": lambda: rlk.linear_policy_loss(h, w, y, old, old, logits_budget=budget),
        "sequences": lambda: rlk.linear_policy_loss(h, w, y, old, old, ratio_level="sequence", logits_budget=budget),
        "sft": lambda: rlk.linear_sft_loss(h, w, y, logits_budget=budget),
        "dpo": lambda: rlk.linear_dpo_loss(h, w, y, reference_free=True, logits_budget=budget),
        "log-probabilities": lambda: rlk.linear_token_logprobs(h, w, y, logits_budget=budget).sum(),
    }[kind]
    # What is kept until the backward is fp32; there it stands beside the gradients in their own dtype, and the chunk is
    # gone.
    kept = 4 * (w.numel() + h.numel())
    given = 0 if dtype == torch.float32 else 2 * (w.numel() + h.numel())
    with use_backend("cpu"):
        peak = peak_bytes(lambda: torch.autograd.grad(loss(), (h, w)))
        with torch.no_grad():
            forward = peak_bytes(loss)
    assert kept < peak <= max(kept + 1.05 * budget + BESIDE[dtype], kept + given + 0.05 * budget), (
        f"{peak / MIB:.1f} MiB"
    )
    assert 0.75 * budget < forward <= 1.05 * budget + BESIDE[dtype], f"{forward / MIB:.1f} MiB"
    assert peak < 0.6 * tokens * vocab * 4 or tokens < 1024


@pytest.mark.fault(92)
@native
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the most memory that a process held is read from Linux's /proc"
)
@pytest.mark.parametrize("dtype,gradients_in_mib", [("float32", 31.3 + 0.3 + 16), ("bfloat16", 1.5 * 31.6)])
def test_a_process_grows_by_the_gradients_and_the_budget_and_no_more(dtype, gradients_in_mib):
    """What torch's allocator does not see, the libraries' own workspace among it."""
    if dtype == "bfloat16" and not cpu_matmul.available():
        pytest.skip("without instructions for bf16, what malloc keeps of the widened blocks hides what is asked for")
    done = code(
        """
        import sys, torch
        import rlkernels as rlk
        def status(name):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
        def run(tokens, vocab):
            dtype = getattr(torch, sys.argv[1])
            h, w = (torch.ones(n, 256, dtype=dtype).div_(256).requires_grad_() for n in (tokens, vocab))
            y, old = torch.zeros(tokens, dtype=torch.long), torch.full((tokens,), -10.0)
            before = status("VmRSS")
            torch.autograd.grad(rlk.linear_policy_loss(h, w, y, old, old + 11), (h, w))
            return status("VmHWM") - before
        run(64, 1000)  # pages of libraries
        print(run(256, 32_000))
    """,
        dtype,
        RLKERNELS_LOGITS_BUDGET=str(16 * MIB),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert 30 < float(done.stdout) < gradients_in_mib + 6, f"{float(done.stdout):.1f} MiB more"
