"""The traffic of a head at the sizes of a model, without a device: tensors on ``meta`` take the ways of an accelerator.

Products and kernels over rows are counted by what they must move; everything else, as torch dispatches it.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import eager
from rlkernels.linear import head as heads
from rlkernels.linear import token_stats
from rlkernels.ops import register

T, H, V = 8192, 4096, 151936
GIB = 2**30
ALLOCATED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


def made(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


class Traffic(TorchDispatchMode):
    """``kernels``: bytes of logits that each kernel over rows moves. ``products``: their names and sizes. ``passes``:
    other operations over logits or over the weight, with the dtypes. ``memory``: bytes of buffers of logits.
    ``launches``: operations in all. ``reads``: what the host asked of the device.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.products, self.passes, self.memory, self.launches, self.reads = [], [], [], 0, 0, []
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if self.inside or views or name in {"detach", "alias", "view"}:
            return result
        if name in ALLOCATED:
            if result.dim() == 2 and result.shape[1] >= V:
                self.memory += result.numel() * result.element_size()
            return result
        self.launches += 1
        tensors = [x for x in (*args, *(kwargs or {}).values(), result) if isinstance(x, torch.Tensor)]
        large = {str(x.dtype).removeprefix("torch.") for x in tensors if x.dim() == 2 and max(x.shape) >= V}
        if large:
            self.passes.append((name, *large))
        return result

    def kernel(self, op, backend, *arguments):
        """A kernel over rows reads its logits once and writes their gradient once."""
        self.inside = True
        result = getattr(eager, op)(*arguments)
        self.inside, self.launches = False, self.launches + 1
        if op in {"token_stats", "token_stats_backward", "fused_policy", "divergence"}:
            (rows,) = (x for x in arguments if hasattr(x, "logits"))
            written = [x for x in arguments[1:] if isinstance(x, torch.Tensor) and x.dim() == 2]
            moved = [rows.logits, *([] if rows.ref_logits is None else [rows.ref_logits]), *written]
            self.kernels.append((op, sum(x.numel() * x.element_size() for x in moved)))
        return result

    def product(self, name):
        def call(*tensors, out_dtype, beta=1, out=None):
            a, b = tensors[-2:]
            assert a.dtype == b.dtype == torch.bfloat16 and a.shape[1] == b.shape[0]
            shape = a.shape[0], b.shape[1]
            assert out is None or (out.shape, out.dtype) == (shape, out_dtype)
            self.launches += 1
            self.products.append((name, *shape, a.shape[1], beta))
            return made(*shape, dtype=out_dtype) if out is None else out

        return call


@pytest.fixture
def traffic(monkeypatch):
    """Of a device with 132 multiprocessors, all of whose tokens are live."""
    found = Traffic()

    def numbers(x):
        found.reads.append("tolist")
        return [T] * 2 if len(x) == 2 else [i * T // (len(x) - 1) for i in range(len(x))]

    def places(x):
        found.reads.append("nonzero")
        return torch.empty(x.numel(), x.dim(), dtype=torch.long, device="meta")

    monkeypatch.setattr(torch.Tensor, "tolist", numbers)
    monkeypatch.setattr(torch.Tensor, "nonzero", places)
    monkeypatch.setattr(ops, "serving", lambda *a, **of: "triton")
    monkeypatch.setattr(heads, "multiprocessors", lambda device: 132)
    for module in (ops, register):
        monkeypatch.setattr(module, "run", found.kernel)
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, found.product(name))
    # The heads' own ops are opened, because their fakes would hide the loop over chunks.
    monkeypatch.setattr(token_stats, "linear_stats_backward", token_stats._linear_stats_backward)
    opened = token_stats._linear_stats, token_stats._linear_stats_grad, token_stats._linear_stats_setup
    monkeypatch.setattr(token_stats, "linear_stats", register._recorded("linear_stats", *opened))
    monkeypatch.delenv("RLKERNELS_LOGITS_BUDGET", raising=False)
    return found


def whole(*shape):
    return made(*shape, dtype=torch.long)


def real(*shape):
    return made(*shape, dtype=torch.float32)


