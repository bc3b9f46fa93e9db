"""The agreement of a process group: one small collective per call and direction compares what its ranks must share.

Without it a rank that differs, or raises, leaves the others waiting in a collective that it never enters. Where shapes
differ, gloo ends the process. Reading a gathered number waits for the device, so ranks on accelerators compare with
``RLKERNELS_CHECK=1`` alone.
"""

import contextlib
import contextvars
import dataclasses
import datetime
import functools
import inspect
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from rlkernels import checks

SLOTS, NEAR, FACTS = 80, 4, 9
"""A rank sends ``SLOTS`` integers: whether it raised, a digest of names, three of its shard, ``NEAR`` numbers, and from
``FACTS`` on digests.
"""
TEXT = 512  # bytes of what a rank says where it differs
PATIENCE = datetime.timedelta(seconds=5)
"""The time that a rank which raises waits for the others to hear of it. It ends, because they may not have called, and
the rank's own error must be seen.
"""
TOLERANCE = 0.02  # of sums of numbers that may differ in their last bits from rank to rank
# Arguments that may differ from rank to rank: of those of a head the number of rows, of the others everything.
_WEIGHT = {"weight", "bias", "teacher_weight", "teacher_bias", "ref_weight", "ref_bias"}
_OWN = {"process_group", "vocab_start"}
_call = contextvars.ContextVar("the call over a process group that this thread is in", default=None)


def ranks_compare(device):
    """Tells whether ranks with tensors on this device compare what they have in common."""
    return checks.CHECK_VALUES or device.type == "cpu"


def all_gather(mine, group):
    """Returns every rank's ``mine`` ``[...]``, as ``[ranks, ...]``.

    Gathered along the first dimension and viewed, because gloo knows no other one.
    """
    ranks = torch.distributed.get_world_size(group)
    return _gather(mine, group, ranks)[0].view(ranks, *mine.shape)


def _gather(mine, group, ranks, **options):
    everyone = mine.new_empty(ranks * mine.shape[0], *mine.shape[1:])
    # Torch renamed the function: the older name warns from 2.13 on.
    gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    return everyone, gather(everyone, mine, group=group, **options)


Function = TypeVar("Function", bound=Callable[..., Any])


