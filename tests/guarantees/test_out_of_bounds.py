"""Nothing outside a tensor is read or written: guard pages behind it, and canaries around it."""

import os
import sys
import textwrap

import pytest
import subprocesses
import torch
from present_backends import native
from public_calls import V, policy
from reference import assert_within_policy, draw_rows, same_bits, statistics
from row_runs import ALL

import rlkernels as rlk

GUARD_PAGES = textwrap.dedent("""
    import mmap
    import torch
    from public_calls import policy, rows_of
    from reference import draw_rows, same_bits
    from guard_pages import guarded
    import rlkernels as rlk

    with rlk.use_backend("cpu"):
        # Every tensor ends at an unreadable page: one element read too far ends the process.
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            real = torch.float64 if dtype == torch.float64 else torch.float32
            for vocab in (1, 33, 1037, 9001):
                x, y, mask = draw_rows((3,), vocab, dtype)
                y[2] = vocab - 1
                g = [torch.randn(3, dtype=real) for _ in range(3)]
                t = torch.rand(3, dtype=real) + 0.5
                for options in ({}, {"vocab_mask": mask}, {"temperature": t}):
                    close = {k: guarded(v) for k, v in options.items()}
                    labels = y if options else y.int()
                    a = rows_of(guarded(x), guarded(labels), [guarded(v) for v in g], ref_logits=guarded(x), **close)
                    b = rows_of(x, y, g, ref_logits=x, **options)
                    assert all(same_bits(p, q) for p, q in zip(a, b))
                    a, b = policy(guarded(x), guarded(y), [guarded(v) for v in g], **close), policy(x, y, g, **options)
                    assert all(same_bits(p, q) for p, q in zip(a, b))
        x, y, _ = draw_rows((3,), 1024)
        for bad in (1024, 1029, -1, 2**40):
            y[1] = bad
            try:
                rlk.token_logprobs(guarded(x), guarded(y))
            except IndexError as error:
                assert f"target {bad} at row 1 is outside [0, 1024)" in str(error)
            else:
                raise SystemExit("a label outside the vocabulary was accepted")
        for n in (1, 7, 15, 33):
            a = [torch.randn(n) for _ in range(3)]
            b = [guarded(v) for v in a]
            assert same_bits(rlk.policy_loss(*a), rlk.policy_loss(*b))
            found, expected = rlk.gae(a[0][None], a[1][None]), rlk.gae(b[0][None], b[1][None])
            assert all(same_bits(p, q) for p, q in zip(found, expected))
        # A row that is ignored or weighs nothing lies on an unreadable page itself: it is not read.
        columns = 4 * mmap.PAGESIZE  # a row of fp32 fills whole pages, of 4 or of 64 KiB
        safe = torch.randn(3, columns)
        whole = guarded(safe, unreadable=columns * 4)
        y = torch.tensor([3, 5, -100])
        g = [torch.tensor([0.3, -1.0, 2.0])] * 3
        pairs = [(rows_of(whole, y, g, ref_logits=whole), rows_of(safe, y, g, ref_logits=safe)),
                 (policy(whole, y, g), policy(safe, y, g))]
        live = torch.tensor([1, 1, 0])
        pairs.append((policy(whole, y.clamp(min=0), g, mask=live), policy(safe, y.clamp(min=0), g, mask=live)))
        assert all(same_bits(p, q) for a, b in pairs for p, q in zip(a, b))
    print("survived")
""")


@pytest.mark.fault(2, 93)
@pytest.mark.skipif(
    os.name != "posix" or sys.platform == "darwin", reason="mprotect of an anonymous mapping is used as on Linux"
)
@native
def test_no_byte_outside_a_tensor_and_no_dead_row_is_read():
    done = subprocesses.code(GUARD_PAGES)
    assert done.returncode == 0 and "survived" in done.stdout, f"exit {done.returncode}: {done.stderr[-2000:]}"


def test_canary_parents_stay_as_they_are_and_are_not_read(backend):
    source, targets, mask = draw_rows((2, 3), V)
    parent = torch.full((4, 5, V + 6), float("nan"))
    parent[1:3, 1:4, 2 : 2 + V] = source
    before = parent.clone()
    columns = [torch.full((4, 5), float("nan")) for _ in range(3)]
    for k, column in enumerate(columns):
        column[1:3, 1:4] = 0.1 * k - 0.3
    stats = rlk.token_stats(parent[1:3, 1:4, 2 : 2 + V], targets, outputs=ALL)
    truth, base = statistics(source, targets), statistics(source, targets, dtype=torch.float32)
    for name in ("logprobs", "entropy", "mean_logits"):
        assert_within_policy(getattr(stats, name), truth[name], base[name], name)
    loss, gradient = policy(parent[1:3, 1:4, 2 : 2 + V], targets, [c[1:3, 1:4] for c in columns])
    assert loss.isfinite() and gradient.isfinite().all()
    assert same_bits(parent, before)
