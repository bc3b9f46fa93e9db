"""Ranks that raise or stay away: the others hear of it, and the group stays usable."""

import datetime
import re

import torch
import torch.distributed as dist
from reference import same_bits
from vocab_parallel_cases import case, policy_of, stats_of
from vocab_parallel_disagreement import alike, cut, error_of, served
from vocab_parallel_worker import L, Problem

import rlkernels as rlk
from rlkernels.linear import rank_agreement


def wrong(p, shard, name):
    """Calls with one wrong argument."""
    _, options = p.arguments(shard)
    rows = p.hidden, shard.weight, p.targets

    def bad(value, *where):
        x = value.clone()
        x[where] = -7
        return x

    sequences = [torch.zeros(1)] * 2
    return {
        "dtype of targets": (TypeError, lambda: rlk.linear_token_logprobs(*rows[:2], p.targets.float(), **options)),
        "target": (IndexError, lambda: rlk.linear_token_logprobs(*rows[:2], bad(p.targets, 1, 3), **options)),
        "temperature of a row": (
            ValueError,
            lambda: rlk.linear_token_stats(*rows, **{**options, "temperature": bad(p.temperature, 0, 1)}),
        ),
        "option": (TypeError, lambda: rlk.linear_token_logprobs(*rows, **options, colour="red")),
        "chunk_tokens": (ValueError, lambda: rlk.linear_sft_loss(*rows, **options, chunk_tokens=0)),
        "target of a loss": (IndexError, lambda: rlk.linear_sft_loss(*rows[:2], bad(p.targets, 1, 3), **options)),
        "objective": (
            ValueError,
            lambda: rlk.linear_policy_loss(*rows, p.old, p.advantages, **options, objective="none"),
        ),
        "shape of advantages": (
            ValueError,
            lambda: rlk.linear_policy_loss(*rows, p.old, p.advantages[:, :2], **options),
        ),
        "ratio of packed rows": (
            ValueError,
            lambda: rlk.linear_policy_loss(
                p.hidden[0],
                shard.weight,
                p.targets[0],
                p.old[0],
                p.advantages[0],
                **{**options, "temperature": 1.0},
                ratio_level="sequence",
            ),
        ),
        "weight": (TypeError, lambda: rlk.linear_token_logprobs(p.hidden, None, p.targets, **options)),
        "hidden": (TypeError, lambda: rlk.linear_token_logprobs([1.0], shard.weight, p.targets, **options)),
        "odd answers": (
            ValueError,
            lambda: rlk.linear_dpo_loss(
                *rows, ref_chosen_logps=sequences[0], ref_rejected_logps=sequences[1], **options
            ),
        ),
        "desirable": (
            ValueError,
            lambda: rlk.linear_unpaired_preference_loss(*rows, torch.zeros(3), torch.ones(2), **options),
        ),
    }[name]


@case(
    "a wrong {name} on one rank raises there, and on the others an error that says so",
    name=(
        "dtype of targets",
        "target",
        "temperature of a row",
        "option",
        "chunk_tokens",
        "target of a loss",
        "objective",
        "shape of advantages",
        "ratio of packed rows",
        "weight",
        "hidden",
        "odd answers",
        "desirable",
    ),
)
def one_raises(me, name):
    p = Problem()
    shard = p.shard(me, "padded")
    kind, call = wrong(p, shard, name)
    if me.rank == me.ranks - 1:
        message = error_of(call, kind=kind)
    else:
        message = error_of(policy_of, p, shard)  # whatever the others do: they hear of it in their own call
        assert re.search(
            f"^linear_policy_loss: rank {me.ranks - 1} of process_group raised {kind.__name__}: ", message
        ), message
        message = message.partition(f"{kind.__name__}: ")[2]
    served(me)
    return alike(message[:400])


@case("what every rank raises is raised as it is")
def all_raise(me):
    p = Problem()
    kind, call = wrong(p, p.shard(me, "padded"), "target")
    message = error_of(call, kind=kind)
    assert message == f"linear_token_logprobs: target -7 at row {L + 3} is outside [0, 133)"
    served(me)
    return alike(message)


@case("a rank that raises alone, while the others do not call, raises its own error after a moment")
def nobody_listens(me):
    group = dist.new_group(list(range(me.ranks)))
    p = Problem()
    patience, rank_agreement.PATIENCE = rank_agreement.PATIENCE, datetime.timedelta(seconds=0.5)
    try:
        if me.rank == 0:
            kind, call = wrong(p, p.shard(me._replace(group=group), "padded"), "target")
            assert "target -7" in error_of(call, kind=kind)
    finally:
        rank_agreement.PATIENCE = patience
    served(me)


@case("a backward that one rank alone begins ends by the timeout of the group")
def one_backward(me):
    group = dist.new_group(list(range(me.ranks)), timeout=datetime.timedelta(seconds=2))
    p = Problem()
    loss = stats_of(p, p.shard(me._replace(group=group), "padded"))[0].logprobs.sum()
    if me.rank == 0:
        assert "imed out" in error_of(loss.backward)
    served(me)


@case("no token at all, on every rank, is served")
def nothing_at_all(me):
    p = Problem()
    cut(p, 0)
    shard = p.shard(me, "padded")
    found = {}
    for name, call in (("stats", stats_of), ("loss", policy_of)):
        result, leaf = call(p, shard)
        result = result.logprobs.sum() if name == "stats" else result
        gradients = torch.autograd.grad(result, (leaf, shard.weight))
        assert result == 0 and all((g == 0).all() for g in gradients) and gradients[0].shape == (0, L, 32)
        found[name] = result
    return found


@case("what dead tokens hold may differ from rank to rank")
def unlike_garbage(me):
    p, q = Problem(), Problem()
    dead = ~p.mask
    for x in (q.hidden, q.old, q.advantages, q.ref, q.temperature):
        x[dead] = (torch.nan, 7.0, -3.0, 1e30)[me.rank]
    q.targets[dead] = 5 * me.rank
    loss, _ = policy_of(p, p.shard(me, "padded"))
    other, leaf = policy_of(q, q.shard(me, "padded"))
    assert same_bits(loss, other)
    (gradient,) = torch.autograd.grad(other, leaf)
    assert (gradient[dead] == 0).all()
    return {"loss": other, "hidden": gradient}
