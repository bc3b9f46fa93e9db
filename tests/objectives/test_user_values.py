"""A user's objective in ``value_loss``: columns, parameters, masks, and what is refused."""

import pytest
import torch

import rlkernels as rlk
from rlkernels.objectives import OBJECTIVES, abs, minimum, objective, where

B, L = 3, 5


def huber(value, old_value, returns, certainty, clip_range, delta=0.5):
    r"""Huber's loss of the error, by a certainty per token, beside a pull towards the old value."""
    gap = value - returns
    near = minimum(abs(gap), delta)
    drift = value - old_value
    loss = near * (abs(gap) - 0.5 * near)
    slope = where(gap < 0.0, -near, near)
    return certainty * loss + 0.5 * clip_range * drift * drift, certainty * slope + clip_range * drift


@pytest.fixture(autouse=True)
def registered():
    objective(huber, columns=4)
    yield
    del OBJECTIVES["huber"]


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(1)
    d = {k: torch.randn(B, L, generator=draw, dtype=torch.float64) for k in ("value", "old", "returns", "certainty")}
    d["mask"] = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 1, 1], [1, 0, 0, 0, 0]]).bool()
    return d


def truth(d, value, clip_range, delta):
    live = d["mask"]
    near = torch.nn.functional.huber_loss(value[live], d["returns"][live], reduction="none", delta=delta)
    return (d["certainty"][live] * near + 0.5 * clip_range * (value[live] - d["old"][live]) ** 2).mean()


@pytest.mark.parametrize("function", [huber, "huber"], ids=["function", "name"])
@pytest.mark.parametrize("delta", [None, 0.3, torch.tensor(0.7)], ids=["default", "number", "tensor"])
def test_value_and_gradient_are_those_of_torch_and_dead_tokens_hold_anything(batch, function, delta):
    x, y = (batch["value"].clone().requires_grad_() for _ in range(2))
    expected = truth(batch, y, 0.2, 0.5 if delta is None else float(delta))
    expected.backward()
    inputs = [torch.where(batch["mask"], batch[k], float("nan")) for k in ("old", "returns", "certainty")]
    options = {} if delta is None else {"delta": delta}
    got, metrics = rlk.value_loss(
        x,
        *inputs[:2],
        batch["mask"],
        objective=function,
        clip_range=0.2,
        certainty=inputs[2],
        return_metrics=True,
        **options,
    )
    got.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(x.grad, y.grad)
    error = (batch["value"] - batch["returns"])[batch["mask"]].square().mean()
    assert metrics.keys() == {"error"}
    torch.testing.assert_close(metrics["error"], error)


def test_packed_is_padded_and_gradcheck_holds(batch):
    live, d = batch["mask"], batch
    options = {"objective": huber, "clip_range": 0.2}
    padded = rlk.value_loss(d["value"], d["old"], d["returns"], live, certainty=d["certainty"], **options)
    packed = rlk.value_loss(
        *(d[k][live] for k in ("value", "old", "returns")),
        certainty=d["certainty"][live],
        cu_seqlens=[0, 3, 7, 8],
        **options,
    )
    torch.testing.assert_close(packed, padded)
    x = d["value"].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: rlk.value_loss(v, d["old"], d["returns"], live, certainty=d["certainty"], **options), x
    )
    rlk.check_objective(huber, clip_range=0.2)


def test_the_objectives_of_the_library_are_what_clip_range_chooses(batch):
    inputs = [batch[k] for k in ("value", "old", "returns", "mask")]
    for named, plain in (
        ({"objective": "value_plain"}, {}),
        ({"objective": "value_clip", "clip_range": 0.2}, {"clip_range": 0.2}),
    ):
        a, b = (rlk.value_loss(*inputs, **o, return_metrics=True) for o in (named, plain))
        assert torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys()
        assert all(torch.equal(a[1][k], b[1][k]) for k in a[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "hubber"}, ValueError, "objective must be one of value_plain, value_clip, huber; .*huber"),
        ({"objective": "ppo_clip"}, ValueError, "objective must be one of value_plain"),
        ({"objective": "value_plain", "clip_range": 0.2}, ValueError, "objective 'value_plain' takes no clip_range"),
        ({"objective": "value_clip"}, TypeError, "objective 'value_clip' needs 'clip_range'"),
        ({"objective": huber, "clip_range": 0.0}, ValueError, "clip_range must be positive"),
        (
            {"objective": huber, "clip_range": 0.1},
            ValueError,
            "objective 'huber' needs a column 'certainty'; pass certainty=",
        ),
        ({"clip": 0.2}, TypeError, "objective 'value_plain' takes no 'clip'"),
        (
            {"objective": huber, "clip_range": 0.1, "certainty": torch.ones(3)},
            ValueError,
            r"certainty has shape \(3,\), expected \(3, 5\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(batch, options, error, message):
    with pytest.raises(error, match=f"^value_loss: {message}"):
        rlk.value_loss(batch["value"], batch["old"], batch["returns"], batch["mask"], **options)
