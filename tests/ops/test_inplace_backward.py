"""F124: with ``inplace_backward`` the gradient takes the memory of the logits, and that must be nobody's parameter."""

import pytest
import torch
from reference import same_bits
from torch.utils.checkpoint import checkpoint

import rlkernels as rlk

V = 5


class HandsOut(torch.autograd.Function):
    """A function whose result is its input, by a name that autograd cannot follow."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, g):
        return g


class HandsOutOneOfTwo(torch.autograd.Function):
    """The same of two inputs: autograd's graph forks there."""

    @staticmethod
    def forward(ctx, y, x):
        return x.detach()

    @staticmethod
    def backward(ctx, g):
        return None, g


# From a parameter [6, V] to logits of its numbers in its memory.
VIEWS = {
    "view": lambda p: p.view(2, 3, V),
    "slice": lambda p: p[:, :],
    "rows": lambda p: p[2:],
    "chunk": lambda p: p.chunk(2)[1],
    "unsafe_chunk": lambda p: p.unsafe_chunk(2)[0],
    "a view of unsafe_chunk": lambda p: p.unsafe_chunk(2)[0][:2],
    "unsqueeze": lambda p: p[None],
    "transposed twice": lambda p: p.t()[:, 1:].t(),
    "a view of a view of a view": lambda p: p.view(-1)[V:].view(-1, V)[1:],
    "a detached leaf": lambda p: p.detach().requires_grad_()[1:],
    "a view that was made a leaf": lambda p: p.detach()[1:].requires_grad_()[:2],
    "its data": lambda p: p.data.requires_grad_().view(2, 3, V),
    "a checkpointed view": lambda p: checkpoint(lambda q: q.view(2, 3, V), p, use_reentrant=True),
    "an autograd function": HandsOut.apply,
    "an autograd function of two": lambda p: HandsOutOneOfTwo.apply(
        torch.zeros(1, requires_grad=True) * 1, p.view(6, V)
    ),
}
FUNCTIONS = {
    "token_logprobs": lambda x, y, **o: rlk.token_logprobs(x, y, **o).sum(),
    "token_stats": lambda x, y, **o: rlk.token_stats(x, y, **o).entropy.sum(),
    "logits_policy_loss": lambda x, y, **o: rlk.logits_policy_loss(
        x, y, torch.zeros(y.shape), torch.ones(y.shape), **o
    ),
    "logits_policy_loss of sequences": lambda x, y, **o: rlk.logits_policy_loss(
        x,
        y,
        torch.zeros(y.shape),
        torch.ones(y.shape),
        weights=torch.ones(y.shape),
        ratio_level="sequence",
        cu_seqlens=None if y.dim() == 2 else torch.tensor([0, len(y)]),
        **o,
    ),
    "sft_loss": lambda x, y, **o: rlk.sft_loss(x, y, **o),
}


@pytest.mark.fault(124)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_view_of_a_parameter_is_overwritten_by_its_gradient(function, view, backend):
    parameter = torch.nn.Parameter(torch.randn(6, V, generator=torch.Generator().manual_seed(0)))
    before = parameter.detach().clone()
    logits = VIEWS[view](parameter)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    with pytest.raises(
        RuntimeError,
        match=rf"^{function.split()[0]}: inplace_backward needs non-leaf memory, got a "
        r"view of a leaf",
    ):
        FUNCTIONS[function](logits, targets, inplace_backward=True)
    FUNCTIONS[function](logits, targets).backward()  # without it the same logits are welcome
    assert same_bits(parameter.detach(), before)


@pytest.mark.fault(124)
@pytest.mark.parametrize("view", ["unsafe_chunk", "a view of unsafe_chunk", "an autograd function"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_has_no_base_is_not_overwritten_in_a_compiled_program(function, view):
    """The graph is not there while Dynamo traces: the op looks at it when it runs."""
    parameter = torch.nn.Parameter(torch.randn(6, V, generator=torch.Generator().manual_seed(0)))
    before = parameter.detach().clone()

    def step(p):
        logits = VIEWS[view](p)
        return FUNCTIONS[function](logits, torch.zeros(logits.shape[:-1], dtype=torch.int64), inplace_backward=True)

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="inplace_backward needs non-leaf memory"):
        torch.compile(step, backend="eager")(parameter).backward()
    assert same_bits(parameter.detach(), before)


@pytest.mark.fault(124)
@pytest.mark.parametrize("view", ["view", "slice", "chunk", "a view of a view of a view"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_view_of_a_parameter_is_refused_when_compiled_too(view, compiler):
    parameter = torch.nn.Parameter(torch.randn(6, V))
    before = parameter.detach().clone()

    def step(p):
        logits = VIEWS[view](p)
        return rlk.token_logprobs(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64), inplace_backward=True)

    with pytest.raises(RuntimeError, match="inplace_backward needs non-leaf memory"):
        torch.compile(step, backend=compiler)(parameter)
    assert same_bits(parameter.detach(), before)


@pytest.mark.fault(124)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_views_of_logits_that_a_model_made_are_written_over_as_before(function, backend):
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 4, 3, generator=draw), torch.randn(V, 3, generator=draw).requires_grad_()
    targets = torch.randint(V, (2, 3), generator=draw)
    found = []
    for inplace in (False, True):
        made = hidden @ head.t()
        logits = made[:, :-1]
        value = made.detach().clone()
        (gradient,) = torch.autograd.grad(FUNCTIONS[function](logits, targets, inplace_backward=inplace), head)
        found.append(gradient)
        assert same_bits(made.detach()[:, -1], value[:, -1]) and same_bits(made.detach(), value) is not inplace
    assert same_bits(*found) and found[0].any()


@pytest.mark.fault(124)
def test_a_later_backward_through_an_alias_that_autograd_knows_raises(backend):
    leaf = torch.randn(4, V, requires_grad=True)
    made = leaf * 1
    for alias in (made[:2], made.detach().requires_grad_()):
        targets = torch.zeros(len(alias), dtype=torch.int64)
        later = rlk.token_logprobs(alias, targets).sum()
        rlk.token_logprobs(made, torch.zeros(4, dtype=torch.int64), inplace_backward=True).sum().backward(
            retain_graph=True
        )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.backward()


@pytest.mark.fault(124)
def test_the_question_is_answered_without_data_and_where_no_leaf_is_strided():
    weight = torch.nn.Parameter(torch.randn(6, V, device="meta"))
    targets = torch.zeros(6, dtype=torch.int64, device="meta")
    rlk.token_logprobs(weight * 1, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="got a view of a leaf"):
        rlk.token_logprobs(weight.unsafe_chunk(2)[0], targets[:3], inplace_backward=True)
    sparse = torch.eye(6, V).to_sparse().requires_grad_()
    rlk.token_logprobs(sparse.to_dense(), torch.zeros(6, dtype=torch.int64), inplace_backward=True).sum().backward()
    assert sparse.grad is not None
