"""Plain torch: the definition of correct, on any device and dtype. Protocol: ``rlkernels.backends.protocol``."""

import math

import torch

from rlkernels.backends import gate
from rlkernels.backends.eager_divergence import divergence as divergence
from rlkernels.backends.protocol import (
    ENTROPY,
    IS_TOP1,
    KL,
    LOG_SUM_SQ,
    MEAN_LOGITS,
    PolicyRows,
    RowBatch,
    RowStats,
    SavedRows,
    Upstream,
    check_rows,
    real_dtype,
)
from rlkernels.objectives import OBJECTIVES


def elementwise(objective, columns, params, weight):
    first = columns[0]
    for k, x in enumerate((*columns, *(() if weight is None else (weight,)))):
        if x.shape != first.shape or x.device != first.device or x.dtype != first.dtype and k < len(columns):
            raise ValueError(
                f"elementwise: {f'column {k}' if k < len(columns) else 'weight'} is {tuple(x.shape)} of "
                f"{x.dtype} on {x.device}, the first column "
                f"{tuple(first.shape)} of {first.dtype} on {first.device}; columns have one shape, dtype "
                "and device"
            )
    # Tensors of the columns' dtype: where(condition, 1.0, 1.05) on two Python floats is fp32 whatever the columns are.
    params = [
        p.to(first.dtype) if isinstance(p, torch.Tensor) else first.new_full((), within(p, first.dtype)) for p in params
    ]
    outputs = OBJECTIVES[objective].function(*columns, *params)
    # A constant is filled in where the columns are: a copy of it would wait for the device.
    value, derivative = (
        (x.to(first.dtype) if isinstance(x, torch.Tensor) else first.new_full((), x)).expand(first.shape)
        for x in outputs
    )
    if weight is None:
        # Copies: an objective may return a column as it is, and an op's output must not alias its input.
        return value.sum(dtype=torch.float64).to(first.dtype), *(
            x.clone(memory_format=torch.contiguous_format) for x in (value, derivative)
        )
    live = weight != 0
    value, derivative = torch.where(live, value, 0.0).contiguous(), torch.where(live, derivative, 0.0).contiguous()
    return (weight * value).sum(dtype=torch.float64).to(first.dtype), value, derivative


def within(number, dtype):
    """A Python number as this dtype has it: infinite beyond its reach, where torch raises."""
    return number if abs(number) <= torch.finfo(dtype).max or number != number else math.copysign(math.inf, number)


def weighted_loss(objective, first, minus, others, params, weight, total, share):
    """``sum_i w_i l(first_i - minus_i, others_i)`` and its slopes ``[1, ...]``; with ``minus`` (one or two columns)
    ``[2, ...]``, theirs second.

    ``w``: ``weight`` (None: 1; bool: 1 or 0) times the number ``share``, over the count ``total``; an element of weight
    0 is not evaluated.
    """
    for x in minus:
        first = first - x
    factor = first.new_full((), within(share, first.dtype))
    if total is not None:
        factor = total.double().reciprocal().to(first.dtype) * factor
    # Asked for before it is multiplied: without a live element the factor is infinite.
    weight = factor.expand(first.shape) if weight is None else torch.where(weight != 0, weight * factor, 0.0)
    loss, _, derivative = elementwise(objective, [first, *others], params, weight)
    slopes = first.new_empty((2 if minus else 1, *first.shape))
    torch.mul(weight, derivative, out=slopes[0])
    if minus:
        torch.neg(slopes[0], out=slopes[1])
    return loss, slopes


def _own(targets):
    """On a CPU a copy: another thread may write to the caller's between two looks at them."""
    return targets.clone() if targets.device.type == "cpu" else targets


def _column(temperature):
    return temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature


def _rows(logits, targets, temperature, ignore_index, vocab_mask):
    """Logits of live rows in the arithmetic's dtype (0 elsewhere: a dead row is not looked at), and what each row
    needs.
    """
    live = targets != ignore_index
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()  # torch sums in the order of memory
    x = torch.where(live[:, None], logits.reshape(-1, logits.shape[-1]).to(real_dtype(logits.dtype)), 0.0)
    if vocab_mask is not None:
        x = torch.where(vocab_mask | ~live[:, None], x, -math.inf)
    target = torch.where(live & (targets >= 0) & (targets < logits.shape[-1]), targets, 0).long()[:, None]
    return live, x, target


def _statistics(x, temperature):
    row_max = x.amax(-1)
    centred = (x - row_max[:, None]) / _column(temperature)
    e = centred.exp()
    return row_max, centred, e, e.sum(-1)


