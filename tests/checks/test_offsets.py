"""Faults of packed batches: F121, F123 and F147, offsets that are wrong in a compiled program, changed by another
thread, or no tensor.
"""

import pytest
import torch
from packed_calls import BAD, CALLS, EVERY, GOOD, OLD, VALUES, T, Z
from source_trees import needs_compiler

import rlkernels as rlk
from rlkernels.checks import tokens as checks_tokens


def compiled(name, backend):
    torch._dynamo.reset()
    return torch.compile(CALLS[name], backend=backend, fullgraph=True)


# F121 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(121)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"], ids=["as dynamo traces it", "as autograd traces it"])
@pytest.mark.parametrize("name", CALLS)
def test_bad_offsets_raise_in_a_compiled_program_as_they_do_without_compilation(name, backend):
    run = compiled(name, backend)
    torch.testing.assert_close(run(torch.tensor(GOOD)), CALLS[name](torch.tensor(GOOD)))
    for bad in BAD.values():
        for dtype in (torch.int64, torch.int32):
            cu = torch.tensor(bad, dtype=dtype)
            with pytest.raises(ValueError, match="cu_seqlens") as plain:
                CALLS[name](cu)
            with pytest.raises(ValueError, match="cu_seqlens") as inside:
                run(cu)
            assert torch.is_grad_enabled(), "gradients are off from now on"
            # Torch 2.8 says behind it which node of the graph it was.
            assert str(inside.value).splitlines()[0] == str(plain.value)


@pytest.mark.fault(121)
@needs_compiler
@pytest.mark.parametrize("name", ["gae", "sequence_sums", "policy_loss with weights"])
def test_bad_offsets_raise_in_a_program_of_inductor(name):
    run = compiled(name, "inductor")
    torch.testing.assert_close(run(torch.tensor(GOOD)), CALLS[name](torch.tensor(GOOD)))
    for bad in ("ends far behind it", "decreases"):
        with pytest.raises(ValueError, match="cu_seqlens"):
            run(torch.tensor(BAD[bad]))


@pytest.mark.fault(121)
def test_bad_offsets_raise_in_the_gradient_of_a_compiled_program():
    torch._dynamo.reset()
    run = torch.compile(
        lambda z, cu: rlk.policy_loss(z, OLD, VALUES, cu_seqlens=cu, ratio_level="sequence"),
        backend="aot_eager",
        fullgraph=True,
    )
    for bad in (GOOD, *BAD.values()):
        z = Z.clone().requires_grad_()
        if bad == GOOD:
            run(z, torch.tensor(bad)).backward()
            torch.testing.assert_close(
                z.grad,
                torch.autograd.grad(
                    rlk.policy_loss(z, OLD, VALUES, cu_seqlens=torch.tensor(bad), ratio_level="sequence"), z
                )[0],
            )
        else:
            with pytest.raises(ValueError, match="cu_seqlens"):
                run(z, torch.tensor(bad))


@pytest.mark.fault(121)
def test_one_program_serves_every_number_of_tokens_and_sequences():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(
        lambda x, cu: rlk.sequence_sums(x, cu_seqlens=cu), backend=backend, fullgraph=True, dynamic=True
    )
    for length, ends in ((8, (0, 3, 8)), (9, (0, 3, 8, 9)), (17, (0, 1, 2, 3, 17))):
        x, cu = torch.randn(length), torch.tensor(ends)
        torch.testing.assert_close(
            run(x, cu), torch.stack([x[a:b].sum() for a, b in zip(ends, ends[1:], strict=False)])
        )
        with pytest.raises(
            ValueError, match=f"cu_seqlens ends at {length}, expected the number of tokens, {length - 1}"
        ):
            run(x[1:], cu)
    assert len(graphs) == 1


@pytest.mark.fault(121)
@pytest.mark.parametrize("bad", BAD)
def test_where_values_are_not_read_no_offset_points_outside_of_the_tokens(bad, monkeypatch):
    """As on an accelerator: the program may compute anything, within the tokens."""
    monkeypatch.setattr(checks_tokens, "values_are_read", lambda cu: False)
    for dtype in (torch.int64, torch.int32):
        offsets = checks_tokens.segments("here", torch.tensor(BAD[bad], dtype=dtype), Z)
        assert offsets.dtype == torch.int64 and offsets.min() >= 0 and offsets.max() <= T
    reductions = ("sequence_sums", "sequence_means", "token_weights", "aggregate", "policy_loss of sequences")
    # Torch's on a CPU refuses a length below 0.
    for name in ("broadcast_to_tokens", "reward_scores", *(reductions if "decreases" not in bad else ())):
        CALLS[name](torch.tensor(BAD[bad]))
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \(1,\), which is no sequence"):
        checks_tokens.segments("here", torch.tensor([0]), Z)


