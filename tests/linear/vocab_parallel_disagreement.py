"""Ranks that come with unlike arguments: all of them get the same error within seconds, and the group stays usable."""

import re
import time
from unittest import mock

import torch
from vocab_parallel_cases import case, policy_of, stats_of
from vocab_parallel_worker import OUTPUTS, Problem, counted

import rlkernels as rlk
from rlkernels.linear import chunked_loss, distillation_loss


def error_of(call, *arguments, kind=RuntimeError, **options):
    """The message of the error that a call ends with, within seconds."""
    start = time.monotonic()
    try:
        call(*arguments, **options)
    except kind as error:
        assert time.monotonic() - start < 10, f"it took {time.monotonic() - start:.0f} s"
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def alike(message):
    """What a case returns is compared over the ranks."""
    return {"message": torch.tensor(list(message.encode()), dtype=torch.uint8)}


def served(me):
    """After an error the group still serves, and in step."""
    p = Problem()
    stats, leaf = stats_of(p, p.shard(me, "padded"))
    stats.logprobs.sum().backward()
    torch.testing.assert_close(stats.logprobs.double(), p.truth()["logprobs"], rtol=1e-5, atol=2e-6)


def cut(p, count):
    for name in ("hidden", "targets", "mask", "temperature", "advantages", "old", "ref"):
        setattr(p, name, getattr(p, name)[:count])
    p.shape = p.targets.shape
    p.settings["temperature"] = p.temperature


def narrow(p, count):
    p.hidden, p.weight = p.hidden[..., :count], p.weight[:, :count]


def target(p, _):
    p.targets[2, 6] += 1


def masked(p, _):
    p.targets[2, 6] = -100


def swapped(p, _):
    p.targets[0, [0, 3]] = p.targets[0, [3, 0]]


def warm(p, value):
    p.settings["temperature"] = value if value is None else p.temperature * value
    if value is None:
        del p.settings["temperature"]


def shifted(p, value):
    p.hidden = p.hidden + value


def other_rows(p, _):
    p.hidden = p.hidden.flip(0)


PROBLEMS = {
    "tokens": (cut, 2, "tokens 21.*tokens 14"),
    "tokens, none of them": (cut, 0, "tokens 21.*tokens 0"),
    "features": (narrow, 16, "features 32.*features 16"),
    "a target": (target, None, "digest of live targets"),
    "the order of targets": (swapped, None, "digest of live targets"),
    "a live token": (masked, None, "live tokens 20.*live tokens 19"),
    "temperatures": (warm, 1.1, "temperature"),
    "no temperature": (warm, None, "temperature"),
    "hidden states": (shifted, 1.0, "sum of hidden states"),
    "the order of hidden states": (other_rows, None, "sum of hidden states"),
}
"""What differs on the last rank: how to make it so, and what the error says."""


@case("{what} that differ on one rank are refused on every rank", what=PROBLEMS)
def unlike_tensors(me, what):
    change, value, said = PROBLEMS[what]
    p = Problem()
    if me.rank == me.ranks - 1:
        change(p, value)
    with counted() as calls:
        message = error_of(stats_of, p, p.shard(me, "padded"))
    assert re.search(
        f"^linear_token_stats: the ranks of process_group differ. .*{said}.*Pass the same on every rank", message
    ), message
    assert len(calls) == 2  # one to compare, and one to say what differs
    found = alike(message)
    q = Problem()
    if me.rank == me.ranks - 1:
        change(q, value)
    message = error_of(policy_of, q, q.shard(me, "padded"))
    assert re.search(
        f"^linear_policy_loss: the ranks of process_group differ. .*{re.split('[ ,0-9]*[0-9]', said)[0]}", message
    ), message
    served(me)
    return found


OPTIONS = {
    "chunk_tokens": (4, 8, "rows per chunk 4.*rows per chunk 8"),
    "logits_budget": (16384, 65536, "rows per chunk"),
    "logits_dtype": (torch.float32, torch.bfloat16, "logits_dtype torch.float32.*logits_dtype torch.bfloat16"),
    "outputs": (
        OUTPUTS,
        (),
        r"outputs \[entropy, .*outputs "
        r"\[\]",
    ),
    "temperature": (1.0, 2.0, "temperature 1.0.*temperature 2.0"),
    "softcap": (5.0, 6.0, "softcap 5.0.*softcap 6.0"),
    "logit_scale": (1.0, 1.5, "logit_scale 1.0.*logit_scale 1.5"),
    "max_live_tokens": (21, 30, "max_live_tokens 21.*max_live_tokens 30"),
    "bias": (True, None, "with a bias True.*with a bias False"),
}


@case("an option {name} that differs on one rank is refused on every rank", name=OPTIONS)
def unlike_options(me, name):
    *values, said = OPTIONS[name]
    p = Problem()
    shard = p.shard(me, "padded")
    value = values[me.rank == me.ranks - 1]
    leaf, options = p.arguments(shard)
    options |= {} if value is True else {name: value}
    outputs = options.pop("outputs", ())
    message = error_of(rlk.linear_token_stats, leaf, shard.weight, p.targets, outputs=outputs, **options)
    assert re.search(f"^linear_token_stats: the ranks of process_group differ. .*{said}", message), message
    served(me)
    return alike(message)


LOSSES = {
    "objective": ("ppo_clip", "reinforce", "objective ppo_clip.*objective reinforce"),
    "clip_low": (0.2, 0.1, "clip_low 0.2.*clip_low 0.1"),
    "kl_coef": (0.1, 0.2, "kl_coef"),
    "ratio_level": ("token", "sequence", "ratio_level token.*ratio_level sequence"),
    "entropy_coef": (0.0, 0.1, "entropy"),
    "return_metrics": (False, True, "entropy False.*entropy True"),
    "aggregation": ("token-mean", "token-sum", "aggregation"),
    "correction": (*(rlk.Correction(mode=None, opsm_delta=x) for x in (0.1, 0.2)), "opsm_delta: 0.1.*opsm_delta: 0.2"),
}