def loss_of(kind, **options):
    """A loss of 16 sequences of 512 tokens, all of which are live."""
    shape = 16, T // 16
    h, w, y, a = made(*shape, H, grad=True), made(V, H, grad=True), whole(*shape), real(*shape)
    if kind == "policy":
        return rlk.linear_policy_loss(h, w, y, a, a, entropy_coef=0.01, kl_coef=0.1, ref_logprobs=a, **options)
    if kind == "policy without KL":
        return rlk.linear_policy_loss(h, w, y, a, a, **options)
    if kind == "policy of the moment":
        return rlk.linear_policy_loss(h, w, y, None, a, log_ratio_clamp=5.0, **options)
    if kind == "policy of sequences":
        options |= {"ratio_level": "sequence", "kl_coef": 0.1, "ref_logprobs": a}
        return rlk.linear_policy_loss(h, w, y, a, a, **options)
    if kind == "sft":
        return rlk.linear_sft_loss(h, w, y, **options)
    if kind == "distillation":
        return rlk.linear_distillation_loss(h, w, made(*shape, H), made(V, H), **options)
    stats = rlk.linear_token_stats(h, w, y, **options)
    return (stats.logprobs + stats.entropy).sum()


# Bytes of logits per logit in the kernels, products of a row with the head, stretches of 1 GiB, launches. Where no
# kernel over rows holds the loss, statistics are read before a gradient can be written. Losses of sequences make their
# chunks of whole ones, here two. A teacher has half of the budget.
KINDS = {
    "policy": (6, 3, 4, 360),
    "policy without KL": (6, 3, 4, 275),
    "policy of the moment": (10, 3, 4, 765),
    "sft": (6, 3, 4, 230),
    "policy of sequences": (10, 3, 8, 790),
    "distillation": (10, 4, 8, 685),
    "stats": (10, 4, 4, 320),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_moves_no_more_than_it_must(kind, traffic):
    per_logit, products, stretches, launches = KINDS[kind]
    with traffic:
        loss = loss_of(kind, logits_budget=GIB)
        forward = traffic.memory
        loss.backward()
    assert sum(moved for _, moved in traffic.kernels) <= (per_logit + 0.5) * T * V
    assert sum(rows * columns * depth for _, rows, columns, depth, _ in traffic.products) == products * T * H * V
    # The weight's gradient is read and written once per stretch, of which the first one only writes, and once when it
    # is scaled and rounded. Nothing else walks over the logits or over the weight.
    sums = [(rows, columns, beta) for name, rows, columns, _, beta in traffic.products if name == "addmm"]
    assert sums == [(V, H, int(i > 0)) for i in range(stretches)]
    assert [sorted(dtypes) for _, *dtypes in traffic.passes] == [["bfloat16", "float32"]]
    assert max(forward, traffic.memory - forward) <= GIB
    assert traffic.launches <= launches
    assert len(traffic.reads) == 1 + (kind == "stats")  # whose backward asks for the rows that have a gradient


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_bound_the_same_traffic_takes_no_read(kind, traffic):
    per_logit, products, stretches, _ = KINDS[kind]
    if kind == "policy of sequences":
        per_logit, products, stretches = 10, 4, 8  # the device alone knows the ends of the sequences
    with traffic:
        loss_of(kind, logits_budget=GIB, max_live_tokens=T).backward()
    assert traffic.reads == []
    assert sum(moved for _, moved in traffic.kernels) <= (per_logit + 0.5) * T * V
    counted = sum(rows * columns * depth for _, rows, columns, depth, _ in traffic.products) / (T * H * V)
    assert products - 0.13 <= counted <= products  # the logits of the last part are there still
    assert [name for name, *_ in traffic.products].count("addmm") == stretches


def test_by_default_the_memory_of_the_logits_is_that_of_the_sum_of_the_gradient(traffic):
    with traffic:
        loss_of("policy").backward()
    found = [(depth, beta) for name, _, _, depth, beta in traffic.products if name == "addmm"]
    assert found == [(4096, 0), (4096, 1)]
    assert GIB < traffic.memory <= 4 * H * V
    assert sum(moved for _, moved in traffic.kernels) == 6 * T * V


def test_where_the_caller_counts_rows_the_traffic_is_that_of_before(traffic):
    with traffic:
        loss_of("policy", chunk_tokens=1168).backward()
    found = [(depth, beta) for name, _, _, depth, beta in traffic.products if name == "addmm"]
    assert found == [(1168, 0), *[(1168, 1)] * 6, (16, 1)]
    assert sum(moved for _, moved in traffic.kernels) == 6 * T * V


def test_a_pass_too_much_would_be_seen(traffic):
    logits = made(512, V, dtype=torch.float32)
    with traffic:
        logits.mul_(2.0)
        logits[:, :7].mul_(2.0)
        made(V, H).to(torch.float32)
        made(T, H).to(torch.float32)
    assert [name for name, *_ in traffic.passes] == ["mul_", "_to_copy"] and traffic.launches == 4