@pytest.mark.fault(121)
def test_the_host_reads_no_offsets_of_an_accelerator():
    for cu in (torch.empty(5, dtype=torch.int64, device="meta"), torch.empty(5, dtype=torch.int32, device="meta")):
        assert checks_tokens.segments("here", cu, Z.to("meta")).dtype == torch.int64


# F123 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(123)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_offsets_that_are_changed_after_their_check_change_nothing(name, dtype, monkeypatch):
    """What another thread may do at any time: here as soon as the check has passed."""
    want, read = CALLS[name](torch.tensor(GOOD)), checks_tokens.read_offsets

    def read_and_overwritten(cu, *rest):
        offsets = read(cu, *rest)
        caller.fill_(2**30)
        return offsets

    monkeypatch.setattr(checks_tokens, "read_offsets", read_and_overwritten)
    caller = torch.tensor(GOOD, dtype=dtype)
    assert torch.equal(CALLS[name](caller), want)
    assert caller.tolist() == [2**30] * 5


# what else offsets may be ---------------------------------------------------------------------------------------------


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", CALLS)
def test_offsets_may_come_as_a_list(name, backend):
    want = CALLS[name](torch.tensor(GOOD))
    for listed in (list(GOOD), GOOD, [*torch.tensor(GOOD).numpy()]):
        assert torch.equal(CALLS[name](listed), want)


LAYOUTS = {
    "int32": lambda cu: cu.int(),
    "strided": lambda cu: cu.repeat_interleave(3)[::3],
    "column": lambda cu: torch.stack([cu, cu * 7], 1)[:, 0],
    "slice": lambda cu: torch.nn.functional.pad(cu, (4, 4), value=99)[4:-4],
    "negative bit": lambda cu: torch._neg_view(-cu),
}


@pytest.mark.fault(121)
@pytest.mark.parametrize("name", CALLS)
def test_offsets_of_any_layout_equal_their_contiguous_copy(name):
    want = CALLS[name](torch.tensor(GOOD))
    for make in LAYOUTS.values():
        cu = make(torch.tensor(GOOD))
        assert torch.equal(CALLS[name](cu), want)
        assert cu.tolist() == list(GOOD)


@pytest.mark.fault(121)
def test_weights_keep_every_bit_in_a_compiled_program_that_checks_offsets():
    """``tied`` adds a 0 in a compiled program only: weights keep every bit."""
    torch._dynamo.reset()
    weights = torch.tensor([0.1, -0.3, 1e-38, 3e38, 0.0, 1.0, 7.0, -2.0])
    run = torch.compile(
        lambda cu: rlk.value_loss(Z, None, VALUES, EVERY, weights=weights, cu_seqlens=cu),
        backend="aot_eager",
        fullgraph=True,
    )
    assert torch.equal(run(torch.tensor(GOOD)), rlk.value_loss(Z, None, VALUES, EVERY, weights=weights))


@pytest.mark.fault(147)
def test_a_compiled_program_takes_lists():
    torch._dynamo.reset()
    run = torch.compile(lambda cu: rlk.sequence_sums(Z, cu_seqlens=cu), backend="eager", fullgraph=True)
    for ends in (list(GOOD), [0, 3, 5, 6, 8], [0, 1, 4, 6, 8]):
        torch.testing.assert_close(run(ends), torch.stack([Z[a:b].sum() for a, b in zip(ends, ends[1:], strict=False)]))
    with pytest.raises(ValueError, match="^sequence_sums: cu_seqlens ends at 88"):
        run([0, 3, 5, 6, 88])


@pytest.mark.fault(121)
def test_exported_traced_and_fake_programs_hold_the_check():
    class Sums(torch.nn.Module):
        def forward(self, x, cu):
            return rlk.sequence_sums(x, cu_seqlens=cu)

    cu, bad = torch.tensor(GOOD), torch.tensor(BAD["ends far behind it"])
    exported, traced = (
        torch.export.export(Sums(), (Z, cu)).module(),
        torch.fx.experimental.proxy_tensor.make_fx(Sums())(Z, cu),
    )
    for program in (exported, traced):
        assert torch.equal(program(Z, cu), Sums()(Z, cu))
        with pytest.raises(ValueError, match="^sequence_sums: cu_seqlens ends at 100000000"):
            program(Z, bad)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        assert Sums()(mode.from_tensor(Z), mode.from_tensor(cu)).shape == (4,)
