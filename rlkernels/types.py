"""The types of public arguments: tensors with their shapes, and the names that an argument takes.

A shape stands beside ``Tensor`` for the reader, because no type checker looks at it. The names are what the checks
accept, too: a table of theirs is made from ``get_args`` of a ``Literal`` here, or is compared with it by a test. An
objective is any ``str``, because users register their own.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias, TypedDict

from torch import Generator, Tensor

Number: TypeAlias = float | Tensor
"""A number, or a tensor of shape ``()``."""
ObjectiveLike: TypeAlias = str | Callable[..., Any]
"""The name of a registered objective, or the function that was registered."""

Logits: TypeAlias = Annotated[Tensor, "[..., V]"]
VocabMask: TypeAlias = Annotated[Tensor, "[V] or [..., V], bool: True keeps a column"]
Targets: TypeAlias = Annotated[Tensor, "[...], int32 or int64"]
Temperature: TypeAlias = float | Annotated[Tensor, "[...], [B], [B, 1] or []"]
HiddenStates: TypeAlias = Annotated[Tensor, "[..., H]"]
HeadWeight: TypeAlias = Annotated[Tensor, "[V, H]"]
HeadBias: TypeAlias = Annotated[Tensor, "[V]"]
RewardHeadWeight: TypeAlias = Annotated[Tensor, "[1, H], or [k, H] for k labels"]
RewardHeadBias: TypeAlias = Annotated[Tensor, "[1], or [k]"]
RewardScores: TypeAlias = Annotated[Tensor, "[B] or [S], or one per token, [...]; with k labels [..., k]"]

PerToken: TypeAlias = Annotated[Tensor, "[B, L], or packed [N]"]
PerSequence: TypeAlias = Annotated[Tensor, "[B], or [S] of a packed batch"]
PerTokenOrSequence: TypeAlias = Annotated[Tensor, "[B, L] or [N]; or [B], [B, 1], [S], [S, 1]"]
Rollout: TypeAlias = Annotated[Tensor, "[T, N], [N, T], or any shape with one dimension of time"]
PerResponse: TypeAlias = Annotated[Tensor, "[N], one per response"]
Rewards: TypeAlias = Annotated[Tensor, "[N], one per response, or [N, K] of K rewards"]
RewardWeights: TypeAlias = Annotated[Tensor, "[K], one per reward"] | list[float] | tuple[float, ...]
PerPair: TypeAlias = Annotated[Tensor, "[B], one per pair"]
OfPairs: TypeAlias = Annotated[Tensor, "[2 B, L], the chosen answers first"]
PerAnswer: TypeAlias = Annotated[Tensor, "[N], one per answer"]
Scalar: TypeAlias = Annotated[Tensor, "[]"]
Mask: TypeAlias = Annotated[Tensor, "live tokens: bool, integers (not 0), or floats that are 0 and 1"]
Offsets: TypeAlias = Annotated[Tensor, "[S + 1], int32 or int64"] | list[int] | tuple[int, ...]
PerTokenTensors: TypeAlias = dict[str, Tensor]
"""Tensors ``[B, L, ...]``, or packed ``[T, ...]``, by name."""
Fill: TypeAlias = dict[str, float]
"""The number at padding, by the name of its tensor."""
PaddingSide: TypeAlias = Literal["right", "left"]
BatchLayout: TypeAlias = Literal["padded", "packed"]
Provenance: TypeAlias = Literal["model", "framework", "environment"]
"""The writer of a message: the model that is trained, the framework of its agent, anyone else."""
TokenIds: TypeAlias = Annotated[Tensor, "[B, L], or packed [N], integers"]
StepLabels: TypeAlias = Annotated[Tensor, "[B, L], or packed [N]: token ids, or soft labels as floats"]
Ranked: TypeAlias = Annotated[Tensor, "[..., K], or [N] with lengths; each list from best to worst"]
ListLengths: TypeAlias = Annotated[Tensor, "[G], integers"] | list[int] | tuple[int, ...]
VocabIds: TypeAlias = Annotated[Tensor, "[K], integers"] | list[int] | tuple[int, ...]
Spans: TypeAlias = Annotated[Tensor, "[..., K, 2], integers"] | list[Any] | tuple[Any, ...]
Metrics: TypeAlias = dict[str, Tensor]
"""Detached tensors of shape ``()`` by their names."""

ObjectiveOption: TypeAlias = Number | Annotated[Tensor, "[B], [B, n], or [B, L]"] | Generator | bool | None
"""A parameter or a further column of an objective, or an option of one of sequences, groups or batches."""
CorrectionMode: TypeAlias = Literal["clip", "mask", None]
RatioLevel: TypeAlias = Literal["token", "sequence", "sequence_token", "sequence_sum"]
KL: TypeAlias = Literal["k1", "k2", "k3", "abs"]
ExactKL: TypeAlias = Literal["reverse_kl", "forward_kl"]
"""``KL(pi || ref)`` and ``KL(ref || pi)`` over the whole vocabulary."""
KLGradient: TypeAlias = Literal["pathwise", "k2"]
KLRatioLevel: TypeAlias = Literal["token", "loss"]
Clamp: TypeAlias = float | tuple[float | None, float | None] | list[float | None] | None
"""Bounds ``(low, high)``, of which either may be None; a number ``c`` stands for ``(-c, c)``."""
RatioDenominator: TypeAlias = Literal["old", "rollout"]
LogRatioClamp: TypeAlias = float | tuple[float | None, float | None] | list[float | None] | None
"""A bound on both sides of 0, or a pair of which None is no bound."""
RowKL: TypeAlias = Literal["k1", "k2", "k3", "exact"]
"""The KL of ``token_stats``, which sees whole rows."""
Output: TypeAlias = Literal["entropy", "log_sum_sq_probs", "mean_logits", "is_top1"]
Outputs: TypeAlias = tuple[Output, ...] | list[Output] | set[Output] | frozenset[Output]
Aggregation: TypeAlias = Literal[
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
    "fixed-horizon",
    "global-token-mean",
    "prompt-mean",
    "rollout-mean",
    "seq-mean",
    "group-mean",
]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
PairsReduction: TypeAlias = Literal["mean", "none"]
PolicyReduction: TypeAlias = Literal["aggregation", "none"]
PairwiseKind: TypeAlias = Literal["logsigmoid", "logexp"]
ScorePositions: TypeAlias = Literal["end", "all"]
RankKind: TypeAlias = Literal["logsigmoid", "sigmoid"]
RankAggregation: TypeAlias = Literal["pair-mean", "list-mean"]
StepReduction: TypeAlias = Literal["min", "product"]
SftKind: TypeAlias = Literal["nll", "dft"]
DivergenceKind: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd", "cross_entropy"]
TeacherTopk: TypeAlias = tuple[
    Annotated[Tensor, "[..., K], int32 or int64, distinct ids"], Annotated[Tensor, "[..., K], their log-probabilities"]
]
"""The likeliest tokens of a teacher; a log-probability of -inf marks an entry that is not used."""
LinearSftKind: TypeAlias = Literal["nll", "dft", "asft"]
LogitsSftKind: TypeAlias = Literal["nll", "dft", "eaft", "asft"]
"""The kinds of ``sft_loss``, which sees whole rows."""
LossType: TypeAlias = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "ipo_norm",
    "dpop",
    "rpo",
    "cpo",
    "cpo_hinge",
    "cpo_ipo",
    "simpo",
    "orpo",
    "orpo_odds_ratio",
    "tpo",
    "tpo_hinge",
    "tpo_ipo",
    "tpo_l",
]
LossTypes: TypeAlias = (
    LossType | Callable[..., Any] | tuple[LossType | Callable[..., Any], ...] | list[LossType | Callable[..., Any]]
)
"""One loss of pairs, or those of a mixture; a function is an objective of a user's own.

