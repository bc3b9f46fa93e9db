"""Good arguments of the public functions, to be called with one of them made bad, and objectives that are refused."""

import torch
from torch import distributed

import rlkernels as rlk
from rlkernels.objectives import exp, objective  # noqa: F401  (exp: an objective's source is checked, and this name in it)

X, Y = torch.zeros(4, 8, 37), torch.zeros(4, 8, dtype=torch.int64)
A = torch.zeros(4, 8)
H, W = torch.zeros(4, 8, 16), torch.zeros(37, 16)
CU = torch.tensor([0, 4, 8])


def stats(x=X, y=Y, **options):
    return rlk.token_stats(x, y, **options)


def logps(x=X, y=Y, **options):
    return rlk.token_logprobs(x, y, **options)


def linear(h=H, w=W, y=Y, **options):
    return rlk.linear_token_logprobs(h, w, y, **options)


def policy(logp=A, old=A, advantages=A, mask=None, **options):
    return rlk.policy_loss(logp, old, advantages, mask, **options)


def logits_policy(x=X, y=Y, old=A, advantages=A, mask=None, **options):
    return rlk.logits_policy_loss(x, y, old, advantages, mask, **options)


def pairs(n=4, m=4):
    return torch.zeros(n), torch.zeros(m)


def dpo(**options):
    return rlk.dpo_loss(*pairs(), *pairs(), **options)


def unpaired(**options):
    return rlk.unpaired_preference_loss(*pairs(), torch.tensor([True, False, True, False]), **options)


def backward_into(make):
    """The in-place backward of logits made from a leaf by ``make``."""
    return logps(make(torch.zeros(4, 8, 37, requires_grad=True)), inplace_backward=True)


def with_target(value, row=5):
    y = Y.clone()
    y.view(-1)[row] = value
    return y


def with_temperature(value):
    t = torch.ones(4, 8)
    t.view(-1)[3] = value
    return t


def sharded_weight():
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        return linear(w=distribute_tensor(W, DeviceMesh("cpu", [0]), [Shard(0)]))
    finally:
        distributed.destroy_process_group()


def pow_objective():
    @objective
    def mine(logp, advantage):
        """Squares."""
        return -advantage * logp**2.0, -2.0 * advantage * logp


def loop_objective():
    @objective
    def mine(logp, advantage):
        """Loops."""
        for _ in range(2):
            logp = logp * advantage
        return logp, advantage


def one_result_objective():
    @objective
    def mine(logp, advantage):
        """No derivative."""
        return -advantage * logp


def default_objective():
    @objective
    def mine(logp, advantage=1.0, scale=1.0):
        """A column with a default."""
        return -advantage * logp * scale, -advantage * scale


def double_backward():
    x = torch.randn(4, 8, 37, requires_grad=True)
    (g,) = torch.autograd.grad(logps(x).sum(), x, create_graph=True)
    g.square().sum().backward()


GRAD = torch.zeros(4, 8, requires_grad=True)
PER_CU = {"cu_seqlens": CU}
PACKED = torch.zeros(8)
