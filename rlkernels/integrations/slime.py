"""slime: functions of ``slime.utils.ppo_utils`` under their names, and ``patch`` for all modules that hold them.

Tokens of a micro-batch lie packed, ``[T]``, and ``ppo_kl`` is the negative log-ratio. What stays slime's own:
``compute_opsm_mask``, whose fraction counts masked tokens, the returns of whole sequences, and the vocabulary-parallel
softmax. ``get_advantages_and_returns_batch`` calls the scans here.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.gae import discounted_returns, gae
from rlkernels.integrations._patching import Host, PatchReport, PatchStatus, Plan, Site, home_of, register
from rlkernels.logprobs import token_logprobs, token_stats
from rlkernels.losses.kl_estimate import kl_estimate
from rlkernels.losses.policy import policy_loss
from rlkernels.sequences import sequence_means
from rlkernels.types import Number, PerToken

__all__ = [
    "calculate_log_probs_and_entropy",
    "chunked_discounted_returns",
    "chunked_gae",
    "compute_approx_kl",
    "compute_cispo_loss",
    "compute_gspo_kl",
    "compute_policy_loss",
    "patch",
    "status",
    "unpatch",
    "vanilla_gae",
]

MODULE = "slime.utils.ppo_utils"
DEVICES = ("cpu", "cuda")
KINDS = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
"""slime's types of KL, and ours."""


def compute_approx_kl(
    log_probs: PerToken, log_probs_base: PerToken, kl_loss_type: str, importance_ratio: PerToken | None = None
) -> Tensor:
    r"""Estimates the KL per token: ``k1``, ``k2``, ``k3``, or ``low_var_kl``, which is k3 within 10.

    Args:
        log_probs, log_probs_base: ``[T]``; gradients reach the first one.
        importance_ratio: ``[T]``, a factor before the clamp of ``low_var_kl``.

    Returns:
        ``[T]``, fp32 (fp64 for fp64).

    Raises:
        ValueError: an unknown ``kl_loss_type``. TypeError, ValueError: as ``kl_estimate``.

    Example:
        >>> compute_approx_kl(torch.tensor([-1.0, -9.0]), torch.tensor([-2.0, -1.0]), "low_var_kl")
        tensor([ 0.3679, 10.0000])

    slime 624b824, ``ppo_utils.py``; the ratio as in DeepSeek-V3.2.
    """
    if kl_loss_type not in KINDS:
        raise ValueError(f"compute_approx_kl: kl_loss_type must be one of {', '.join(KINDS)}, got {kl_loss_type!r}")
    kind: Any = KINDS[kl_loss_type]
    bound = 10.0 if kl_loss_type == "low_var_kl" else None
    if importance_ratio is None:
        return kl_estimate(log_probs, log_probs_base, kind, value_clamp=bound)
    kl = importance_ratio * kl_estimate(log_probs, log_probs_base, kind)
    return kl if bound is None else kl.clamp(-bound, bound)


def compute_policy_loss(
    ppo_kl: PerToken, advantages: PerToken, eps_clip: Number, eps_clip_high: Number, eps_clip_c: Number | None = None
) -> tuple[Tensor, Tensor]:
    r"""Computes PPO's clipped loss of each token, with a dual clip where ``eps_clip_c`` is given.

    ``-min(rho A, clip(rho, 1 - eps_clip, 1 + eps_clip_high) A)``, ``rho = exp(-ppo_kl)``; with ``A < 0`` at most
    ``-eps_clip_c A``.

    Args:
        ppo_kl, advantages: ``[T]``; gradients reach the first one.

    Returns:
        ``(losses, clipfrac)``, ``[T]`` each, fp32 (fp64 for fp64): the losses, and 1 where the clipped surrogate is the
        smaller one.

    Raises:
        TypeError, ValueError: as ``policy_loss``; an ``eps_clip_c`` of 1 or less.

    Example:
        >>> compute_policy_loss(torch.tensor([0.0, -1.0]), torch.tensor([2.0, 1.0]), 0.2, 0.2)
        (tensor([-2.0000, -1.2000]), tensor([0., 1.]))

    slime 624b824, ``ppo_utils.py``.
    """
    _same_shape("compute_policy_loss", ppo_kl=ppo_kl, advantages=advantages)
    if eps_clip_c is not None and not isinstance(eps_clip_c, Tensor) and not eps_clip_c > 1:
        raise ValueError(f"compute_policy_loss: eps_clip_c must be greater than 1, got {eps_clip_c}")
    plain = _loss("ppo_clip", -ppo_kl, advantages, eps_clip, eps_clip_high)
    clipped = _clipped(-ppo_kl, advantages, eps_clip, eps_clip_high)
    if eps_clip_c is None:
        return plain, clipped
    return _loss("dual_clip", -ppo_kl, advantages, eps_clip, eps_clip_high, dual_clip=eps_clip_c), clipped


