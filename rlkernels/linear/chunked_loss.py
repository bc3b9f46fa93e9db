"""A loss over chunks of rows, its gradients made as soon as a chunk's derivatives are known: three products, nothing
recomputed.

Per-token losses take one launch per chunk. A loss of whole sequences or pairs is scored when all its rows are in the
chunk; one that outgrows a chunk is swept twice (four products). A shard's rows are scored the same way, after the ranks
have met.
"""

from typing import NamedTuple

import torch

from rlkernels import ops
from rlkernels.backends.protocol import PolicyInputs, RowBatch
from rlkernels.linear.chunking import Rows, filled_up, live_rows, moving_and_still_rows
from rlkernels.linear.head import Chunk, check_targets, without_autocast
from rlkernels.linear.rank_agreement import meeting, met, pattern
from rlkernels.linear.token_stats import Gradients
from rlkernels.logits_layout import or_ignored, or_one
from rlkernels.objectives import OBJECTIVES
from rlkernels.objectives.zero_gradient import still_where_zero
from rlkernels.tracing import replaced


class Terms(NamedTuple):
    """A per-token loss: ``sum_t weight_t l_t + kl_weight_t KL_t - entropy_weight_t H_t``; everything ``[T]``."""

    objective: str
    columns: list
    params: tuple | torch.Tensor
    weight: torch.Tensor
    entropy_weight: torch.Tensor | None
    kl: str | None
    ref_logp: torch.Tensor | None
    kl_weight: torch.Tensor | None

    def live(self):
        live = self.weight != 0
        for extra in (self.entropy_weight, self.kl_weight):
            live = live if extra is None else live | (extra != 0)
        return live

    def still(self):
        """Rows that provably have no gradient: no advantage, and neither KL nor entropy term.

        None where there is no such proof.
        """
        if self.kl is not None or self.entropy_weight is not None or not still_where_zero(self.objective, "advantage"):
            return None
        return self.columns[OBJECTIVES[self.objective].columns.index("advantage") - 1] == 0

    def largest(self):
        """The largest weight, by which a gradient of 1 per token is multiplied."""
        weights = [
            x.abs().amax() for x in (self.weight, self.entropy_weight, self.kl_weight) if x is not None and x.numel()
        ]
        return torch.stack(weights).amax() if weights else 1.0

    def at(self, index):
        return Terms(
            self.objective,
            [c[index] for c in self.columns],
            self.params,
            *(x[index] if isinstance(x, torch.Tensor) else x for x in self[3:]),
        )


class Found(NamedTuple):
    """``gradients``: of hidden states, weight and bias, None where frozen.

    ``logp``, ``entropy``: ``[T]``, 0 where not worked on.
    """

    loss: torch.Tensor
    gradients: tuple
    logp: torch.Tensor
    entropy: torch.Tensor