Its name serves at run time, too. Here it would hide a wrong name from a type checker.
"""
LossWeights: TypeAlias = tuple[Number, ...] | list[float] | list[Number]
FDivergence: TypeAlias = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
UnpairedLossType: TypeAlias = Literal["kto", "apo_zero_unpaired", "bco", "kto_paired_batch"]
Masked: TypeAlias = Literal["skip", "zero", "none"]
"""The step of a dead token between live ones, in GAE."""
ReturnsMasked: TypeAlias = Literal["skip", "zero", "none", "reset"]
"""The same in discounted returns, which may start again behind it."""
Baseline: TypeAlias = Literal["mean", "leave-one-out", "length-mean", "batch-mean", "runner-up", None]
Scale: TypeAlias = Literal["std", "batch-std", "mean", "nonzero-share", None]
StepScale: TypeAlias = Literal["std", None]
"""The scale of the advantages of steps."""
Singleton: TypeAlias = Literal["zero", "raw", "scaled"]
"""The advantage of the only response of a group."""
Alignment: TypeAlias = Literal["position", "live"]
"""The tokens of a group that are compared with each other: of one column, or those of one number among the live."""
Placement: TypeAlias = Literal["last-action", "trl-end", "deepspeed-end", "token-level"]
"""The position of a response's score among the rewards of its tokens."""
DonesAt: TypeAlias = Literal["end", "start"]
"""The side of a step at which an episode ends."""
KLControl: TypeAlias = Literal["fixed", "adaptive", "ppo-paper"]
EpsMode: TypeAlias = Literal["add", "clamp"]
Dimensions: TypeAlias = int | tuple[int, ...] | list[int] | None
"""Dimensions of a tensor; None stands for all."""
RolloutLevel: TypeAlias = Literal["token", "sequence", "sequence_mean"]
RolloutMode: TypeAlias = Literal["clip", "mask"]
RolloutGate: TypeAlias = Literal["ratio", "kl", "tv"]
RhoGate: TypeAlias = Literal["ratio", "tv"]
RejectionRule: TypeAlias = Literal[
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
]
RejectionRules: TypeAlias = dict[RejectionRule, float | tuple[float, float]]
"""The bound of each rule by its name; a pair for k1 alone."""
Backend: TypeAlias = Literal["eager", "cpu", "triton", "cuda"]
TrlLevel: TypeAlias = Literal["all", "fused", "logits", "pairs"]


class Normalizers(TypedDict, total=False):
    """The keywords of ``token_weights`` that a loss hands on."""

    batch_num_tokens: Number
    num_sequences: Number
    horizon: Number
    group_ids: Tensor
    rollout_ids: Tensor
    group_tokens: Tensor
    group_rows: Tensor
    count_empty_rows: bool
    dp_size: Number
    scale: Number


class Availability(TypedDict):
    """The answer of ``available_backends``."""

    serves: dict[str, dict[str, str]]
    absent: dict[str, str]
