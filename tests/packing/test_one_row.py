"""Packed batches as one row, ``[1, T]``: the results of ``[T]``, and a row where the results are per token."""

import inspect

import padded_calls as packed
import pytest
import torch

import rlkernels as rlk

FUNCTIONS = sorted({name.split(",")[0].split(" ")[0] for name in packed.CALLS})
WITHOUT_A_ROW = {"end_scores", "reward_scores", "shift_targets", "unpack"}
"""Takes one row by itself, or scores of which it could not tell whether they are per token."""


class _Rows:
    """The library, called with every tensor ``[T, ...]`` as ``[1, T, ...]``."""

    def __init__(self, count):
        self.count, self.results = count, []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            args = [self.row(x) for x in args]
            found = getattr(rlk, name)(*args, **{key: self.row(x) for key, x in kwargs.items()})
            self.results.append(found)
            return found

        return call

    def row(self, x):
        return x[None] if isinstance(x, torch.Tensor) and x.shape[:1] == (self.count,) else x


def called(name, monkeypatch, count=packed.T, mask=packed.MASK):
    rows = _Rows(count)
    monkeypatch.setattr(packed, "rlk", rows)
    found = packed.CALLS[name](count, mask, torch.tensor(packed.CU))
    monkeypatch.undo()
    return found, rows.results[0]


@pytest.mark.parametrize("name", packed.CALLS)
@pytest.mark.parametrize("padded", (True, False), ids=("padding", "no padding"))
def test_one_row_gives_the_results_of_packed_tokens(name, padded, monkeypatch):
    count, mask = (packed.T, packed.MASK) if padded else (packed.END, packed.MASK[: packed.END])
    expected = packed.CALLS[name](count, mask, torch.tensor(packed.CU))
    got, result = called(name, monkeypatch, count, mask)
    if expected.shape[-1:] == (count,):
        for x in result if isinstance(result, tuple) else (result,):
            assert x.shape == (1, count)
        got = got.reshape(expected.shape)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_every_function_of_packed_tokens_takes_one_row():
    with_offsets = {
        name
        for name in rlk.__all__
        if inspect.isfunction(f := getattr(rlk, name)) and "cu_seqlens" in inspect.signature(f).parameters
    }
    # By the decorator, or by the question in the function itself.
    decorated = {name for name in with_offsets if hasattr(getattr(rlk, name), "__wrapped__")}
    asking = {name for name in with_offsets if "on_one_row" in getattr(rlk, name).__code__.co_names}
    assert decorated | asking >= with_offsets - WITHOUT_A_ROW
    assert with_offsets - WITHOUT_A_ROW - set(FUNCTIONS) == {
        "process_reward_loss",
        "rejection_mask",
        "rho_correction",
        "rollout_metrics",
        *(
            "divergence_loss",
            "linear_distillation_loss",
        ),  # in test_packed_advantages_and_divergences.py, as all of these
        *("assemble_rewards", "extended_mask", "optimal_token_advantages", "step_advantages", "vtrace", "wpo_weights"),
    }


def test_the_other_functions_take_one_row():
    labels, cu = packed.TARGETS[: packed.END], packed.CU
    logits, a, b = (x[: packed.END] for x in (packed.LOGITS, packed.LOGP, packed.OLD))
    assert torch.equal(
        rlk.process_reward_loss(logits[None], labels[None], cu_seqlens=cu),
        rlk.process_reward_loss(logits, labels, cu_seqlens=cu),
    )
    rules = {"seq_mean_k1": 1.5}
    assert torch.equal(
        rlk.rejection_mask(a[None], b[None], rules=rules, cu_seqlens=cu)[0],
        rlk.rejection_mask(a, b, rules=rules, cu_seqlens=cu),
    )
    options = {"level": "sequence_mean", "mask_low": 0.5, "cu_seqlens": cu}
    assert torch.equal(rlk.rho_correction(a[None], b[None], **options)[0], rlk.rho_correction(a, b, **options))
    found, known = (rlk.rollout_metrics(*x, cu_seqlens=cu) for x in ((a[None], b[None]), (a, b)))
    assert found.keys() == known.keys() and all(torch.equal(found[k], known[k]) for k in known)


def test_the_loss_of_each_token_of_one_row_is_a_row():
    x, old, advantages = (y[: packed.END] for y in (packed.LOGP, packed.OLD, packed.LOGP))
    targets, options = packed.TARGETS[: packed.END], {"cu_seqlens": packed.CU, "reduction": "none"}
    head = torch.eye(packed.LOGITS.shape[-1], dtype=packed.LOGITS.dtype)
    for function, model in (
        ("policy_loss", (x,)),
        ("logits_policy_loss", (packed.LOGITS[: packed.END], targets)),
        ("linear_policy_loss", (packed.LOGITS[: packed.END], head, targets)),
    ):
        f = getattr(rlk, function)
        flat = f(*model, old, advantages, **options)
        rows = [y if y is head else y[None] for y in (*model, old, advantages)]
        got, metrics = f(*rows, return_metrics=True, **options)
        assert torch.equal(got, flat[None]) and {y.shape for y in metrics.values()} == {torch.Size(())}


def test_two_rows_are_no_packed_batch():
    with pytest.raises(ValueError, match=r"policy_loss: logprobs has shape \(2, 5\), expected \[N\]"):
        rlk.policy_loss(*(torch.zeros(2, 5),) * 3, cu_seqlens=[0, 10])


@pytest.mark.parametrize("name", ["logits_policy_loss"])
def test_one_row_in_a_compiled_program(name, monkeypatch):
    monkeypatch.setattr(packed, "rlk", _Rows(packed.T))
    torch._dynamo.reset()
    calls = packed.CALLS[name]
    expected = calls(packed.T, packed.MASK, torch.tensor(packed.CU))
    run = torch.compile(lambda m, cu: calls(packed.T, m, cu), backend="eager")
    torch.testing.assert_close(run(packed.MASK, torch.tensor(packed.CU)), expected)


def test_a_gradient_comes_as_a_row():
    logp = packed.LOGP[None].clone().requires_grad_()
    rlk.policy_loss(logp, packed.OLD[None], packed.ADVANTAGES[None], packed.MASK[None], cu_seqlens=packed.CU).backward()
    assert logp.grad.shape == (1, packed.T) and (logp.grad[0, packed.END :] == 0).all() and logp.grad.abs().sum() > 0
