"""Padded batches packed and back, and targets, against loops over rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkernels as rlk

MASKS = {
    "right": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]),
    "left": torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]),
    "both": torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]),
    "holes": torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 1, 0, 0, 1]]),
}


def batch(mask):
    draw = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(1, 99, mask.shape, generator=draw),
        "logp": torch.randn(mask.shape, generator=draw, dtype=torch.float64),
        "states": torch.randn(*mask.shape, 2, generator=draw).bfloat16(),
        "flags": torch.rand(mask.shape, generator=draw) < 0.5,
    }


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("pad_to", (1, 4))
def test_packing_keeps_the_tokens_row_by_row_and_unpacking_returns_them(side, pad_to):
    mask = MASKS[side]
    tensors, live = batch(mask), mask != 0
    packed = rlk.pack(tensors, mask, pad_to=pad_to, fill={"ids": -100, "logp": 0.5})
    count = int(mask.sum())
    total = -(-count // pad_to) * pad_to
    ends = [0, *mask.sum(1).cumsum(0).tolist()[:-1], total]
    assert packed.cu_seqlens.tolist() == ends and packed.cu_seqlens.dtype == torch.int32
    assert packed.attention_mask.tolist() == [True] * count + [False] * (total - count)
    for name, x in tensors.items():
        assert packed.tensors[name].dtype == x.dtype and packed.tensors[name].shape == (total, *x.shape[2:])
        assert torch.equal(packed.tensors[name][:count], x[live])
        tail = {"ids": -100, "logp": 0.5}.get(name, 0)
        assert (packed.tensors[name][count:] == tail).all()
    back = rlk.unpack(packed.tensors, packed.cu_seqlens, mask, fill={"ids": 7})
    for name, x in tensors.items():
        wide = live.reshape(live.shape + (1,) * (x.dim() - 2))
        assert torch.equal(back[name], torch.where(wide, x, torch.tensor(7 if name == "ids" else 0, dtype=x.dtype)))


@pytest.mark.parametrize("padding", ("right", "left"))
@pytest.mark.parametrize("length", (None, 6))
def test_unpacking_without_a_mask_pads_on_one_side(padding, length):
    x, cu = torch.arange(1, 8), [0, 3, 3, 7]
    got = rlk.unpack({"x": x}, cu, length=length, padding=padding, fill={"x": -1})["x"]
    wide = length or 4
    rows = [x[a:b].tolist() for a, b in zip(cu[:-1], cu[1:], strict=True)]
    lines = [[*r, *[-1] * (wide - len(r))] if padding == "right" else [*[-1] * (wide - len(r)), *r] for r in rows]
    assert got.tolist() == lines


def test_packing_and_unpacking_are_differentiable_and_garbage_at_padding_gets_no_gradient():
    mask = MASKS["both"] != 0
    x = torch.randn(mask.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rlk.pack({"x": x}, mask, pad_to=4).tensors["x"], x.requires_grad_())
    y = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: rlk.unpack({"y": y}, [0, 3, 3, 7], padding="left")["y"], y)
    bad = torch.where(mask, x.detach(), torch.nan).requires_grad_()
    rlk.pack({"x": bad}, mask, pad_to=4).tensors["x"].square().sum().backward()
    assert torch.equal(bad.grad, torch.where(mask, 2 * x.detach(), 0.0))


def test_a_bound_takes_the_place_of_the_number_of_tokens():
    mask = MASKS["left"]
    packed = rlk.pack({"x": mask}, mask, num_tokens=11, pad_to=4)
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 12] and packed.tensors["x"].tolist() == [1] * 9 + [0] * 3
    # More places than the padded batch has.
    assert rlk.pack({"x": mask}, mask, num_tokens=40).tensors["x"].sum() == 9
    with pytest.raises(ValueError, match="pack: num_tokens is 8, but there are 9 tokens"):
        rlk.pack({"x": mask}, mask, num_tokens=8)


@pytest.mark.parametrize("shape", ((0, 3), (2, 0), (0, 0)))
def test_empty_batches(shape):
    x = torch.zeros(shape)
    packed = rlk.pack({"x": x}, x)
    assert packed.tensors["x"].shape == (0,) and packed.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert rlk.unpack(packed.tensors, packed.cu_seqlens)["x"].shape == (shape[0], 0)
    assert rlk.unpack(packed.tensors, packed.cu_seqlens, x)["x"].shape == shape


@pytest.mark.parametrize("backend", ("eager", None))
def test_a_policy_loss_of_a_packed_batch_with_padding_is_that_of_the_padded_one(backend):
    mask = MASKS["left"] * torch.tensor([1, 1, 1, 0, 1])
    draw = torch.Generator().manual_seed(1)
    logp, old, advantages = (torch.randn(3, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    packed = rlk.pack(
        {"logp": logp, "old": old, "advantages": advantages, "mask": mask},
        MASKS["left"],
        pad_to=8,
        fill={"logp": torch.nan, "old": torch.inf},
    )
    for aggregation in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        expected = rlk.policy_loss(logp, old, advantages, mask, aggregation=aggregation)
        got = rlk.policy_loss(
            *(packed.tensors[k] for k in ("logp", "old", "advantages", "mask")),
            cu_seqlens=packed.cu_seqlens,
            aggregation=aggregation,
        )
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


def shifted(rows, trained):
    """Targets of lists of ids by a loop."""
    return [
        [row[t + 1] if t + 1 < len(row) and keep[t + 1] else -100 for t in range(len(row))]
        for row, keep in zip(rows, trained, strict=True)
    ]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_targets_cross_no_boundary_and_padded_and_packed_agree(data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    rows = [data.draw(st.lists(st.integers(0, 90), min_size=n, max_size=n)) for n in lengths]
    trained = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    side = data.draw(st.sampled_from(("right", "left")))
    expected = shifted(rows, trained)
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    ids, mask = (torch.tensor([x for row in kind for x in row]) for kind in (rows, trained))
    ids, mask = ids.long(), mask.bool()
    packed = rlk.shift_targets(ids, cu, mask=mask)
    assert packed.tolist() == [x for row in expected for x in row]
    assert torch.equal(rlk.shift_targets(ids[None], cu, mask=mask[None])[0], packed)
    padded = rlk.unpack({"ids": ids, "mask": mask, "there": torch.ones_like(mask)}, cu, padding=side, length=6)
    got = rlk.shift_targets(padded["ids"], attention_mask=padded["there"], mask=padded["mask"])
    there = padded["there"]
    assert torch.equal(got[there], packed) and (got[~there] == -100).all()


def test_targets_that_int32_does_not_hold_come_in_int64():
    assert rlk.shift_targets(torch.tensor([[1, 2]], dtype=torch.int32)).dtype == torch.int32
    wide = rlk.shift_targets(torch.tensor([[1, 2]], dtype=torch.int32), ignore_index=2**40)
    assert wide.tolist() == [[2, 2**40]]


def test_with_bounds_the_host_reads_nothing():
    """Tensors on ``meta`` have nothing that could be read."""
    ids, mask = torch.zeros(2, 3, dtype=torch.long, device="meta"), torch.ones(2, 3, device="meta")
    packed = rlk.pack({"ids": ids, "mask": mask}, mask, num_tokens=8)
    assert packed.tensors["ids"].shape == (8,) and packed.cu_seqlens.shape == (3,)
    back = rlk.unpack(packed.tensors, packed.cu_seqlens, mask)
    assert back["ids"].shape == (2, 3)
    assert rlk.unpack(packed.tensors, packed.cu_seqlens, length=6, padding="left")["mask"].shape == (2, 6)
    assert rlk.shift_targets(packed.tensors["ids"], packed.cu_seqlens, mask=packed.tensors["mask"]).shape == (8,)


X = torch.zeros(2, 3)
REFUSED = {
    "pack: tensors must be a dict of tensors by name, got list": lambda: rlk.pack([X], X),
    r"pack: attention_mask has shape \(3,\), expected \[B, L\]": lambda: rlk.pack({"x": X}, X[0]),
    r"pack: tensors\['x'\] has shape \(3, 2\), expected \[2, 3, \.\.\.\]": lambda: rlk.pack({"x": X.T}, X),
    "pack: fill names 'y', expected names of tensors: x": lambda: rlk.pack({"x": X}, X, fill={"y": 0}),
    r"pack: fill\['x'\] is -100, which torch.uint8 does not have": lambda: rlk.pack(
        {"x": X.byte()}, X, fill={"x": -100}
    ),
    "pack: pad_to must be a positive int": lambda: rlk.pack({"x": X}, X, pad_to=0),
    "unpack: tensors is empty": lambda: rlk.unpack({}, [0]),
    "unpack: cu_seqlens ends at 2, expected the number of tokens, 3": lambda: rlk.unpack({"x": X[0]}, [0, 2]),
    "unpack: length and attention_mask both": lambda: rlk.unpack({"x": X[0]}, [0, 3], X[:1], length=3),
    "unpack: attention_mask has 2 rows, expected one per sequence, 1": lambda: rlk.unpack({"x": X[0]}, [0, 3], X),
    "unpack: attention_mask has 0 tokens in row 0, expected those of the sequence, 1": lambda: rlk.unpack(
        {"x": X[0]}, [0, 1, 3], X
    ),
    "unpack: length is 2, but a sequence has 3 tokens": lambda: rlk.unpack({"x": X[0]}, [0, 3], length=2),
    "unpack: padding must be one of right, left; got 'top'": lambda: rlk.unpack({"x": X[0]}, [0, 3], padding="top"),
    "shift_targets: input_ids must be int32 or int64, got torch.float32": lambda: rlk.shift_targets(X),
    r"shift_targets: mask has shape \(3, 2\), expected \(2, 3\)": lambda: rlk.shift_targets(X.long(), mask=X.T),
    r"shift_targets: input_ids has shape \(2, 3\), expected \[N\]": lambda: rlk.shift_targets(X.long(), [0, 6]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSED[message]()
