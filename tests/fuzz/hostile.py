"""Hostile calls: an exception that names the function, or the answer that the eager backend gives; never a crash.

What may be raised: TypeError, ValueError, IndexError, RuntimeError, NotImplementedError, with a text that begins with
the function's name.
"""

import inspect
import threading

import torch
from reference import same_bits
from torch.autograd import forward_ad

import rlkernels
from fuzz.hostile_values import HIDDEN, HOSTILE, MANY, MASKS, OFTEN, TRAINED, USUAL, good, option
from fuzz.trial import case
from rlkernels.backends import OPS as OF_BACKENDS

FUNCTIONS = [
    name
    for name in rlkernels.__all__
    if inspect.isfunction(getattr(rlkernels, name))
    and name not in ("objective", "check_objective", "available_backends", "status")
]
TENSORS = """
    hidden weight bias logits targets old_logprobs advantages mask ref_logprobs weights cu_seqlens logprobs entropy
    rollout_logprobs vocab_mask ref_logits values old_values returns rewards sample_weights chosen_logps rejected_logps
    ref_chosen_logps ref_rejected_logps chosen_lengths rejected_lengths pair_weights logps ref_logps desirable
    kl_logps ref_kl_logps chosen rejected margin attention_mask group_ids rollout_ids lengths bootstrap_values x
    spans chosen_mask rejected_mask teacher_logits teacher_hidden teacher_weight teacher_bias
    spans chosen_mask rejected_mask tensors
    spans chosen_mask rejected_mask scores turn_ends terminated truncated dones last_dones last_values next_values
    row_advantages is_last_step trajectory_ids step_rewards step_ends episode_rewards anchor_ids token_rewards
    log_sum_sq_probs sequences
""".split()
OPS = tuple(f"{op}: " for op in (*OF_BACKENDS, "offsets", "linear_stats"))
ALLOWED = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)
LIMIT = 30


def arguments(draw, name):
    """Keyword arguments of a call: good ones, then one or two of them made hostile."""
    signature, packed = inspect.signature(getattr(rlkernels, name)), draw.flag(0.4)
    given = {}
    for p in signature.parameters.values():
        seldom = name in MANY and p.kind == p.KEYWORD_ONLY and p.name not in OFTEN
        if p.kind != p.VAR_KEYWORD and (p.default is p.empty or draw.flag(0.12 if seldom else 0.3)):
            given[p.name] = value(draw, name, p.name, packed)
    hidden = HIDDEN.get(name, ())
    given |= {k: value(draw, name, k, packed) for k in hidden if draw.flag(0.24 / len(hidden))}
    if "cu_seqlens" in signature.parameters:
        given.pop("cu_seqlens", None)
        if packed or draw.flag(0.1):
            given["cu_seqlens"] = value(draw, name, "cu_seqlens", packed)
    for k in draw.sample(sorted(given), min(len(given), draw.choice((0, 1, 1, 1, 2)))):
        if isinstance(given[k], torch.Tensor):
            given[k] = _made_hostile(draw, given[k])
    return given


def value(draw, function, name, packed):
    if name in TENSORS or name == "temperature" and draw.flag(0.4):
        return good(draw, function, name, packed)
    return option(draw, function, name) if name not in USUAL or draw.flag(0.5) else USUAL[name]


def _made_hostile(draw, x):
    try:
        return HOSTILE[draw.choice(tuple(HOSTILE))](draw, x)
    except (RuntimeError, TypeError, NotImplementedError):
        return x  # torch has no such thing


def trained(draw, given):
    """Some of the arguments that get gradients, as leaves; with ``inplace_backward`` logits computed from one, or a
    view of it.
    """
    leaves = {}
    for name in TRAINED & set(given):
        x = given[name]
        if type(x) is torch.Tensor and x.is_floating_point() and _plain(x) and not x.requires_grad and draw.flag(0.6):
            leaves[name] = x.detach().requires_grad_()
            given[name] = leaves[name]
    if given.get("inplace_backward") and "logits" in leaves:
        x = leaves["logits"]
        given["logits"] = draw.choice((lambda: x * 1.0, lambda: x * 1.0, lambda: x.view(x.shape), lambda: x[...]))()
    return leaves


def _plain(x):
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.layout == torch.strided
        and x.device.type == "cpu"
        and not (x.is_quantized or x.is_nested or x.is_neg() or x.is_conj() or x.is_complex())
    )


def outcome(function, given, leaves):
    """``(exception, results, gradients, exception of the backward)``."""
    try:
        results = tensors(function(**given))
    except Exception as error:  # its type is judged
        return error, [], [], None
    summed = [x for x in results if x.requires_grad and x.is_floating_point() and x.device.type == "cpu"]
    # A statistic without a gradient refuses to be trained, as its docstring says.
    summed = [x for x in summed if type(x.grad_fn).__name__ != "_RefusalBackward"]
    if not summed or not leaves:
        return None, results, [], None
    try:
        gradients = torch.autograd.grad(
            summed, list(leaves.values()), [torch.ones_like(x) for x in summed], allow_unused=True
        )
    except Exception as error:
        return None, results, [], error
    return (
        None,
        results,
        [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves.values(), strict=True)],
        None,
    )


def tensors(x):
    if isinstance(x, torch.Tensor):
        return [x]
    return [
        t
        for part in (x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ())
        for t in tensors(part)
    ]