class _Sweep:
    """State that both sweeps share: the buffer, the sums, and the outputs per row."""

    def __init__(self, head, needs, rows, size, largest):
        self.head, self.needs = head, needs
        self.total = Gradients(head.hidden, head.weight, head.bias, needs, head.shard, keep=True)
        self.chunk = Chunk(
            head.weight,
            head.bias,
            head.softcap,
            head.logit_scale,
            head.logits_dtype,
            head.shard,
            filled_up(min(size, rows)),
            needs[2],
        )
        self.scale = _power_of_two(largest(), head) if self.chunk.products.gradient_dtype == torch.float16 else None
        self.loss = torch.zeros((), dtype=torch.float64, device=head.hidden.device)
        self.logp, self.entropy = (
            torch.zeros(head.targets.shape, dtype=head.real, device=head.hidden.device) for _ in range(2)
        )

    def arguments(self, rows):
        return rows.arguments(self.head.targets, self.head.temperature, self.head.ignore_index)

    def scaled(self, x):
        """A weight or an upstream gradient, before products in fp16."""
        return x if x is None or self.scale is None else x * self.scale

    def logits(self, rows):
        hidden = rows.hidden(self.head.hidden)
        return self.chunk.logits(hidden)[: len(rows)], hidden

    def add(self, rows, dlogits, x, hidden, moving):
        """Feeds the rows that have a gradient to the products.

        On a CPU, where that is known, the others are taken out.
        """
        if moving.device.type == "cpu" and not moving.all():
            kept = moving.nonzero()[:, 0]
            for moved in {id(x): x, id(dlogits): dlogits}.values():
                for to, row in enumerate(kept.tolist()):
                    if to != row:
                        moved[to].copy_(moved[row])
            rows = Rows(rows.index[kept], None if rows.dead is None else rows.dead[kept])
            hidden, dlogits, x = hidden[kept], dlogits[: len(rows)], x[: len(rows)]
        if len(rows):
            self.total.add(self.chunk, rows, dlogits, x, hidden)

    def found(self):
        gradients = self.total.kept() if any(self.needs) else (None, None, None)
        if self.scale is not None:
            for gradient in gradients:
                if gradient is not None:
                    gradient.div_(self.scale)
        return Found(self.loss.to(self.head.real), gradients, self.logp, self.entropy)


def _power_of_two(largest, head):
    """The power of two that brings ``largest`` to between 1 and 2, as a tensor that no host reads."""
    largest = head.hidden.new_full((), largest, dtype=head.real) if isinstance(largest, float) else largest
    usable = (largest > 0) & (largest < torch.inf)
    return torch.exp2(-torch.floor(torch.log2(torch.where(usable, largest, 1.0))))


@torch.no_grad()
def per_token(head, terms, needs, backend):
    """One launch per chunk: statistics, loss and the gradient of the logits."""
    live, still = terms.live() & (head.targets != head.ignore_index), terms.still()
    if still is None or head.bound is not None:
        parts = [(live_rows(live, head.bound), any(needs))]
    else:  # without a gradient too: in another order the loss would have other bits
        parts = list(zip(moving_and_still_rows(live, still), (any(needs), False), strict=True))
    sweep = _Sweep(head, needs, max(len(rows) for rows, _ in parts), head.chunk, terms.largest)
    for rows, moving in parts:
        for start in range(0, len(rows), head.chunk):
            _token_chunk(sweep, rows.part(start, start + head.chunk), terms, moving, backend)
    return sweep.found()


def _token_chunk(sweep, rows, terms, moving, backend):
    x, hidden = sweep.logits(rows)
    weight, entropy_weight, kl_weight = (
        sweep.scaled(rows.of(c)) for c in (terms.weight, terms.entropy_weight, terms.kl_weight)
    )
    out = sweep.chunk.gradient_of(x) if moving else None
    policy = PolicyInputs(
        terms.objective,
        [rows.of(c) for c in terms.columns],
        terms.params,
        weight,
        entropy_weight,
        terms.kl,
        rows.of(terms.ref_logp),
        kl_weight,
    )
    batch = RowBatch(x, *sweep.arguments(rows))
    loss, _, logp, _, _, entropy, dlogp = ops.run_fused(backend, batch, policy, moving, out)
    sweep.loss += loss if sweep.scale is None else loss / sweep.scale
    sweep.logp[rows.index], sweep.entropy[rows.index] = logp, entropy
    if moving:
        sweep.add(rows, out, x, hidden, dlogp != 0 if entropy_weight is None else (dlogp != 0) | (entropy_weight != 0))


