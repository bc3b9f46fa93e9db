"""The conventions of published systems: one name gives the keywords of each of our functions.

A preset is data. ``settings(name, function)`` returns keywords, which a caller may change before the call:

    loss = policy_loss(logprobs, old, advantages, mask, **presets.settings("verl-0.9", policy_loss))

What a system does outside of a loss (whose totals a mean has, over which ranks something is whitened) stands among the
notes of its preset, because the caller holds those numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlkernels import checks
from rlkernels.losses.kl_term import KLTerm


class Preset(NamedTuple):
    """The conventions of one system.

    ``settings``: the name of a function or class, with ``/variant`` behind it where there are several, to keywords.
    ``coefficients``: of whole terms, which the caller adds up. ``source``: papers and versions.
    """

    source: str
    settings: Mapping[str, Mapping[str, Any]]
    coefficients: Mapping[str, float] = {}
    notes: tuple[str, ...] = ()


SAME = {
    "logits_policy_loss": "policy_loss",
    "linear_policy_loss": "policy_loss",
    "linear_dpo_loss": "dpo_loss",
    "linear_unpaired_preference_loss": "unpaired_preference_loss",
    "linear_sft_loss": "sft_loss",
    "logprobs_sft_loss": "sft_loss",
}
"""From a function to the one whose conventions it has."""

PPO = {"objective": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2}
CLAMPED = PPO | {"log_ratio_clamp": 20.0}
SIGMOID = {"loss_type": "sigmoid", "beta": 0.1}
POPULATION = {"unbiased": False, "eps": 1e-8, "eps_mode": "clamp"}
K3_BOUNDED = KLTerm("k3", diff_clamp=20.0, value_clamp=10.0)
EMPTY_ROWS = {"count_empty_rows": True}

PRESETS: dict[str, Preset] = {
    "openrlhf-0.5": Preset(
        "OpenRLHF 0.5.5",
        {
            "policy_loss": PPO | {"aggregation": "seq-mean-token-mean"},
            "value_loss": {"clip_range": 0.2, "aggregation": "seq-mean-token-mean"},
            "assemble_rewards": {"kl": "k1", "kl_coef": 0.01, "score_clip": (-10.0, 10.0), "placement": "last-action"},
            "gae": {"gamma": 1.0, "lam": 0.95, "masked": "zero"},
            "discounted_returns": {"gamma": 1.0, "masked": "zero"},
            "masked_whiten": POPULATION,
            "dpo_loss": SIGMOID,
            "pairwise_reward_loss": {"kind": "logsigmoid"},
            "unpaired_preference_loss": {"loss_type": "kto", "beta": 0.1},
            "WeightAverage": {"decay": 0.992},
        },
        {"ptx_coef": 0.05},
        (
            "A packed batch is averaged over its tokens: aggregation='token-mean'.",
            "Advantages are whitened over the whole buffer and all ranks: process_group=.",
        ),
    ),
    "openrlhf-0.11": Preset(
        "OpenRLHF 0.11.2",
        {
            "policy_loss": CLAMPED | {"aggregation": "token-mean"},
            "policy_loss/gspo": PPO
            | {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean"},  # no clamp there
            "policy_loss/kl": CLAMPED
            | {"aggregation": "token-mean", "kl": KLTerm("k3", diff_clamp=(-10.0, None), value_clamp=10.0)},
            "kl_estimate": {"kind": "k3", "diff_clamp": (-10.0, None), "value_clamp": 10.0},
            "value_loss": {"clip_range": 0.5, "aggregation": "token-mean"},
            "assemble_rewards": {"kl": "k1", "kl_coef": 0.01, "score_clip": (-10.0, 10.0), "placement": "last-action"},
            "gae": {"gamma": 1.0, "lam": 1.0, "masked": "zero"},
            "discounted_returns": {"gamma": 1.0, "masked": "zero"},
            "masked_whiten": POPULATION,
            "group_advantages": {"eps": 1e-9},
            "rollout_weights": {"level": "token", "mode": "clip", "low": 0.5, "high": 5.0},
            "dpo_loss": SIGMOID,
            "pairwise_reward_loss": {"kind": "logsigmoid"},
        },
        {"ptx_coef": 0.05},
        (
            "Corrections are off by default; the settings of rollout_weights are its bounds.",
            "Entropy and KL terms are means over tokens, also beside the loss of 'gspo'.",
        ),
    ),
    "deepspeed-chat": Preset(
        "DeepSpeedExamples 45b4b715",
        {
            "policy_loss": PPO | {"aggregation": "token-mean"},
            "value_loss": {"clip_range": 0.2, "aggregation": "token-mean"},
            "assemble_rewards": {"kl": "k1", "kl_coef": 0.1, "score_clip": (-5.0, 5.0), "placement": "deepspeed-end"},
            "gae": {"gamma": 1.0, "lam": 0.95, "masked": "none"},
            "dpo_loss": SIGMOID,
            "WeightAverage": {"decay": 0.992},
        },
        notes=(
            "The reward model's loss is span_reward_loss; OPT takes num_padding_at_beginning=1.",
            "GAE starts at the last token of the prompt, and nothing is whitened.",
        ),
    ),
    "trl-1.16": Preset(
        "TRL 1.16.0",
        {
            "policy_loss": PPO | {"aggregation": "global-token-mean", "normalizers": EMPTY_ROWS},
            "policy_loss/kl": PPO
            | {"aggregation": "global-token-mean", "normalizers": EMPTY_ROWS, "kl": KLTerm("k3", ratio_weighted=True)},
            "policy_loss/rloo": PPO | {"ratio_level": "sequence_sum", "aggregation": "seq-mean"},
            "policy_loss/gmpo": {"objective": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
            "rollout_weights": {"level": "sequence", "mode": "mask", "high": 3.0},
            "group_advantages": {"eps": 1e-4},
            "dpo_loss": SIGMOID,
            "dpo_loss/cpo": {"loss_type": "cpo", "beta": 0.1, "cpo_alpha": 1.0},
            "dpo_loss/simpo": {"loss_type": "simpo", "beta": 0.1, "simpo_gamma": 0.5},
            "dpo_loss/orpo": {"loss_type": "orpo", "beta": 0.1},
            "unpaired_preference_loss": {"loss_type": "kto", "beta": 0.1},
            "pairwise_reward_loss": {"kind": "logsigmoid", "center_coef": 0.0},
            "sft_loss": {"kind": "nll"},
            "EntropyController": {"target": 0.2, "delta": 0.005, "low": 0.0, "high": 1.0},
        },
        {"rloo_kl_coef": 0.05},
        (
            "global-token-mean takes the tokens of the whole step: normalizers={'batch_num_tokens': ...}.",
            "The label smoothing of 'sigmoid' is ignored there; here it is honoured.",
        ),
    ),
    "trl-ppo-1.12": Preset(
        "TRL 1.12 and older, PPOTrainer",
        {
            "policy_loss": PPO | {"aggregation": "token-mean"},
            "value_loss": {"clip_range": 0.2, "aggregation": "token-mean"},
            "assemble_rewards": {"kl": "k1", "kl_coef": 0.05, "placement": "trl-end"},
            "gae": {"gamma": 1.0, "lam": 0.95, "masked": "none"},
            "masked_whiten": {"unbiased": True, "eps": 1e-8, "eps_mode": "add"},
            "token_logprobs": {"temperature": 0.7 + 1e-7},
        },
        {"vf_coef": 0.1},
        ("The mask of the values has one position more than that of the actions: extended_mask.",),
    ),
    "trl-0.9": Preset(
        "TRL 0.9.6",
        {
            "policy_loss": PPO | {"aggregation": "token-mean"},
            "value_loss": {"clip_range": 0.2, "aggregation": "token-mean"},
            "dpo_loss": SIGMOID,
            "dpo_loss/ipo": {"loss_type": "ipo", "beta": 0.1, "length_normalized": True},
        },
        {"vf_coef": 0.1},
        ("The KL of a token is one of k1, its absolute value, its half square and the exact one.",),
    ),
    "trl-0.1": Preset(
        "TRL of 2023, as in HarderThenHarder/transformers_tasks 5464a2c1",
        {
            "policy_loss": PPO | {"aggregation": "token-mean"},
            "value_loss": {"clip_range": 0.2, "aggregation": "token-mean"},
            "gae": {"gamma": 1.0, "lam": 0.95, "masked": "none"},
            "masked_whiten": {"unbiased": True, "eps": 1e-8, "eps_mode": "add"},
            "assemble_rewards": {"kl": "k1", "kl_coef": 0.2, "placement": "last-action"},
            "KLController": {"coef": 0.2, "kind": "adaptive", "target": 6.0, "horizon": 10000.0},
        },
        {"vf_coef": 0.1},
        ("One sample a step, without padding.",),
    ),
    "verl-0.9": Preset(
        "verl 0.9.1",
        {
            "policy_loss": CLAMPED | {"objective": "dual_clip", "dual_clip": 3.0, "aggregation": "token-mean"},
            "policy_loss/gspo": CLAMPED
            | {"ratio_level": "sequence_token", "log_ratio_clamp": (None, 10.0), "aggregation": "seq-mean-token-mean"},
            "policy_loss/sapo": {
                "objective": "sapo",
                "tau_pos": 1.0,
                "tau_neg": 1.05,
                "aggregation": "seq-mean-token-mean",
            },
            "policy_loss/cispo": {"objective": "cispo", "clip_low": 0.2, "clip_high": 0.2, "log_ratio_clamp": 20.0},
            "policy_loss/dppo": {"objective": "dppo_tv", "delta_low": 0.2, "delta_high": 0.2, "ratio_max": 3.0},
            "kl_estimate": {"kind": "k3", "diff_clamp": 20.0, "value_clamp": 10.0},
            "value_loss": {"clip_range": 0.5, "aggregation": "token-mean"},
            "gae": {"gamma": 1.0, "lam": 1.0, "masked": "skip"},
            "masked_whiten": {"unbiased": True, "eps": 1e-8, "eps_mode": "add"},
            "group_advantages": {"eps": 1e-6},
            "group_advantages/rloo": {"baseline": "leave-one-out", "scale": None},
            "rollout_weights": {"level": "token", "mode": "clip", "high": 2.0},
        },
        notes=(
            "KL in the loss is off; when it is on: kl=KLTerm('k3', diff_clamp=20, value_clamp=10), kl_coef=0.001.",
            "Corrections are off; the settings of rollout_weights are its threshold.",
        ),
    ),
    "skyrl": Preset(
        "SkyRL a956457",
        {
            "policy_loss": PPO
            | {"objective": "dual_clip", "dual_clip": 3.0, "aggregation": "token-mean", "kl": K3_BOUNDED},
            "policy_loss/cispo": {"objective": "cispo", "clip_low": 1.0, "clip_high": 4.0},
            "policy_loss/dppo": {"objective": "dppo_tv_surrogate", "delta_low": 0.2, "delta_high": 0.2},
            "value_loss": {"clip_range": 0.2, "aggregation": "token-mean"},
            "gae": {"masked": "none"},
        },
    ),
    "slime": Preset(
        "slime 624b824",
        {
            "policy_loss": PPO | {"aggregation": "token-mean", "kl": "k1"},
            "value_loss": {"clip_range": 0.2, "aggregation": "token-mean"},
            "rollout_weights": {"level": "token", "mode": "clip", "low": 0.0, "high": 2.0},
            "off_policy_sequence_mask": {"delta": 1e-4},
            "gae": {"gamma": 1.0, "lam": 1.0, "masked": "none"},
        },
        notes=("Corrections and the mask of sequences are off by default; the settings are their bounds.",),
    ),
    "nemo-rl": Preset(
        "NeMo-RL 7ea279a",
        {"policy_loss": PPO | {"aggregation": "token-mean", "kl": K3_BOUNDED, "kl_coef": 0.01}},
        notes=("The mean is over the valid tokens of all ranks: normalizers={'batch_num_tokens': ...}.",),
    ),
    "areal": Preset(
        "AReaL cbff54d",
        {
            "policy_loss": PPO | {"aggregation": "token-mean"},
            "assemble_rewards": {"kl": "k1", "kl_coef": 0.1, "score_clip": (-20.0, 20.0)},
            "gae": {"gamma": 1.0, "lam": 1.0},
        },
        notes=("The mean counts the tokens before rejection: multiply by correction=, and leave the mask alone.",),
    ),
    "prime-rl": Preset(
        "prime-rl 559b447",
        {
            "policy_loss": {
                "objective": "dppo_tv_surrogate",
                "delta_low": 0.2,
                "delta_high": 0.2,
                "ratio_denominator": "rollout",
                "log_ratio_sq_coef": 1e-3,
                "aggregation": "token-sum",
            },
            "policy_loss/ipo": {"objective": "tv_symmetric", "delta": 0.1, "aggregation": "token-sum"},
            "policy_loss/distillation": {"objective": "ref_kl", "delta_low": 0.2, "aggregation": "token-sum"},
        },
    ),
    "open-instruct": Preset(
        "open-instruct e6c3044",
        {
            "policy_loss": PPO
            | {"clip_high": 0.272, "aggregation": "token-mean", "kl": KLTerm("k3", diff_clamp=40.0), "kl_coef": 0.05},
            "policy_loss/cispo": {"objective": "cispo_max_only", "clip_high": 0.272, "aggregation": "token-mean"},
            "rho_correction": {"clamp_high": 2.0},
        },
    ),
    "ms-swift": Preset(
        "ms-swift 3602360",
        {
            "policy_loss": PPO | {"aggregation": "global-token-mean", "normalizers": EMPTY_ROWS, "kl": K3_BOUNDED},
            "policy_loss/fipo": {"objective": "fipo"},
            "policy_loss/real": {"objective": "real", "tau": 0.5},
            "group_advantages": {"eps": 1e-4},
        },
    ),
    "ppo-paper": Preset(
        "Schulman et al. 2017, arXiv:1707.06347",
        {
            "policy_loss": PPO | {"aggregation": "token-mean"},
            "policy_loss/no_clip": {"objective": "surrogate", "aggregation": "token-mean"},
            "policy_loss/kl": {"objective": "surrogate", "aggregation": "token-mean", "kl": "forward_kl"},
            "value_loss": {"clip_range": None, "aggregation": "token-mean", "normalizers": {"scale": 2.0}},
            "gae": {"gamma": 0.99, "lam": 0.95, "masked": "none"},
            "KLController": {"coef": 1.0, "kind": "ppo-paper", "target": 0.01},
        },
        {"vf_coef": 1.0, "entropy_coef": 0.01},
        ("scale 2 undoes the half that every later system has before the squared error.",),
    ),
    "ppo2-baselines": Preset(
        "OpenAI Baselines ea25b9e8",
        {
            "policy_loss": PPO | {"aggregation": "token-mean"},
            "value_loss": {"clip_range": 0.2, "aggregation": "token-mean"},
            "gae": {"gamma": 0.99, "lam": 0.95, "masked": "none"},
            "masked_whiten": {"unbiased": False, "eps": 1e-8, "eps_mode": "add"},
        },
        {"vf_coef": 0.5, "entropy_coef": 0.0},
        ("Advantages are whitened per minibatch; there 1e-8 is added to the spread, here to the variance.",),
    ),
    "dpo-paper": Preset(
        "Rafailov et al. 2023, arXiv:2305.18290; direct-preference-optimization f8b8c0f4",
        {"dpo_loss": SIGMOID, "dpo_loss/tldr": SIGMOID | {"beta": 0.5}},
    ),
    "deepseekmath": Preset(
        "Shao et al. 2024, arXiv:2402.03300",
        {
            "policy_loss": PPO | {"kl": "k3", "kl_coef": 0.04, "aggregation": "seq-mean-token-mean"},
            "group_advantages": {"baseline": "mean", "scale": "std"},
            "step_advantages": {"scale": "std", "unbiased": True, "eps": 0.0},
        },
        notes=("The paper does not say which spread it means: unbiased here.", "64 answers for each prompt."),
    ),
    "dr-grpo": Preset(
        "Liu et al. 2025, arXiv:2503.20783",
        {"policy_loss": PPO | {"aggregation": "fixed-horizon"}, "group_advantages": {"scale": None}},
        notes=("fixed-horizon takes the longest answer: normalizers={'horizon': ...}.",),
    ),
    "dapo": Preset(
        "DAPO 2025, arXiv:2503.14476",
        {
            "policy_loss": PPO | {"clip_high": 0.28, "aggregation": "token-mean"},
            "length_penalty": {"buffer": 4096},
            "dynamic_sampling_mask": {"low": 0.0, "high": 1.0},
        },
    ),
    "gspo": Preset(
        "Zheng et al. 2025, arXiv:2507.18071",
        {
            "policy_loss": PPO
            | {"clip_low": 3e-4, "clip_high": 4e-4, "ratio_level": "sequence", "aggregation": "seq-mean-token-mean"}
        },
    ),
    "cispo": Preset(
        "MiniMax-M1 2025, arXiv:2506.13585",
        {"policy_loss": {"objective": "cispo_absolute", "ratio_max": 5.0, "aggregation": "token-mean"}},
    ),
    "scalerl": Preset(
        "ScaleRL 2025, arXiv:2510.13786",
        {"policy_loss": {"objective": "cispo_absolute", "ratio_max": 5.0, "aggregation": "prompt-mean"}},
        notes=("The head runs in fp32.", "prompt-mean takes the prompts: normalizers={'group_ids': ...}."),
    ),
    "sapo": Preset(
        "SAPO 2025, arXiv:2511.20347",
        {"policy_loss": {"objective": "sapo", "tau_pos": 1.0, "tau_neg": 1.05, "aggregation": "seq-mean-token-mean"}},
    ),
    "reft": Preset(
        "Luong et al. 2024, arXiv:2401.08967; mwp_ReFT bdc844e0",
        {
            "policy_loss": PPO | {"aggregation": "seq-mean-token-mean", "normalizers": EMPTY_ROWS},
            "value_loss": {"clip_range": 0.2, "aggregation": "seq-mean-token-mean", "normalizers": EMPTY_ROWS},
            "assemble_rewards": {"kl": "k1", "kl_coef": 0.01, "placement": "last-action"},
            "gae": {"gamma": 1.0, "lam": 0.95},
            "masked_whiten": {"unbiased": True},
        },
        {"vf_coef": 5.0},
        (
            "Rewards: 1 for the right answer, 0.1 for a wrong number, 0 for none.",
            "kl_coef is 0.05 for answers in words.",
            "Advantages are whitened over all ranks: process_group=.",
        ),
    ),
    "rft": Preset(
        "Yuan et al. 2023, arXiv:2308.01825",
        {"sft_loss": {"kind": "nll"}, "best_of_n": {"count": 1}},
        notes=("sample_weights of 1 and 0 train on the answers that are right.",),
    ),
    "instructgpt": Preset(
        "Ouyang et al. 2022, arXiv:2203.02155",
        {
            "policy_loss": PPO | {"aggregation": "token-mean"},
            "assemble_rewards": {"kl": "k1", "kl_coef": 0.02, "placement": "last-action"},
            "rank_list_loss": {"kind": "logsigmoid", "aggregation": "list-mean"},
        },
        {"ptx_coef": 27.8},
    ),
}
"""Name to preset, in the order of the page that lists them."""


def names() -> tuple[str, ...]:
    """Returns the names of all presets.

    Example:
        >>> "verl-0.9" in names()
        True
    """
    return tuple(PRESETS)


def settings(preset: str, function: str | Callable[..., Any], variant: str | None = None) -> dict[str, Any]:
    """Returns the keywords that make a function follow the conventions of a system.

    Args:
        preset: one of ``names()``.
        function: a public function or class, or its name. The forms over logits and hidden states have the keywords of
            the plain one.
        variant: another loss of the same system, such as ``"gspo"``; ``describe`` lists them.

    Returns:
        A new dict, for ``**``; change what you like.

    Raises:
        ValueError: an unknown preset, a function or a variant that it says nothing of; the message lists what there is.

    Example:
        >>> settings("dapo", "policy_loss")["clip_high"]
        0.28
    """
    caller = "presets.settings"
    checks.choice(caller, "preset", preset, names())
    of_preset = PRESETS[preset].settings
    name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
    key = SAME.get(name, name)
    checks.choice(caller, "function", key, sorted({known.split("/")[0] for known in of_preset}))
    if variant is not None:
        known = [other.split("/")[1] for other in of_preset if other.startswith(f"{key}/")]
        checks.choice(caller, "variant", variant, known)
        key = f"{key}/{variant}"
    checks.choice(caller, "function", key, list(of_preset))
    return {name: dict(x) if isinstance(x, Mapping) else x for name, x in of_preset[key].items()}


def coefficients(preset: str) -> dict[str, float]:
    """Returns the coefficients of whole terms that a system adds up: of the value loss, of pretraining text.

    Raises:
        ValueError: an unknown preset.

    Example:
        >>> coefficients("reft")
        {'vf_coef': 5.0}
    """
    checks.choice("presets.coefficients", "preset", preset, names())
    return dict(PRESETS[preset].coefficients)


def describe(preset: str) -> str:
    """Returns all that a preset holds, as lines of text.

    Raises:
        ValueError: an unknown preset.

    Example:
        >>> print(describe("dpo-paper"))
        dpo-paper: Rafailov et al. 2023, arXiv:2305.18290; direct-preference-optimization f8b8c0f4
          dpo_loss(loss_type='sigmoid', beta=0.1)
          dpo_loss/tldr(loss_type='sigmoid', beta=0.5)
    """
    checks.choice("presets.describe", "preset", preset, names())
    source, of_functions, of_terms, notes = PRESETS[preset]
    lines = [f"{preset}: {source}"]
    lines += [f"  {key}({', '.join(f'{k}={_shown(x)}' for k, x in of_functions[key].items())})" for key in of_functions]
    lines += [f"  {name} = {x}" for name, x in of_terms.items()]
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _shown(x: Any) -> str:
    """Returns a value as one would write it; of a KLTerm only what differs from the defaults."""
    if not isinstance(x, KLTerm):
        return repr(x)
    default = KLTerm()
    given = {name: value for name, value in vars(x).items() if value is not getattr(default, name)}
    given = {"estimator": x.estimator} | given
    return f"KLTerm({', '.join(f'{name}={value!r}' for name, value in given.items())})"