def same_on_every_rank(function: Function) -> Function:
    """Makes a ``linear_*`` function compare its arguments over its ``process_group``.

    What one rank raises, every rank raises.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments, **options):
        group = options.get("process_group")
        if group is None or torch.compiler.is_compiling():
            return function(*arguments, **options)
        check_member(function.__name__, group)
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
        with meeting(
            function.__name__, group, tensors[0].device if tensors else torch.device("cpu"), nested=False
        ) as now:
            if ranks_compare(now.device):
                now.facts = _arguments(signature.bind(*arguments, **options))
            return function(*arguments, **options)

    return call  # type: ignore[return-value]


def check_member(caller, group):
    """Raises TypeError for anything but a process group, and ValueError where this process is not in it."""
    distributed = torch.distributed
    if not isinstance(group, distributed.ProcessGroup) and group is not distributed.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            f"{caller}: process_group must be a torch.distributed.ProcessGroup, such as mesh.get_group(), "
            f"got {type(group).__name__}"
        )
    if distributed.get_rank(group) < 0:
        raise ValueError(f"{caller}: this process is not in process_group, so it has no vocabulary shard")


@contextlib.contextmanager
def meeting(caller, group, device, nested=True):
    """Yields the Meeting of the call that this thread is in, or a new one.

    An error that is raised before the ranks have compared is told to all of them.
    """
    outer = _call.get()
    if nested and outer is not None and outer.group == group:
        yield outer
        return
    now = Meeting(caller, group, device)
    token = _call.set(now)
    try:
        yield now
    except Exception as error:
        if not now.compared:
            now.tell(error)
        raise
    finally:
        _call.reset(token)


class Meeting:
    """One call of a function by all ranks of a group.

    ``facts``: names and values that must be equal on all of them. ``compared``: whether the ranks have compared.
    """

    def __init__(self, caller, group, device):
        self.caller, self.group, self.device, self.facts, self.compared = caller, group, device, [], False

    def tell(self, error):
        """Sends ``error`` in the collective in which the other ranks compare, so that they raise it."""
        if not ranks_compare(self.device):
            return
        with contextlib.suppress(Exception):  # the caller's error counts, whatever becomes of the group
            if torch.distributed.get_rank(self.group) < 0:
                return
            said = f"{type(error).__name__}: {error}".encode()[: 8 * (SLOTS - 1)].ljust(8 * (SLOTS - 1), b"\0")
            mine = torch.tensor([1, *struct.unpack(f"<{SLOTS - 1}q", said)], device=self.device)
            self.told = _gather(mine, self.group, torch.distributed.get_world_size(self.group), async_op=True)
            self.told[1].wait(PATIENCE)

    def compare(self, shard, facts, near):
        """Raises the same error on all ranks where they differ.

        Args:
            shard: its start, columns and vocabulary.
            facts: names and values.
            near: at most two sums: the name of one, its value, and the size that a difference is measured by.
        """
        if not ranks_compare(self.device):
            return
        self.compared = True
        facts = [*facts, *(fact for fact in self.facts if fact[0] not in dict(facts))]
        names = [name for name, _ in facts]
        digests = [_digest(_text(value)) for _, value in facts]
        digests[SLOTS - FACTS - 1 :] = [_digest(str(digests[SLOTS - FACTS - 1 :]))]
        sums = [x for _, *pair in near for x in pair]
        sums = struct.unpack(f"<{NEAR}q", struct.pack(f"<{NEAR}d", *sums, *[0.0] * (NEAR - len(sums))))
        mine = [0, _digest(f"{self.caller}{names}"), *shard, *sums, *digests]
        table = all_gather(torch.tensor(mine + [0] * (SLOTS - len(mine)), device=self.device), self.group).tolist()
        for rank, (raised, *said) in enumerate(table):
            if raised:
                text = struct.pack(f"<{SLOTS - 1}q", *said).rstrip(b"\0").decode(errors="ignore")
                raise RuntimeError(f"{self.caller}: rank {rank} of process_group raised {text}")
        _cover(self.caller, [row[2:5] for row in table])
        if any(row[1] != mine[1] for row in table):
            self._differ(f"called {self.caller} with {', '.join(names)}")
        unlike = [i for i in range(len(digests)) if len({row[FACTS + i] for row in table}) > 1]
        if unlike:
            self._differ(
                "; ".join(
                    (f"{facts[i][0]} {_text(facts[i][1])}") if i < len(facts) else "later arguments" for i in unlike[:3]
                )
            )
        sums = [struct.unpack(f"<{NEAR}d", struct.pack(f"<{NEAR}q", *row[5:FACTS])) for row in table]
        for i in range(0, NEAR, 2):  # also sums that this rank lacks, so that all ranks go on together, or none does
            if not all(_close(row[i : i + 2], sums[0][i : i + 2]) for row in sums):
                self._differ(", ".join(f"sum of {name} {value:.4g}" for name, value, _ in near[i // 2 : i // 2 + 1]))

    def _differ(self, text):
        """Raises RuntimeError with every rank's own ``text``; called by every rank, or by none."""
        mine = torch.tensor(list(text.encode()[:TEXT].ljust(TEXT, b" ")), dtype=torch.uint8, device=self.device)
        texts = [bytes(row).decode(errors="ignore").rstrip() for row in all_gather(mine, self.group).tolist()]
        said = {}
        for rank, one in enumerate(texts):
            said.setdefault(one, []).append(str(rank))
        lines = " | ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}: {one}" for one, ranks in said.items())
        raise RuntimeError(
            f"{self.caller}: the ranks of process_group differ. {lines}. Pass the same on every rank: "
            "all but vocab_start and the rows of weight "
            "and bias"
        )


