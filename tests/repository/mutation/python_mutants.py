"""Mistakes in the Python around the kernels: what is differentiated, weighed, masked and summed."""

from mutant import Mutant

WEIGHTS, SEGMENTS, GROUPS, ADVANTAGES = (
    f"test_{name}.py" for name in ("aggregation", "sequences", "group_advantages", "gae")
)
TRUTH, MASKING, LOSSES, AUTOGRAD = (
    f"test_{name}.py" for name in ("losses_values", "losses_masking", "losses_details", "op_autograd")
)
WEIGHTED, ADDITIVITY = "test_weighted_loss.py", "test_additivity.py"
LAYOUTS, OBJECTIVES = "test_logprobs_layouts.py", "test_objectives.py"
ASKED = {
    "aggregation.py": (WEIGHTS,),
    "sequences.py": (SEGMENTS,),
    "advantages/group.py": (GROUPS,),
    "advantages/gae.py": (ADVANTAGES,),
    "advantages/whitening.py": ("test_whitening.py",),
    "losses/policy.py": (TRUTH, MASKING, LOSSES),
    "losses/logits_policy.py": (TRUTH, MASKING, LOSSES),
    "losses/policy_ratio.py": ("test_ratio_options.py", TRUTH),
    "losses/policy_arguments.py": (LOSSES, MASKING, TRUTH),
    "losses/token_weights.py": (LOSSES, MASKING, TRUTH),
    "losses/value.py": (TRUTH, MASKING, LOSSES),
    **{f"ops/{name}.py": (AUTOGRAD, LAYOUTS, TRUTH) for name in ("rows", "policy", "columns")},
    "objectives/policy.py": (OBJECTIVES, TRUTH),
    "objectives/policy_gates.py": (OBJECTIVES, TRUTH),
    "objectives/kl.py": (OBJECTIVES, TRUTH),
}


def _m(name, file, old, new, *faults, equivalent="", tests=None):
    return Mutant(name, f"rlkernels/{file}", old, new, tests or ASKED[file], faults, equivalent)