@torch.no_grad()
def per_unit(head, plan, score, needs, with_entropy, backend, largest):
    """``score(rows, logp, entropy, first, last) -> loss`` by autograd over a few numbers per row, units ``first`` to
    ``last``.

    ``largest()``: about the largest derivative of the loss by a log-probability.
    """
    chunks = [(first, last, plan.rows(first, last)) for first, last in plan.chunks(head.chunk)]
    if head.shard is not None:
        _compared(head, [len(rows) for _, _, rows in chunks], plan.offsets, needs, with_entropy)
    sweep = _Sweep(head, needs, max((len(rows) for _, _, rows in chunks), default=0), head.chunk, largest)
    wanted = ops.ENTROPY if with_entropy else 0
    for first, last, rows in chunks:
        parts = [rows.part(start, start + head.chunk) for start in range(0, len(rows), head.chunk)]
        statistics, kept = [], None
        for part in parts:
            kept = sweep.logits(part)
            statistics.append(sweep.chunk.statistics(backend, kept[0], sweep.arguments(part), wanted)[:4])
        logp, shift, sum_exp, entropy = (
            (torch.cat(s) for s in zip(*statistics, strict=True)) if parts else (sweep.logp[:0],) * 4
        )
        moving = any(needs) and plan.moves(first)
        loss, dlogp, dentropy = _scored(score, rows, logp, entropy if with_entropy else None, first, last, moving)
        sweep.loss += loss
        sweep.logp[rows.index] = logp
        if with_entropy:
            sweep.entropy[rows.index] = entropy
        if not moving:
            continue
        end = len(rows)
        for part in reversed(parts):  # the last one's logits are there already
            here = slice(end - len(part), end)
            end -= len(part)
            x, hidden = kept or sweep.logits(part)
            kept = None
            upstream = [None if d is None else sweep.scaled(d[here]).contiguous() for d in (dlogp, dentropy)]
            dlogits = sweep.chunk.dlogits(
                backend, *upstream, x, sweep.arguments(part), [s[here] for s in (shift, sum_exp, entropy)]
            )
            sweep.add(part, dlogits, x, hidden, torch.stack([d != 0 for d in upstream if d is not None]).any(0))
    return sweep.found()


def _compared(head, sizes, offsets, needs, with_entropy):
    """The ranks of a process group, before anything that they do together."""
    with meeting(head.where, head.shard.process_group(), head.hidden.device) as now:
        if met(head.hidden.device):
            facts, sums = head.in_common()
            sequences = None if offsets is None else pattern(offsets >= 0, offsets)
            facts += [
                ("rows of each chunk", sizes),
                ("digest of sequences", sequences),
                ("gradients of hidden, weight, bias", needs),
                ("entropy", with_entropy),
            ]
            now.compare(head.shard[1:], facts, sums)


def _scored(score, rows, logp, entropy, first, last, needs):
    with torch.set_grad_enabled(needs):
        leaves = [x.detach().requires_grad_(needs) for x in (logp, entropy) if x is not None]
        loss = score(rows, *leaves, *(() if entropy is not None else (None,)), first, last)
        grads = (
            torch.autograd.grad(loss, leaves, allow_unused=True)
            if needs and loss.requires_grad
            else [None] * len(leaves)
        )
    dlogp = torch.zeros_like(logp) if grads[0] is None else grads[0]
    return loss.detach(), dlogp, grads[1] if len(grads) > 1 else None


def differentiable(h, compute):
    """Runs ``compute(needs)`` and hands its gradients to autograd; returns ``(loss, logp, entropy)``."""
    inputs = h.hidden, h.weight, h.bias
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs)

    def run():
        with without_autocast(h.hidden.device.type):  # it may be on in the backward too
            return compute(needs)

    found = run()
    if not any(needs):
        return found.loss, found.logp, found.entropy
    return ops.with_gradients(found.loss, found.gradients, lambda: run().gradients, *inputs), found.logp, found.entropy


def checked(h, live):
    """The head without its graph; what dead tokens hold ignored, the others' targets and temperatures looked at."""
    temperature = or_one(~live, h.temperature)
    h = replaced(
        h.detached(),
        targets=or_ignored(~live, h.targets, h.ignore_index),
        temperature=temperature.clone() if temperature is h.temperature else temperature,
    )
    check_targets(h.where, h.targets, h.ignore_index, h.temperature, h.weight.shape[0], h.shard)
    return h