def compute_cispo_loss(
    ppo_kl: PerToken, log_probs: PerToken, advantages: PerToken, eps_clip: Number, eps_clip_high: Number
) -> tuple[Tensor, Tensor]:
    r"""Computes CISPO's loss of each token: ``-sg[clip(rho, 1 - eps_clip, 1 + eps_clip_high)] A log_probs``.

    Args:
        ppo_kl, log_probs, advantages: ``[T]``; gradients reach ``log_probs``. An ``eps_clip`` of 1 or more is no bound.

    Returns:
        ``(losses, clipfrac)``, ``[T]`` each, fp32 (fp64 for fp64): the losses, and 1 where the ratio lies outside of
        the bounds.

    Raises:
        TypeError, ValueError: as ``policy_loss``.

    Example:
        >>> compute_cispo_loss(torch.tensor([0.0, -1.0]), torch.tensor([-1.0, -2.0]), torch.ones(2), 1.0, 0.2)
        (tensor([1.0000, 2.4000]), tensor([0., 1.]))

    slime 624b824, ``ppo_utils.py``; MiniMax-M1 2025, arXiv:2506.13585.
    """
    caller = "compute_cispo_loss"
    _same_shape(caller, ppo_kl=ppo_kl, log_probs=log_probs, advantages=advantages)
    low = eps_clip if isinstance(eps_clip, Tensor) else min(checks.finite(caller, "eps_clip", eps_clip), 1.0)
    gap = -ppo_kl.detach()
    losses = _loss("cispo", log_probs, advantages, low, eps_clip_high, old=log_probs.detach() - gap)
    both = (_clipped(gap, torch.full_like(gap, sign), low, eps_clip_high) for sign in (1.0, -1.0))
    return losses, sum(both, torch.zeros_like(losses.detach()))


def _same_shape(caller: str, **tensors: Tensor) -> None:
    """Refuses what is no tensor, and tensors of several shapes, which the difference of two would broadcast."""
    for name, x in tensors.items():
        checks.tensor(caller, name, x)
        checks.shape(caller, name, x, next(iter(tensors.values())).shape)


def _loss(name: str, logp: Tensor, advantages: Tensor, low: Any, high: Any, old: Any = None, **more: Any) -> Tensor:
    """Computes the loss of each token; without ``old`` the first argument is a log-ratio."""
    old = torch.zeros_like(logp) if old is None else old
    options: dict[str, Any] = {"clip_low": low, "clip_high": high, **more}
    losses = policy_loss(logp, old, advantages.detach(), objective=name, reduction="none", **options)
    assert isinstance(losses, Tensor)
    return losses


def _clipped(gap: Tensor, advantages: Tensor, low: Any, high: Any) -> Tensor:
    """Marks the tokens whose clipped surrogate is the smaller one: there the clip raises the loss."""
    gap = gap.detach()
    free = policy_loss(gap, torch.zeros_like(gap), advantages.detach(), objective="surrogate", reduction="none")
    return (_loss("ppo_clip", gap, advantages, low, high) > free).to(free.dtype)


def compute_gspo_kl(
    full_log_probs: Sequence[Tensor],
    full_old_log_probs: Sequence[Tensor],
    local_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
) -> Tensor:
    r"""Computes the mean of ``log pi_old - log pi`` over each sequence's live tokens, for each of its local tokens.

    Args:
        full_log_probs, full_old_log_probs, loss_masks: lists of ``[L_i]``; gradients reach the first one.
        local_log_probs: a list of ``[l_i]``, of which the lengths are taken: this rank's part of each sequence.

    Returns:
        ``[sum l_i]``, fp32 (fp64 for fp64). A sequence without a live token gives 0.

    Raises:
        TypeError, ValueError: as ``sequence_means``.

    Example:
        >>> now, old = [torch.tensor([-1.0, -2.0, -9.0])], [torch.tensor([-1.5, -3.5, 0.0])]
        >>> compute_gspo_kl(now, old, [torch.zeros(2)], [torch.tensor([1, 1, 0])])
        tensor([-1., -1.])

    slime 624b824, ``ppo_utils.py``.
    """
    ends = [0]
    for x in full_log_probs:
        ends.append(ends[-1] + x.shape[0])
    gap = torch.cat(list(full_old_log_probs)).detach() - torch.cat(list(full_log_probs))
    means = sequence_means(gap, torch.cat(list(loss_masks)), ends)
    return torch.cat([mean.expand(x.shape) for mean, x in zip(means.unbind(), local_log_probs, strict=True)])