@case("a loss whose {name} differs on one rank is refused on every rank", name=LOSSES)
def unlike_losses(me, name):
    *values, said = LOSSES[name]
    p = Problem()
    message = error_of(
        policy_of, p, p.shard(me, "padded"), **{"entropy_coef": 0.0, name: values[me.rank == me.ranks - 1]}
    )
    assert re.search(f"^linear_policy_loss: the ranks of process_group differ. .*{said}", message), message
    served(me)
    return alike(message)


@case("masks and lengths that differ on one rank are refused on every rank")
def unlike_masks(me):
    p, last = Problem(), me.rank == me.ranks - 1
    p.mask[2, 3] ^= last
    found = [error_of(policy_of, p, p.shard(me, "padded"), level) for level in ("token", "sequence")]
    assert all("live tokens" in message for message in found)
    p = Problem()
    shard = p.shard(me, "padded")
    ends = torch.tensor([0, 7, 14 + last, 21])
    rows = [x.reshape(-1) for x in (p.targets, p.old, p.advantages, p.mask)]
    found += [
        error_of(
            rlk.linear_policy_loss,
            p.hidden.reshape(21, -1),
            shard.weight,
            *rows,
            cu_seqlens=ends,
            ratio_level="sequence",
            chunk_tokens=8,
            **shard.options,
        )
    ]
    assert "digest of sequences" in found[-1]
    return alike("".join(found))


@case(
    "a gradient of {what} that is wanted on some ranks alone is refused on every rank",
    what=("hidden", "weight", "bias", "nothing"),
)
def unlike_needs(me, what):
    p, first = Problem(), me.rank == 0
    shard = p.shard(me, "padded")
    leaf, _ = p.arguments(shard)
    operands = {"hidden": leaf, "weight": shard.weight, "bias": shard.bias}
    if what != "nothing" and first:
        operands[what].requires_grad_(False)
    found = []
    for call in (stats_of, policy_of):
        with torch.set_grad_enabled(what != "nothing" or not first):
            found.append(error_of(call, p, shard, hidden=leaf))
        assert "gradient" in found[-1]
    return alike("".join(found))


@case("ranks that call different functions are told which")
def unlike_functions(me):
    p = Problem()
    shard = p.shard(me, "padded")
    message = error_of(policy_of if me.rank else stats_of, p, shard)
    assert re.search("rank 0: called linear_token_stats with .*: called linear_policy_loss with", message), message
    served(me)


@case(
    "upstream gradients that are {what} on one rank are refused in the backward of every rank",
    what=("zero", "smaller", "absent"),
)
def unlike_upstream(me, what):
    p, last = Problem(), me.rank == me.ranks - 1
    shard = p.shard(me, "padded")
    stats, leaf = stats_of(p, shard)
    upstream = p.cotangents[0].clone()
    upstream[0, 1] = 1.0  # it is 0 in the problem
    loss = (stats.logprobs * upstream).sum() + (0.0 if what == "absent" and last else stats.entropy.sum())
    if last and what == "zero":
        upstream[2] = 0.0
        loss = (stats.logprobs * upstream).sum() + stats.entropy[:2].sum()
    if last and what == "smaller":
        loss = loss / me.ranks
    message = error_of(loss.backward)
    said = "rows with an upstream gradient" if what == "zero" else "sum of sizes of upstream gradients"
    assert re.search(f"^linear_token_stats, backward: the ranks of process_group differ. .*{said}", message), message
    served(me)
    return alike(message)


@case("a compiled call compares too")
def compiled_unlike(me):
    p = Problem()
    if me.rank == me.ranks - 1:
        cut(p, 2)
    shard = p.shard(me, "padded")
    call = torch.compile(
        lambda hidden: rlk.linear_token_logprobs(hidden, shard.weight, p.targets, **shard.options),
        fullgraph=True,
        backend="aot_eager",
    )
    message = error_of(call, p.hidden)
    assert "tokens 21" in message and "tokens 14" in message, message
    served(me)
    return alike(message.splitlines()[0])  # behind it torch 2.8 shows the graph, which is each rank's own


@case("unlike upstream gradients of divergences per token are refused in the backward of every rank")
def unlike_upstream_of_divergences(me):
    p = Problem()
    shard = p.shard(me, "padded")
    leaf, options = p.arguments(shard)
    each = rlk.linear_distillation_loss(
        leaf, shard.weight, p.hidden, shard.weight.detach(), p.mask, reduction="none", **options
    )
    message = error_of(each.backward, torch.full_like(each, 2.0 if me.rank else 1.0))
    assert re.search("differ. .*sum of sizes of upstream gradients of divergences", message), message
    served(me)
    return alike(message)


@case("ranks that do not compare sum nothing of the teacher, because on a device that would wait for it")
def no_sum_without_comparison(me):
    p = Problem()
    shard = p.shard(me, "padded")
    leaf, options = p.arguments(shard)
    teacher = p.hidden, shard.weight.detach()
    unread = mock.Mock(side_effect=AssertionError("a host read"))
    silent = mock.Mock(return_value=False)
    with (
        mock.patch.object(chunked_loss, "ranks_compare", silent),
        mock.patch.object(distillation_loss, "sketch", unread),
    ):
        rlk.linear_distillation_loss(leaf, shard.weight, *teacher, p.mask, **options).backward()
    assert silent.called
    served(me)