def token_stats(rows, wanted):
    logits, targets, temperature, ignore_index, vocab_mask, ref_logits = rows
    vocab = logits.shape[-1]
    targets = _own(targets)
    check_rows(targets, vocab, ignore_index, temperature)
    vocab_mask = vocab_mask if vocab_mask is None else vocab_mask.contiguous()
    live, x, target = _rows(logits, targets, temperature, ignore_index, vocab_mask)
    # Everything is measured from the row maximum: with a common offset of 1e4 in the logits x[y] - lse loses 3.8e-4,
    # this 1e-6.
    row_max, centred, e, sum_exp = _statistics(x, temperature)
    log_sum = sum_exp.log()
    # Met on an accelerator only: NaN there, and no address formed from it.
    out_of_range = (targets < 0) | (targets >= vocab)

    def per_row(values):
        return torch.where(live, torch.where(out_of_range, math.nan, values), 0.0)

    # A tensor each, because the outputs of a registered op must not share memory, were it none.
    entropy, log_sum_sq, mean_logits, ref_logp, ref_row_max, ref_sum_exp, kl = (x.new_empty(0) for _ in range(7))
    is_top1 = x.new_empty(0, dtype=torch.bool)
    if wanted & ENTROPY:
        entropy = per_row(log_sum - torch.where(e == 0, 0.0, e * centred).sum(-1) / sum_exp)
    if wanted & LOG_SUM_SQ:
        log_sum_sq = per_row(torch.log((e * e).sum(-1)) - 2 * log_sum)
    if wanted & MEAN_LOGITS:
        support = x.new_full((), vocab) if vocab_mask is None else vocab_mask.sum(-1).to(x.dtype)
        total = (x if vocab_mask is None else torch.where(vocab_mask, x, 0.0)).sum(-1, dtype=torch.float64).to(x.dtype)
        mean_logits = per_row(total / support / temperature)
    if wanted & IS_TOP1:
        is_top1 = live & (x.argmax(-1) == targets) & row_max.isfinite()
    if ref_logits is not None:
        _, r, _ = _rows(ref_logits, targets, temperature, ignore_index, vocab_mask)
        ref_row_max, ref_centred, _, ref_sum_exp = _statistics(r, temperature)
        ref_logp = per_row(ref_centred.gather(1, target)[:, 0] - ref_sum_exp.log())
        if wanted & KL:
            gap = torch.where(e == 0, 0.0, e * (centred - ref_centred)).sum(-1) / sum_exp
            kl = per_row(gap - log_sum + ref_sum_exp.log())
        ref_row_max, ref_sum_exp = per_row(ref_row_max), per_row(ref_sum_exp)
    return RowStats(
        logp=per_row(centred.gather(1, target)[:, 0] - log_sum),
        row_max=per_row(row_max),
        sum_exp=per_row(sum_exp),
        entropy=entropy,
        log_sum_sq=log_sum_sq,
        mean_logits=mean_logits,
        is_top1=is_top1,
        ref_logp=ref_logp,
        ref_row_max=ref_row_max,
        ref_sum_exp=ref_sum_exp,
        kl=kl,
    )


def token_stats_backward(upstream, rows, saved, out=None, unless=None):
    """The gradient of the logits.

    With ``unless``, ``out`` holds the gradient for an upstream gradient of 1, which the forward made. For any other one
    the gradient is made here, because scaling would round twice.
    """
    dlogp, dentropy, dkl = upstream
    logits, targets, temperature, ignore_index, vocab_mask, ref_logits = rows
    targets = _own(targets)
    vocab_mask = vocab_mask if vocab_mask is None else vocab_mask.contiguous()
    live, x, target = _rows(logits, targets, temperature, ignore_index, vocab_mask)
    active = torch.stack([d != 0 for d in upstream if d is not None]).any(0)
    centred = (x - saved.row_max[:, None]) / _column(temperature)
    p = centred.exp() / saved.sum_exp[:, None]
    log_p = centred - saved.sum_exp.log()[:, None]
    grad = torch.zeros_like(p)
    if dlogp is not None:
        hit = torch.zeros_like(p).scatter_(1, target, 1.0)
        grad = dlogp[:, None] * (hit - p)
        if vocab_mask is not None:  # a target outside the support moves nothing
            inside = vocab_mask.expand(x.shape).gather(1, target)
            grad = torch.where(inside, grad, 0.0)
    if dentropy is not None:
        grad = grad - torch.where(p == 0, 0.0, dentropy[:, None] * p * (log_p + saved.entropy[:, None]))
    if dkl is not None:
        _, r, _ = _rows(ref_logits, targets, temperature, ignore_index, vocab_mask)
        log_q = (r - saved.ref_row_max[:, None]) / _column(temperature) - saved.ref_sum_exp.log()[:, None]
        grad = grad + torch.where(p == 0, 0.0, dkl[:, None] * p * (log_p - log_q - saved.kl[:, None]))
    if vocab_mask is not None:
        grad = torch.where(vocab_mask, grad, 0.0)
    grad = torch.where((live & active)[:, None], grad / _column(temperature), 0.0).to(logits.dtype).contiguous()
    if unless is not None:
        grad = torch.where(unless == 1.0, out.view(grad.shape), grad)
    return grad if out is None else out.copy_(grad.view(out.shape))