def vanilla_gae(rewards: PerToken, values: PerToken, gamma: Number, lambd: Number) -> tuple[PerToken, PerToken]:
    r"""Computes GAE over padded rows, without a mask: slime pads with rewards and values of 0.

    Args:
        rewards, values: ``[B, T]``.
        gamma, lambd: discount and trace decay.

    Returns:
        ``(advantages, returns)``, ``[B, T]`` each, fp32 (fp64 for fp64), neither differentiable.

    Raises:
        TypeError, ValueError: as ``gae``.

    Example:
        >>> vanilla_gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), 1.0, 1.0)
        (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))

    slime 624b824, ``ppo_utils.py``.
    """
    return gae(rewards, values, gamma=gamma, lam=lambd, masked="none")


def chunked_gae(
    rewards: PerToken, values: PerToken, gamma: Number, lambd: Number, chunk_size: int = 128
) -> tuple[PerToken, PerToken]:
    """Computes ``vanilla_gae``; the length of slime's chunks changes no result, and our scan has none.

    Example:
        >>> chunked_gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), 1.0, 1.0)
        (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    return vanilla_gae(rewards, values, gamma, lambd)


def chunked_discounted_returns(rewards: PerToken, discount: Number, chunk_size: int = 128) -> PerToken:
    """Computes the discounted sums of the rewards, ``[B, T]``; ``chunk_size`` as for ``chunked_gae``.

    Example:
        >>> chunked_discounted_returns(torch.tensor([[0.0, 0.0, 2.0]]), 0.5)
        tensor([[0.5000, 1.0000, 2.0000]])
    """
    return discounted_returns(rewards, gamma=discount, masked="none")


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any = None,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    r"""Computes the log-probability of each token and, on request, the entropy of its row.

    Args:
        logits: ``[T, V]``, the whole vocabulary.
        tokens: ``[T]``.
        tp_group: the group of the vocabulary's shards, of one rank.
        with_entropy, with_entropy_grad: whether the entropy is computed, over all of ``V``, and whether it is
            differentiable.
        chunk_size: the rows of slime's chunks; ours read each row by itself, so it changes nothing.
        log_prob_keep_mask: bool ``[T, V]``: the columns of the softmax of the log-probability, beside the token's own.

    Returns:
        ``(log_probs [T, 1], entropy [T] or None)``, fp32 (fp64 for fp64); of no rows, ``[0]`` each.

    Raises:
        ValueError: a ``tp_group`` of more than one rank. TypeError, ValueError, IndexError: as ``token_stats``.

    Example:
        >>> calculate_log_probs_and_entropy(torch.zeros(1, 4), torch.tensor([2]), None, with_entropy=True)
        (tensor([[-1.3863]]), tensor([1.3863]))

    slime 624b824, ``ppo_utils.py``.
    """
    caller = "calculate_log_probs_and_entropy"
    ranks = _ranks(tp_group)
    if ranks != 1:
        raise ValueError(f"{caller}: tp_group has {ranks} ranks, expected 1: each row holds the whole vocabulary")
    entropy = None
    if log_prob_keep_mask is None:
        stats = token_stats(logits, tokens, outputs=("entropy",) if with_entropy else ())
        log_probs, entropy = stats.logprobs, stats.entropy
    else:
        kept = log_prob_keep_mask.scatter(1, tokens.long().unsqueeze(1), True)
        log_probs = token_logprobs(logits, tokens, vocab_mask=kept)
        if with_entropy:
            source = logits if with_entropy_grad else logits.detach()
            entropy = token_stats(source, tokens, outputs=("entropy",)).entropy
    if entropy is not None and not with_entropy_grad:
        entropy = entropy.detach()
    return (log_probs.unsqueeze(-1) if logits.shape[0] else log_probs), entropy


def _ranks(group: Any) -> int:
    """Returns the number of ranks over which slime shares a vocabulary."""
    if group is not None and hasattr(group, "size"):
        return int(group.size())
    distributed = torch.distributed
    return distributed.get_world_size(group) if distributed.is_available() and distributed.is_initialized() else 1


host = register(Host("slime", "slime", title="slime", install="pip install -e . in a checkout of slime"))


def _outside(*tensors: Any, constant: Sequence[Any] = ()) -> str | None:
    """Returns the reason why a call is not ours, of its tensors and of those that ours gives no gradient."""
    for x in tensors:
        if isinstance(x, Tensor) and x.device.type not in DEVICES:
            return f"a tensor is on the device {x.device.type}"
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in constant):
        return "an argument requires a gradient that ours does not give"
    return None


def _outside_of_kl(log_probs: Any, log_probs_base: Any, *args: Any, **kwargs: Any) -> str | None:
    return _outside(log_probs, constant=[log_probs_base])


def _outside_of_policy(ppo_kl: Any, advantages: Any, *args: Any, **kwargs: Any) -> str | None:
    return _outside(ppo_kl, constant=[advantages])


def _outside_of_cispo(ppo_kl: Any, log_probs: Any, advantages: Any, *args: Any, **kwargs: Any) -> str | None:
    return _outside(log_probs, constant=[advantages])


def _outside_of_gspo(full_log_probs: Any, full_old_log_probs: Any, *args: Any, **kwargs: Any) -> str | None:
    return _outside(*full_log_probs, constant=full_old_log_probs)


def _outside_of_scans(rewards: Any, *args: Any, **kwargs: Any) -> str | None:
    tensors = [rewards, *args, *kwargs.values()]
    return _outside(*tensors, constant=tensors)


def _outside_of_logits(logits: Any, tokens: Any, tp_group: Any, *args: Any, **kwargs: Any) -> str | None:
    ranks = _ranks(tp_group)
    return _outside(logits) if ranks == 1 else f"the vocabulary is shared by {ranks} ranks"


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "compute_approx_kl": (compute_approx_kl, _outside_of_kl),
    "compute_policy_loss": (compute_policy_loss, _outside_of_policy),
    "compute_cispo_loss": (compute_cispo_loss, _outside_of_cispo),
    "compute_gspo_kl": (compute_gspo_kl, _outside_of_gspo),
    "vanilla_gae": (vanilla_gae, _outside_of_scans),
    "chunked_gae": (chunked_gae, _outside_of_scans),
    "chunked_discounted_returns": (chunked_discounted_returns, _outside_of_scans),
    "calculate_log_probs_and_entropy": (calculate_log_probs_and_entropy, _outside_of_logits),
}
"""Ours, and the reason why a call is not ours."""


def _plan() -> Sequence[Plan]:
    module, plans = importlib.import_module(MODULE), []
    for name, (ours, outside) in FUNCTIONS.items():
        site = Site.of(module, name)
        original = site.read()
        # slime compiles some of them, and the wrapper of torch.compile belongs to torch.
        if home_of(getattr(original, "_torchdynamo_orig_callable", original)) != MODULE:
            host.require_own(site, MODULE, what="slime's own")
        host.require_signature(site.label, original, (tuple(inspect.signature(ours).parameters),))
        plans.append(Plan(original, host.counted(name, original, ours, outside), (site,)))
    return plans


def patch(strict: bool = True) -> PatchReport:
    """Puts our functions into ``slime.utils.ppo_utils`` and into every module of slime that took them by name.

    Args:
        strict: a call outside our domain raises: a vocabulary that several ranks share, another device, a gradient that
            ours does not give. Otherwise it is handed to the original and counted with the reason.

    Returns:
        One line per attribute that was replaced.

    Raises:
        ImportError: slime is not importable.
        RuntimeError: a signature is unknown, or another library has replaced a function. Nothing is replaced then.
    """
    return host.patch({"ppo_utils": _plan}, strict)


def unpatch() -> None:
    """Restores every attribute to the object that ``patch`` found there. Without a patch it does nothing.

    Raises:
        RuntimeError: another library has since replaced an attribute; undo its patch first. Nothing is restored then.
    """
    host.unpatch()


def status() -> PatchStatus:
    """Returns the attributes that are replaced now, and the calls and delegations counted since."""
    return host.status()
