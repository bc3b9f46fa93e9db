"""Checks of names: a string argument must be a known one, and an error offers the known name that was meant."""

import difflib
import sys

FIELD = {
    "objective": {
        "ppo": "ppo_clip",
        "vanilla": "ppo_clip",
        "clip": "ppo_clip",
        "ppo2": "ppo_clip",
        "grpo": "ppo_clip with advantages of group_advantages(rewards, group_ids)",
        "dr_grpo": 'ppo_clip with group_advantages(..., scale=None) and aggregation="fixed-horizon"',
        "bnpo": 'ppo_clip with aggregation="token-mean"',
        "dapo": 'ppo_clip with clip_high=0.28 and aggregation="token-mean"',
        "gspo": 'ppo_clip with ratio_level="sequence"',
        "gspo_token": 'ppo_clip with ratio_level="sequence_token"',
        "rloo": 'reinforce with advantages of group_advantages(..., baseline="leave-one-out")',
        "gpg": "reinforce",
        "pg": "reinforce",
        "a2c": "reinforce",
        "reinforce++": "reinforce",
        "geo_mean": "gmpo",
        "a*po": "a2po",
    },
    "aggregation": {
        "mean": "token-mean",
        "token": "token-mean",
        "dapo": "token-mean",
        "bnpo": "token-mean",
        "sum": "token-sum",
        "none": "token-sum",
        "grpo": "seq-mean-token-mean",
        "gspo": "seq-mean-token-mean",
        "sequence": "seq-mean-token-mean",
        "sample": "seq-mean-token-mean",
        "sequence-mean": "seq-mean-token-mean",
        "dr_grpo": "fixed-horizon with normalizers={'horizon': ...}",
        "drgrpo": "fixed-horizon with normalizers={'horizon': ...}",
    },
    "kl": {
        "kl": "k1",
        "mse": "k2",
        "low_var_kl": "k3",
        "full": "reverse_kl of logits_policy_loss, or exact of token_stats",
    },
    "ratio_level": {
        "gspo": "sequence",
        "sentence": "sequence",
        "gspo_token": "sequence_token",
        "trajectory": "sequence_sum",
    },
    "loss_type": {
        "dpo": "sigmoid",
        "kto_pair": "kto of unpaired_preference_loss",
        "kto": "kto of unpaired_preference_loss",
        "bco": "bco_pair, or bco of unpaired_preference_loss",
        "apo_zero": "apo_zero_unpaired",
        "sppo": "sppo_hard",
        "exo": "exo_pair",
        "nca": "nca_pair",
        "wpo": "any with pair_weights",
    },
    "kind": {"ce": "nll", "cross_entropy": "nll", "sft": "nll"},
    "baseline": {
        "grpo": "mean",
        "group": "mean",
        "rloo": "leave-one-out",
        "loo": "leave-one-out",
        "opo": "length-mean",
        "passk": "runner-up",
        "pass@k": "runner-up",
        "batch": "batch-mean",
        "none": "None",
        "dr_grpo": "mean with scale=None",
    },
    "scale": {
        "group": "std",
        "grpo": "std",
        "batch": "batch-std",
        "maxrl": "mean",
        "gpg": "nonzero-share",
        "none": "None",
        "dr_grpo": "None",
    },
    "f_divergence": {"kl": "reverse_kl", "js": "js_divergence", "jsd": "js_divergence", "alpha": "alpha_divergence"},
}
"""For each argument, the names that papers and trainers use, and their names here."""


NAMED = (IndexError, ValueError, TypeError, RuntimeError)
"""The types of errors that get the name of the public function.

Not their subclasses, because these may be made in another way, as ``torch.OutOfMemoryError`` is.
"""


def named(error, inner=None, op=""):
    """Returns the error with the name of the public function in front; a name ``inner`` that stands there is replaced.

    The name comes from the stack, because code that reads values does not know it and only an error needs it. A
    compiled program is on no stack: there the name of the ``op`` stands in front.
    """
    caller, frame, public = "", sys._getframe(1), sys.modules["rlkernels"].__all__
    while frame is not None:
        code = frame.f_code.co_name
        caller = code if code in public and frame.f_globals.get("__name__", "").startswith("rlkernels.") else caller
        frame = frame.f_back
    caller, text = caller or op, str(error).removeprefix(f"{inner}: ")
    return type(error)(text if not caller or text.startswith(f"{caller}: ") else f"{caller}: {text}")


def choice(caller, name, x, known):
    """Refuses an ``x`` that is not one of the ``known`` names (strings, or None)."""
    if (x is None or isinstance(x, str)) and x in known:
        return
    raise ValueError(
        f"{caller}: {name} must be one of {', '.join(map(str, known))}; got {x!r}{_instead(name, x, known)}"
    )


def several(caller, name, entries):
    """Returns a tuple or list as a tuple; anything else is refused."""
    if not isinstance(entries, (tuple, list)):
        raise TypeError(
            f"{caller}: {name} must be a tuple, one entry for each loss of a mixture, got {type(entries).__name__}"
        )
    return tuple(entries)


def known_names(caller, name, names, known):
    """Refuses ``names`` that are not a tuple, list or set of ``known`` names."""
    if isinstance(names, str) or not isinstance(names, (tuple, list, set, frozenset)):
        raise TypeError(
            f"{caller}: {name} must be a tuple of names, got "
            f"{f'the string {names!r}' if isinstance(names, str) else type(names).__name__}"
        )
    for x in names:
        if not isinstance(x, str) or x not in known:
            raise ValueError(f"{caller}: {name}: unknown {x!r}; known: {', '.join(known)}{_instead(name, x, known)}")


def _instead(name, x, known):
    """Returns the end of a message: the known name that was probably meant, or nothing."""
    if not isinstance(x, str):
        name_of_x = getattr(x, "__name__", None)  # functions and classes have one
        return f"; pass its name, {name_of_x!r}" if name_of_x is not None and name_of_x in known else ""
    spelt = x.lower().replace(" ", "_")
    of_the_field = FIELD.get(name, {}).get(spelt)
    if of_the_field is not None and (
        of_the_field == "None" or of_the_field.split(" ")[0].rstrip(",") in known or " of " in of_the_field
    ):
        return f"; did you mean {of_the_field}?"
    names = [entry for entry in known if isinstance(entry, str)]
    near = difflib.get_close_matches(spelt.replace("_", "-"), [entry.replace("_", "-") for entry in names], 1)
    return f"; did you mean {next(entry for entry in names if entry.replace('_', '-') == near[0])}?" if near else ""
