"""Law 3 of the library: equal in every bit, whatever the rows around, the threads, the run, the mode."""

import pytest
import torch
from present_backends import native
from public_calls import CALLS, TRAINED, call, data, policy, rows_of, tensors
from reference import cotangents, draw_rows, same_bits

import rlkernels as rlk
from rlkernels.backends import use_backend


@pytest.mark.fault(53)
@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [37, 4133, 9001])  # below a chunk; one block and a tail; several blocks and a tail
def test_law_3_a_row_does_not_depend_on_the_rows_around_it(vocab, dtype):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    rows = 12
    x, targets, mask = draw_rows((rows,), vocab, dtype)
    reference = draw_rows((rows,), vocab, dtype, seed=4)[0]
    g, columns = cotangents((rows,), 3, dtype=real), [c.clone() for c in cotangents((rows,), 3, seed=5, dtype=real)]
    t = torch.rand(rows, generator=torch.Generator().manual_seed(6), dtype=real) + 0.5

    def compute(pick, x=x):
        options = {"temperature": t[pick], "vocab_mask": mask[pick]}
        _, gradient = policy(x[pick], targets[pick], [c[pick] for c in columns], **options)
        return [
            *rows_of(x[pick], targets[pick], tuple(v[pick] for v in g), ref_logits=reference[pick], **options),
            gradient,
        ]

    with use_backend("cpu"):
        whole = compute(torch.arange(rows))
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(8))
        wide = torch.full((rows, 3 * vocab + 1), float("nan"), dtype=dtype)
        wide[:, 5 : 5 + vocab] = x
        variants = {
            "again": compute(torch.arange(rows)),
            "half of them": compute(torch.arange(5, rows)),
            "permuted": compute(order),
            "alone": [
                torch.cat(parts) for parts in zip(*(compute(torch.tensor([r])) for r in range(rows)), strict=True)
            ],
            "rows apart": compute(slice(None), wide[:, 5 : 5 + vocab]),
        }
        picked = {"half of them": torch.arange(5, rows), "permuted": order}
    for variant, results in variants.items():
        for k, (got, expected) in enumerate(zip(results, whole, strict=True)):
            assert same_bits(got, expected[picked.get(variant, slice(None))]), f"{variant}: result {k} of dtype {dtype}"


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_law_3_results_do_not_depend_on_the_number_of_threads(dtype):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, targets, mask = draw_rows((70,), 533, dtype)
    g, columns = cotangents((70,), 3, dtype=real), cotangents((70,), 3, seed=5, dtype=real)
    rewards, values = torch.randn(9, 40, dtype=real), torch.randn(9, 40, dtype=real)
    before, found = torch.get_num_threads(), []
    try:
        with use_backend("cpu"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(
                    [
                        *rows_of(x, targets, g, ref_logits=x.flip(0)),
                        *policy(x, targets, columns, vocab_mask=mask),
                        *rlk.gae(rewards, values),
                        rlk.policy_loss(values, rewards, values + rewards),
                    ]
                )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for k, (got, expected) in enumerate(zip(other, found[0], strict=True)):
            assert same_bits(got, expected), f"result {k}"


@pytest.mark.parametrize("name", CALLS)
def test_law_3_two_runs_are_equal_in_every_bit(name, backend):
    for first, second in zip(call(name, data()), call(name, data()), strict=True):
        assert same_bits(first, second)


@native
def test_law_3_the_forward_is_the_same_with_and_without_gradients():
    d = data()
    for name in (
        "token_logprobs",
        "token_stats",
        "logits_policy_loss",
        "policy_loss",
        *(name for name in CALLS if name.startswith("linear_")),
    ):
        trained = tensors(CALLS[name]({k: v.clone().requires_grad_() if k in TRAINED else v for k, v in d.items()}))
        with torch.no_grad():
            plain = tensors(CALLS[name](d))
        with torch.inference_mode():
            inference = tensors(CALLS[name](d))
        for a, b, c in zip(trained, plain, inference, strict=True):
            assert same_bits(a.detach(), b) and same_bits(b, c), name