def _digest(text):
    return zlib.crc32(text.encode())


def _close(one, other):
    (x, size), (y, other_size) = one, other
    return x == y or (math.isnan(x) and math.isnan(y)) or abs(x - y) <= TOLERANCE * max(size, other_size)


def _cover(caller, shards):
    """Raises ValueError unless the shards lie end to end and hold the whole vocabulary.

    No rank would reduce a column in a gap. The order is that of the ranks, because the first maximum is looked for in
    that order.
    """
    ends = 0
    for first, size, vocab in shards:
        if min(first, vocab) != ends:
            raise ValueError(
                f"{caller}: a vocabulary shard starts at {first}, expected {ends}; shards (start, columns, "
                f"vocabulary): {shards}; "
                "pass vocab_start and valid_vocab where they differ in size"
            )
        ends += size
    if len({total for *_, total in shards}) > 1:
        raise ValueError(
            f"{caller}: the vocabulary shards are of vocabularies of different sizes, (start, columns, "
            f"vocabulary): {shards}; "
            "pass the same valid_vocab on every rank"
        )
    if ends < vocab:
        raise ValueError(
            f"{caller}: the vocabulary shards hold {ends} of {vocab} columns; shards (start, columns, "
            f"vocabulary): {shards}"
        )


def _arguments(bound):
    """Returns names and values of a call's arguments; of a tensor its kind, and its value if it is one whole number."""
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name)
    facts = [(name, _kind(x, name in _WEIGHT)) for name, x in sorted(arguments.items()) if name not in _OWN]
    return [*facts, ("gradients", torch.is_grad_enabled())]


def _kind(x, rows_differ):
    """Returns dtype, shape and gradient of a tensor as text; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    text = f"{x.dtype} {list(x.shape[rows_differ:])}{' with a gradient' if x.requires_grad else ''}"
    return f"{text} of {x.item()}" if x.dim() == 0 and not x.dtype.is_floating_point else text


def _text(x):
    """Returns a value as text that every process writes alike.

    An object is named by its type alone, because its repr may hold an address.
    """
    x = vars(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else x
    if isinstance(x, dict):
        return ", ".join(f"{name}: {_text(x[name])}" for name in sorted(x, key=str))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return f"{type(x).__name__}({_text({field.name: getattr(x, field.name) for field in dataclasses.fields(x)})})"
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_text, x))}]"
    if isinstance(x, torch.Tensor):
        return _kind(x, False)
    if inspect.isfunction(x):  # an objective, which another rank may pass by its name
        return x.__name__
    return (
        str(x)
        if x is None or isinstance(x, (bool, int, float, str, torch.dtype)) or hasattr(x, "__array__")
        else type(x).__name__
    )


def pattern(live, targets):
    """Returns a digest of which rows are live and what their targets are; the order counts."""
    x = torch.where(live, targets, -1).to(torch.int64) + 0x9E3779B9 * torch.arange(
        1, live.numel() + 1, device=live.device
    )
    x = x * 0x2545F4914F6CDD1D
    return f"{((x ^ (x >> 29)) * 0x1B873593).sum().item() & 0xFFFFFFFF:08x}"


def sketch(hidden, live):
    """Returns a sum over the live rows in which features and rows have unlike factors, and its size.

    One pass over ``hidden``: 1/V of a matmul.
    """

    def factors(count, dtype):
        # Between -0.7 and 1.3, because with a mean of 0 a constant that one rank adds would cancel.
        x = torch.arange(1, count + 1, device=hidden.device) * 0x9E3779B1
        return (((x ^ (x >> 15)) & 0xFFFF).double() / 32768 - 0.7).to(dtype)

    row_sums = torch.where(live, torch.mv(hidden, factors(hidden.shape[1], hidden.dtype)).double(), 0.0)
    return (row_sums * factors(row_sums.shape[0], row_sums.dtype)).sum().item(), row_sums.square().sum().sqrt().item()