def hostile_call(trial):
    """One call, in one of the ways in which a caller may make it."""
    draw, name = trial.draw, trial.name
    given = arguments(draw, name)
    leaves = trained(draw, given)
    trial.calls[name] += 1
    way = draw.choice(("plain",) * 90 + ("thread",) * 5 + ("dual",) * 4 + ("compiled",))
    before = {k: x.detach().clone() for k, x in given.items() if isinstance(x, torch.Tensor) and _plain(x)}
    if way == "dual":
        return _dual_call(trial, given)
    error, results, gradients, late = WAYS[way](getattr(rlkernels, name), given, leaves)
    for k, x in before.items():
        now = leaves.get(k, given[k]).detach()
        if not same_bits(x, now) and (k in leaves or not given.get("inplace_backward")):
            trial.findings.append(f"{k} was changed ({way})")
    if error is not None:
        judge_exception(trial, error, way)
        return
    if late is not None:
        trial.findings.append(f"the backward raised {type(late).__name__}: {_first_line(late)} ({way})")
        return
    with rlkernels.use_backend("eager"):
        eager = outcome(getattr(rlkernels, name), {k: x for k, x in given.items() if k != "inplace_backward"}, leaves)
    if eager[0] is not None and way == "compiled" and isinstance(eager[0], (ValueError, IndexError)):
        return  # a compiled program does not look at values
    if eager[0] is not None and way == "compiled" and "a tensor subclass that keeps its data" in str(eager[0]):
        return  # the compiler takes such a tensor apart and calls us with the plain tensors inside
    if eager[0] is not None:
        trial.findings.append(f"only eager raises {type(eager[0]).__name__}: {_first_line(eager[0])} ({way})")
    elif not given.get("inplace_backward"):
        compare(trial, results + gradients, eager[1] + eager[2], given, way)


def judge_exception(trial, error, way):
    text = str(error)
    # What a compiled program looks at when it runs is refused by the op that does.
    named = trial.name in text or text.startswith(OPS) if way == "compiled" else text.startswith(trial.name)
    if not isinstance(error, ALLOWED):
        trial.findings.append(f"raised {type(error).__name__}: {_first_line(error)} ({way})")
    elif not named:
        trial.findings.append(f"no name in {type(error).__name__}: {_first_line(error)} ({way})")


def compare(trial, got, expected, given, way):
    loose = 1e-3 if given.get("logits_dtype") not in (torch.bfloat16, torch.float16) else 1.0
    for a, b in zip(got, expected, strict=False):
        if a.device.type != "cpu" or not (_plain(a) and _plain(b)):
            continue
        # Where a number is infinite in one place, it may be NaN in the other: inf - inf depends on the order.
        a, b = (x.detach().double().nan_to_num(7.5, 7.5, 7.5).clamp(-1e6, 1e6) for x in (a, b))
        if a.shape != b.shape or not torch.allclose(
            a, b, rtol=loose, atol=loose * (1 + float(b.abs().max()) if b.numel() else 1)
        ):
            trial.findings.append(
                f"differs from eager: {tuple(a.shape)} {a.flatten()[:3].tolist()} for "
                f"{tuple(b.shape)} {b.flatten()[:3].tolist()} ({way})"
            )
            return


def _first_line(error):
    return (str(error).splitlines() or [""])[0][:160]


def _in_a_thread(function, given, leaves):
    found = []
    thread = threading.Thread(target=lambda: found.append(outcome(function, given, leaves)))
    thread.start()
    thread.join(LIMIT)
    return found[0] if found else (TimeoutError("the thread did not end"), [], [], None)


def _compiled(function, given, leaves):
    torch._dynamo.reset()
    return outcome(torch.compile(function, backend="eager"), given, leaves)


WAYS = {"plain": outcome, "thread": _in_a_thread, "compiled": _compiled}


def _dual_call(trial, given):
    """A tangent arrives in the results, or is refused."""
    floats = {
        k: x
        for k, x in given.items()
        if isinstance(x, torch.Tensor) and _plain(x) and x.is_floating_point() and k not in (*MASKS, "desirable")
    }
    names = [k for k, x in floats.items() if x.numel() and not x.requires_grad]
    if not names:
        return
    name = trial.draw.choice(names)
    with forward_ad.dual_level():
        dual = {
            **given,
            name: forward_ad.make_dual(
                given[name].contiguous(), torch.ones(given[name].shape, dtype=given[name].dtype)
            ),
        }
        error, results, _, _ = outcome(getattr(rlkernels, trial.name), dual, {})
        if error is not None:
            judge_exception(trial, error, "dual")
            return
        if any(forward_ad.unpack_dual(x).tangent is not None for x in results if x.is_floating_point()):
            return
    moved = outcome(getattr(rlkernels, trial.name), {**given, name: given[name] + 0.25}, {})[1]
    if not all(
        same_bits(x, forward_ad.unpack_dual(y).primal) for x, y in zip(moved, results, strict=False) if _plain(x)
    ):
        trial.findings.append(f"the tangent of {name} is lost (dual)")


def _named(name):
    def function(trial):
        hostile_call(trial)

    function.__name__ = name
    return function


for _name in FUNCTIONS:
    case("hostile")(_named(_name))