MUTANTS = (
    # the gate
    _m(
        "the scan's offsets are not looked at",
        "backends/native.py",
        'cu_seqlens = gate.offsets("gae", cu_seqlens, rewards.shape[0])',
        "pass",
        tests=("test_native_hostile.py::test_the_scan_itself_refuses_offsets_that_point_elsewhere",),
    ),
    # objectives
    _m(
        "the larger side of the surrogate",
        "objectives/policy.py",
        "return -where(held < free, held, free), -where(held < free, 0.0, free)",
        "return -where(free < held, held, free), -where(free < held, 0.0, free)",
        20,
    ),
    _m(
        "the clip bounds are swapped",
        "objectives/policy.py",
        "weight = clip(exp(logp - old_logp), 1.0 - clip_low, 1.0 + clip_high)",
        "weight = clip(exp(logp - old_logp), 1.0 - clip_high, 1.0 + clip_low)",
        19,
    ),
    _m(
        "the sign of the advantage",
        "objectives/policy.py",
        "return -advantage * logp, -advantage",
        "return advantage * logp, advantage",
        21,
    ),
    _m(
        "the slope of sapo forgets the ratio",
        "objectives/policy.py",
        "where(tail <= 0.0, 0.0 * advantage, tail * ratio)",
        "where(tail <= 0.0, 0.0 * advantage, tail)",
    ),
    _m(
        "an overflowing ratio times an advantage of 0",
        "objectives/policy.py",
        "reach = tau * (ratio - 1.0)",
        "reach = tau * (ratio - 1.0) + 0.0 * ratio",
    ),
    _m(
        "k3 with the gradient of k1",
        "objectives/kl.py",
        "return expm1(gap) - gap, -expm1(gap)",
        "return expm1(gap) - gap, 1.0 - 0.0 * gap",
        22,
    ),
    _m("k2 without its half", "objectives/kl.py", "return 0.5 * gap * gap, gap", "return gap * gap, gap"),
    # weights
    _m(
        "a token mean over all tokens",
        "aggregation.py",
        "live.sum(dtype=torch.float64).reciprocal()",
        "torch.ones_like(live).sum(dtype=torch.float64).reciprocal()",
        25,
        tests=(MASKING, LOSSES),
    ),
    _m(
        "a mean of sums for a mean of means",
        "aggregation.py",
        "    return _inverse(rows.tokens) * _inverse(rows.rows())",
        "    return _inverse(rows.rows())",
    ),
    _m(
        "empty rows count",
        "aggregation.py",
        "return (tokens > 0).sum().double()",
        "return (tokens >= 0).sum().double()",
        25,
    ),
    _m("the ranks are not multiplied in", "aggregation.py", "weight(rows) * dp_size * scale", "weight(rows) * scale"),
    _m(
        "a prompt weighs as much as it has rows",
        "aggregation.py",
        "    return _inverse(tokens) * _inverse(number)",
        "    return _inverse(rows.tokens) * _inverse(number)",
    ),
    _m(
        "dead tokens have a weight",
        "aggregation.py",
        "return torch.where(live, weight, 0.0).to(dtype)",
        "return torch.where(live, weight, weight).to(dtype)",
    ),
    _m(
        "0 / 0 where nothing was counted",
        "aggregation.py",
        "return torch.where(x > 0, 1.0 / x.double(), 0.0)",
        "return 1.0 / x.double()",
        tests=("test_mutant_edges.py::test_a_count_of_zero_that_no_host_reads_gives_live_tokens_the_weight_zero",),
    ),
    # segments
    _m(
        "an empty sequence has the mean NaN",
        "sequences.py",
        "token_counts(live, offsets).clamp(min=1.0)",
        "token_counts(live, offsets)",
    ),
    _m(
        "sums multiply by the mask",
        "sequences.py",
        "live_values = torch.where(live, values, 0.0).double()",
        "live_values = (values * live).double()",
        17,
    ),
    _m(
        "dead tokens get their sequence's value",
        "sequences.py",
        "return torch.where(live, wide, 0.0).to(result_dtype(values))",
        "return wide.to(result_dtype(values))",
    ),
    _m(
        "spans are not shifted",
        "sequences.py",
        "torch.arange(1 if shift else 0, length",
        "torch.arange(0, length - 1 if shift else length",
    ),
    _m(
        "a token at a boundary belongs to the sequence before",
        "sequences.py",
        "device=ends.device), right=True)",
        "device=ends.device), right=False)",
    ),
    _m(
        "the last live token is the one behind it",
        "sequences.py",
        "return torch.where(last == 0, length, last) - 1",
        "return torch.where(last == 0, length, last).clamp(max=length - 1)",
    ),
    # groups and advantages
    _m("the deviation of a population", "advantages/group.py", "fewer = 1 if unbiased else 0", "fewer = 0"),
    _m(
        "leave-one-out leaves none out",
        "advantages/group.py",
        '"leave-one-out": lambda: group.gap * group.count / (group.count - 1).clamp(min=1)',
        '"leave-one-out": lambda: group.gap',
    ),
    _m(
        "a group of one has an advantage",
        "advantages/group.py",
        "torch.where(scored & ~alone, centred, 0.0)",
        "torch.where(scored, centred, 0.0)",
    ),
    _m("whitening of a population", "advantages/whitening.py", "fewer=1 if unbiased else 0", "fewer=0"),
    _m(
        "whitening sees dead elements",
        "advantages/whitening.py",
        "offset = torch.where(live, wide - base, 0.0)",
        "offset = (wide - base) * live",
        17,
    ),
    _m(
        "the bootstrap value belongs to every token",
        "advantages/gae.py",
        "return torch.where(count == count_at_end, rewards + gains, rewards)",
        "return rewards + gains",
    ),
    # losses and terms
    _m(
        "the penalty is left out",
        "losses/policy.py",
        "loss = loss + scaled_sum(kl_coef, kl, logp, [ref_logprobs], token_weights)",
        "loss = loss + 0.0",
        22,
    ),
    _m(
        "the entropy bonus has the wrong sign",
        "losses/policy.py",
        'loss = loss + scaled_sum(entropy_coef, "nll"',
        'loss = loss - scaled_sum(entropy_coef, "nll"',
    ),
    _m(
        "a term forgets the share",
        "losses/token_weights.py",
        "replaced(self, scale=product(self.scale, factor))",
        "replaced(self, scale=factor)",
    ),
    _m(
        "a coefficient of the device is left out",
        "losses/weighted_sum.py",
        " * coefficient.to(first.dtype, copy=True)",
        "",
        tests=("test_tensor_coefficients.py",),
    ),
    _m(
        "a dead token's target is looked at",
        "losses/sft.py",
        "flat = flat if everywhere else flat.without(weights == 0)",
        "",
        tests=("test_dead_tokens.py",),
    ),
    _m(
        "a mask may weigh",
        "checks/__init__.py",
        "if x.dtype.is_floating_point and not counts:",
        "if False:",
        tests=("test_refused_values.py",),
    ),
    _m(
        "CISPO's clip has a sign",
        "losses/policy_metrics.py",
        "if name in OF_THE_RATIO:",
        "if False:",
        tests=("test_clip_metrics.py",),
    ),
    _m(
        "an empty answer has odds",
        "losses/preference_types.py",
        "self.options.empty | ",
        "",
        tests=("test_preference_inputs.py",),
    ),
    _m(
        "a sum per sequence is averaged in every part",
        "losses/policy_ratio.py",
        "TokenWeights(sums(weights.values.double(), live, cu_seqlens))",
        "TokenWeights(sums(live / live.sum(-1, keepdim=True).double() / len(live), live, cu_seqlens))",
        tests=(ADDITIVITY,),
    ),
    _m(
        "tokens of a group in another micro-batch are not counted",
        "aggregation.py",
        "if rows.group_tokens is None else rows.group_tokens.reshape(-1).double()",
        "",
        tests=(ADDITIVITY,),
    ),
    _m(
        "an ignored target is live",
        "losses/logits_policy.py",
        "live = scored if mask is None else live_tokens(caller, like, mask) & scored",
        "live = live_tokens(caller, like, mask)",
        25,
    ),
    _m(
        "sums for means in the ratio of a sequence",
        "losses/policy_ratio.py",
        "now = spread(means(now, live, cu_seqlens), live, cu_seqlens)",
        "now = spread(sums(now, live, cu_seqlens), live, cu_seqlens)",
    ),
    _m(
        "log-ratios of sequences in fp32",
        "losses/policy_ratio.py",
        "now, wide = logp.double(), dict(zip(entry.columns[1:], (x.double() for x in columns), strict=True))",
        "now, wide = logp, dict(zip(entry.columns[1:], columns, strict=True))",
        tests=("test_sequence_log_ratios.py",),
    ),
    _m(
        "a clamped log-ratio keeps its gradient",
        "losses/policy_ratio.py",
        "return torch.clamp(gap, self.low, self.high)",
        "return gap + (torch.clamp(gap, self.low, self.high) - gap).detach()",
    ),
    _m("half of the square", "losses/policy_ratio.py", "square = 2 * square if", "square = square if"),
    _m(
        "a gate of total variation without a sign",
        "objectives/policy_gates.py",
        "where(advantage > 0.0, shift - delta_high, -shift - delta_low)\n    weight",
        "where(advantage > 0.0, shift - delta_high, shift - delta_low)\n    weight",
    ),
    _m(
        "one advantage per row goes along the row",
        "sequences.py",
        "return x.reshape(-1, 1).expand(like.shape) if per_row else x",
        "return (x.reshape(-1, 1) if x.dim() == 2 or x.shape[0] != like.shape[1] else x).expand(like.shape) if per_row "
        "else x",
    ),
    _m(
        "given weights live under a dead mask",
        "losses/token_weights.py",
        "tied(torch.where(live, weights.to(real), 0.0), cu_seqlens)",
        "tied(weights.to(real) * 1.0, cu_seqlens)",
    ),
    # ops
    _m(
        "a gradient of stride 0 is read as a dense one",
        "backends/gate.py",
        'move it")\n    return x.contiguous()',
        'move it")\n    return x',
        12,
        tests=("test_logprobs_layouts.py::test_a_gradient_of_stride_zero_is_read_as_it_is_meant",),
    ),
    _m("the bonus ignores what comes from above", "ops/policy.py", "-entropy_weight * dloss", "-entropy_weight", 10),
    _m(
        "every upstream gradient passes for 1",
        "ops/policy.py",
        'return x.device.type == "cpu" and x.item() == 1.0',
        'return x.device.type == "cpu"',
        10,
    ),
    _m(
        "a gradient is given away twice",
        "ops/policy.py",
        "ready, ctx.dlogits = None if torch.is_grad_enabled() else ctx.dlogits, None",
        "ready = None if torch.is_grad_enabled() else ctx.dlogits",
        27,
    ),
    _m(
        "the weighted gradient forgets the weights",
        "ops/columns.py",
        "share = dloss if weight is None else dloss * weight",
        "share = dloss",
        tests=(WEIGHTED,),
    ),
    _m(
        "what is taken away gets the slope of the first",
        "ops/columns.py",
        "opposite = None if inputs[1] is None else gradients[1]",
        "opposite = None if inputs[1] is None else gradients[0]",
        tests=(WEIGHTED,),
    ),
    _m(
        "a second derivative of a weighted loss passes for 0",
        "ops/columns.py",
        "gradients = weighted_loss_backward(dloss, slopes, *inputs)",
        "gradients = weighted_loss_backward(dloss, slopes, slopes, None, None)",
        tests=("test_ops.py",),
    ),
    _m(
        "slopes forget the weights",
        "backends/eager.py",
        "torch.mul(weight, derivative, out=slopes[0])",
        "slopes[0].copy_(derivative)",
        tests=(WEIGHTED,),
    ),
    _m(
        "a mean counts the dead",
        "losses/token_weights.py",
        "TokenWeights(live, live.sum())",
        "TokenWeights(live, live.new_full((), live.numel(), dtype=torch.int64))",
    ),
    _m(
        "logits overwritten by their gradient look untouched",
        "ops/rows.py",
        "    torch.autograd.graph.increment_version(logits)  #",
        "    pass  #",
        27,
    ),
    # the head and the whole way
    _m(
        "the head's gradient is summed in the dtype of the weight",
        "linear/gradients.py",
        "empty(weight.shape, real, weight.device, backend)",
        "empty(weight.shape, weight.dtype, weight.device, backend)",
        26,
        tests=("test_linear_precision.py::test_gradients_of_the_head_do_not_depend_on_the_number_of_chunks",),
    ),
    _m(
        "log-probabilities are 1 % too large, seen by a trainer",
        "linear/token_stats.py",
        "whole[rows.index] = values\n",
        "whole[rows.index] = 1.01 * values if whole.is_floating_point() else values\n",
        32,
        tests=("test_trl_trainers.py::test_a_patched_trainer_has_the_losses_and_gradient_norms_of_the_stock_one",),
    ),
    _m(
        "log-probabilities are 1 % too large",
        "logprobs.py",
        "return shaped(stats.logp, flat.shape)",
        "return shaped(stats.logp * 1.01, flat.shape)",
        32,
        tests=("test_golden.py",),
    ),
)