def fused_policy(rows, policy, with_grad, out, passes=(token_stats, token_stats_backward)):
    """The loss and its gradient in two passes over the rows.

    ``passes``: the two passes of a backend, for an objective that its kernels do not hold.
    """
    statistics, backward = passes
    live = policy.weight != 0
    for extra in (policy.entropy_weight, policy.kl_weight):
        live = live if extra is None else live | (extra != 0)
    targets = torch.where(live, rows.targets, rows.ignore_index)
    rows = RowBatch(rows.logits, targets, rows.temperature, rows.ignore_index, rows.vocab_mask)
    live = targets != rows.ignore_index
    stats = statistics(rows, ENTROPY)
    weight = torch.where(live, policy.weight, 0.0)
    loss, _, derivative = elementwise(policy.objective, [stats.logp, *policy.columns], policy.params, weight)
    dlogp = torch.where(weight != 0, weight * derivative, 0.0)
    if policy.kl is not None:
        kl_weight = torch.where(live, policy.kl_weight, 0.0)
        penalty, _, slope = elementwise(policy.kl, [stats.logp, policy.ref_logp], [], kl_weight)
        loss, dlogp = loss + penalty, dlogp + torch.where(kl_weight != 0, kl_weight * slope, 0.0)
    dentropy = None
    if policy.entropy_weight is not None:
        entropy_weight = torch.where(live, policy.entropy_weight, 0.0)
        bonus = torch.where(entropy_weight != 0, entropy_weight * stats.entropy, 0.0)
        loss, dentropy = loss - bonus.sum(dtype=torch.float64).to(loss.dtype), -entropy_weight
    dlogits = rows.logits.new_empty((0, 0))
    if with_grad:
        saved = SavedRows(stats.row_max, stats.sum_exp, stats.entropy)
        dlogits = backward(Upstream(dlogp, dentropy), rows, saved, out)
    return PolicyRows(loss, dlogits, stats.logp, stats.row_max, stats.sum_exp, stats.entropy, dlogp)


def gae(rewards, values, mask, cu_seqlens, gamma, lam, masked):
    """One reverse step per position, all rows at once; a packed batch is laid out as rows first. float64 inside."""
    if cu_seqlens is not None:
        return _packed_gae(rewards, values, mask, gate.offsets("gae", cu_seqlens, rewards.shape[0]), gamma, lam, masked)
    dtype = rewards.dtype
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None or masked == "none" else mask
    r, v = (torch.where(live, x.double(), 0.0) for x in (rewards, values))
    next_value, trace = torch.zeros_like(r[:, 0]) if r.shape[1] else r.sum(-1), torch.zeros_like(r.sum(-1))
    advantages = torch.zeros_like(r)
    for t in range(r.shape[1] - 1, -1, -1):
        step = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * trace
        if masked == "skip":
            trace, next_value = torch.where(live[:, t], step, trace), torch.where(live[:, t], v[:, t], next_value)
        else:
            trace, next_value = step, v[:, t]
        advantages[:, t] = trace
    returns = torch.where(live, advantages + v, 0.0)
    return torch.where(live, advantages, 0.0).to(dtype).contiguous(), returns.to(dtype).contiguous()


def _packed_gae(rewards, values, mask, cu_seqlens, gamma, lam, masked):
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    inside = torch.arange(longest, device=rewards.device)[None] < lengths[:, None]
    rows = [rewards.new_zeros(inside.shape), rewards.new_zeros(inside.shape), inside.clone()]
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None or masked == "none" else mask
    for row, packed in zip(rows, (rewards, values, live), strict=True):
        row[inside] = packed
    # Positions behind the end of a short sequence are dead: "zero" gives them r = V = 0, which is what follows the end.
    outputs = gae(*rows[:2], rows[2], None, gamma, lam, "skip" if masked == "skip" else "zero")
    return tuple(x[inside] for x in outputs)
