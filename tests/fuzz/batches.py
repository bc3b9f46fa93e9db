"""Batches of sequences, padded or packed, and the true weights of every aggregation, by hand."""

from collections import Counter

import torch

MODES = (
    "token-mean",
    "global-token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "fixed-horizon",
    "prompt-mean",
    "group-mean",
    "rollout-mean",
    "seq-mean",
)
WITH_A_NUMBER_OF_ROWS = MODES[3:]


class Batch:
    """Tokens ``shape`` (``[B, L]``, or packed ``[T]`` with ``offsets``) in ``count`` sequences.

    ``sequence``: that of each token, flat.

    ``live``: which tokens count, and ``mask``: the argument that says so, None for all.
    """

    def __init__(self, draw, count=None, longest=9):
        self.packed = draw.flag(0.4)
        self.count = draw.choice((0, 1, 2, 3, 5)) if count is None else count
        if self.packed:
            lengths = [draw.choice((0, 1, 2, 3, longest)) for _ in range(self.count)]
            self.length, self.shape = None, (sum(lengths),)
            ends = [sum(lengths[:i]) for i in range(self.count + 1)]
            self.offsets = draw.laid_out(torch.tensor(ends, dtype=draw.choice((torch.int32, torch.int64))), keep=True)
            self.sequence = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64)
        else:
            self.length = draw.choice((0, 1, 2, 3, 5, longest))
            self.shape, self.offsets = (self.count, self.length), None
            self.sequence = torch.tensor([i for i in range(self.count) for _ in range(self.length)], dtype=torch.int64)
        self.live = torch.ones(self.shape, dtype=torch.bool)
        self.mask = None
        if draw.flag(0.8):
            self.live = draw.coins(self.shape, draw.choice((0.0, 0.3, 0.8, 1.0)))
            self.mask = draw.masked(self.live)

    def is_ambiguous(self):
        """As many tokens as sequences, some of them empty: one number each could be either's."""
        return self.packed and self.live.numel() == self.count and len(set(self.sequence.tolist())) < self.count

    def packing(self):
        return {} if self.offsets is None else {"cu_seqlens": self.offsets}

    def sums(self, x):
        """Of each sequence, over its live tokens."""
        x = torch.where(self.live, x, 0.0).flatten()
        return torch.zeros(self.count, dtype=torch.float64).index_add(0, self.sequence, x.double())

    def counts(self):
        return self.sums(torch.ones(self.shape, dtype=torch.float64))

    def means(self, x):
        return self.sums(x) / self.counts().clamp(min=1)

    def spread(self, per_sequence):
        """Each token the value of its sequence."""
        return per_sequence[self.sequence].view(self.shape)


def draw_normalizers(draw, mode, batch):
    """What the mode needs, and some of what it takes."""
    found = {}
    if mode == "global-token-mean" or mode == "token-mean" and draw.flag(0.3):
        found["batch_num_tokens"] = draw.number(draw.choice((0, 3, 10)))
    if mode in WITH_A_NUMBER_OF_ROWS and draw.flag(0.3):
        found["num_sequences"] = draw.number(draw.choice((0, 2, 7)))
    if mode == "fixed-horizon" or mode == "seq-mean-token-sum-norm" and (batch.packed or draw.flag(0.3)):
        found["horizon"] = draw.number(draw.choice((1, 4, 9)))
    if mode in ("prompt-mean", "group-mean", "rollout-mean"):
        some = draw.integers(-(2**62), 2**62, (3,)) if draw.flag(0.5) else torch.tensor([0, 1, 5])
        ids = some[draw.integers(0, 3, (batch.count,))]
        found["rollout_ids" if mode == "rollout-mean" else "group_ids"] = draw.laid_out(ids, keep=True)
        if draw.flag(0.3):
            whole = draw.integers(0, 9, (batch.count,))  # of each row, though rows of a group should agree
            found["group_rows" if mode == "group-mean" else "group_tokens"] = draw.laid_out(whole)
    if draw.flag(0.2):
        found["count_empty_rows"] = True
    if draw.flag(0.2):
        found["dp_size"] = draw.number(draw.choice((1, 2)))
    if draw.flag(0.2):
        found["scale"] = draw.choice((0.5, 2.0))
    return found


def _inverse(x):
    return 1.0 / float(x) if float(x) > 0 else 0.0


def true_weights(mode, batch, normalizers, times=None):
    """The weight of each token in float64, one sequence after another; ``times``: how often each one counts."""
    n = (batch.counts() if times is None else batch.sums(times)).tolist()
    rows, given = batch.count, normalizers.get("num_sequences")
    counted = sum(x > 0 for x in n) if not normalizers.get("count_empty_rows") else rows
    rows, counted = (rows, counted) if given is None else (given, given)
    ids = normalizers.get(
        "group_ids", normalizers.get("rollout_ids", torch.zeros(batch.count, dtype=torch.int64))
    ).tolist()
    tokens, members = Counter(), Counter()
    for i, x in zip(ids, n, strict=True):
        tokens[i] += x
        members[i] += x > 0 or bool(normalizers.get("count_empty_rows"))
    groups = sum(x > 0 for x in members.values()) if given is None else given
    tokens_of = normalizers.get("group_tokens", torch.tensor([tokens[i] for i in ids])).tolist()
    members_of = normalizers.get("group_rows", torch.tensor([members[i] for i in ids])).tolist()
    horizon = normalizers.get("horizon", batch.length)

    def of_a_token(i):
        match mode:
            case "token-mean" | "global-token-mean":
                return _inverse(normalizers.get("batch_num_tokens", sum(n)))
            case "token-sum":
                return 1.0
            case "seq-mean-token-mean" | "seq-mean":
                return _inverse(n[i]) * _inverse(counted)
            case "seq-mean-token-sum":
                return _inverse(counted)
            case "seq-mean-token-sum-norm":
                return _inverse(counted) * _inverse(horizon)
            case "fixed-horizon":
                return _inverse(rows) * _inverse(horizon)
            case "prompt-mean":
                return _inverse(tokens_of[i]) * _inverse(groups)
            case "group-mean":
                return _inverse(n[i]) * _inverse(members_of[i]) * _inverse(groups)
            case "rollout-mean":
                return _inverse(tokens_of[i]) * _inverse(rows)

    factor = float(normalizers.get("dp_size", 1)) * float(normalizers.get("scale", 1.0))
    per_sequence = torch.tensor([of_a_token(i) * factor for i in range(batch.count)], dtype=torch.float64)
    per_token = batch.spread(per_sequence) if times is None else batch.spread(per_sequence) * times
    return torch.where(batch.live, per_token, 0.0)
