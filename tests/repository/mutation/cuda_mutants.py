"""Mistakes in the CUDA kernels, which run on the CPU here: see ``tests/backends/cuda_backend/host_build.py``."""

from mutant import Mutant

ROWS = (
    *(f"test_cuda_{name}.py" for name in ("hostile", "policy", "rows")),
    "test_cuda_schedules.py::test_the_order_of_blocks_and_threads_changes_no_bit",
)
LAYOUT = (
    *(
        f"test_cuda_rows.py::test_{name}"
        for name in (
            "every_layout_gives_the_bits_of_contiguous_rows",
            "targets_may_have_any_stride_and_be_int32",
            "masks_a_temperature_per_row_and_a_reference_match_float64",
        )
    ),
    "test_cuda_hostile.py",
    "test_cuda_policy.py",
)
BOUNDS = ("test_cuda_schedules.py::test_no_kernel_reads_or_writes_outside_its_tensors_and_shared_memory",)
POLICY = ("test_cuda_policy.py", ROWS[3])
SMALL = ("test_cuda_small.py",)
ASKED = {
    "gae.cuh": SMALL,
    "elementwise.cuh": SMALL,
    "elementwise.cu": SMALL,
    "../column_inputs.h": SMALL,
    "ordered_sum.cuh": (*SMALL, *POLICY),
    "fused_policy.cuh": POLICY,
    "arguments.h": LAYOUT,
    "../arguments.h": LAYOUT,
}


def _m(name, file, old, new, *faults, equivalent="", tests=None):
    return Mutant(name, f"csrc/cuda/{file}", old, new, tests or ASKED.get(file, ROWS), faults, equivalent)


MUTANTS = (
    _m(
        "columns past the end count",
        "vector_load.cuh",
        "column + i < columns ? row[column + i] : T(-INFINITY)",
        "column + i < columns ? row[column + i] : T(0.0f)",
        1,
    ),
    _m(
        "the tail reads one column too many",
        "vector_load.cuh",
        "item[i] = column + i < columns ?",
        "item[i] = column + i <= columns ?",
        2,
    ),
    _m(
        "the tail stores one column too many",
        "vector_load.cuh",
        "if (column + i < columns) row[column + i] = item[i]",
        "if (column + i <= columns) row[column + i] = item[i]",
        2,
    ),
    _m(
        "32-bit row offset",
        "../arguments.h",
        "return (r / level) * outer + (r % level) * inner;",
        "return int32_t((r / level) * outer + (r % level) * inner);",
        3,
        tests=("test_cuda_rows.py::test_a_row_that_begins_behind_2_to_the_31_elements_has_its_bits",),
    ),
    _m(
        "the outer stride is ignored",
        "../arguments.h",
        "return (r / level) * outer + (r % level) * inner;",
        "return r * inner + (level == 1 ? r * outer : 0);",
        13,
    ),
    _m(
        "the stride of the targets is ignored",
        "arguments.h",
        "r * target_stride * target_bytes",
        "r * target_bytes",
        14,
    ),
    _m("the mask is the first row's", "arguments.h", "+ r * mask_stride : nullptr", ": nullptr"),
    _m("the mask is dropped", "token_stats.cuh", "drop_columns(a, kept);", ""),
    _m(
        "the mask of the reference is dropped",
        "token_stats.cuh",
        "if (kSums & kSumsReference) drop_columns(b, kept);",
        "",
    ),
    _m("the maximum starts at zero", "sums.cuh", "float row_max = kNone, sum_exp", "float row_max = 0, sum_exp", 4),
    _m("the sum is not rescaled", "sums.cuh", "  s.sum_exp *= decay;", "", 5),
    _m(
        "the weighted sum is not rescaled",
        "sums.cuh",
        "decay * fmaf(gap, s.sum_exp, s.weighted_sum)",
        "fmaf(gap, s.sum_exp, s.weighted_sum)",
        6,
    ),
    _m(
        "the weighted sum forgets the move of the base",
        "sums.cuh",
        "decay * fmaf(gap, s.sum_exp, s.weighted_sum)",
        "decay * s.weighted_sum",
    ),
    _m("the squares are rescaled once", "sums.cuh", "s.square_sum *= decay * decay", "s.square_sum *= decay"),
    _m(
        "the cross sum forgets the reference's base",
        "sums.cuh",
        "fmaf(gap - ref_gap, s.sum_exp, s.cross_sum)",
        "fmaf(gap, s.sum_exp, s.cross_sum)",
    ),
    _m("no guard against 0 times -inf", "sums.cuh", "fmaf(e[i], fmaxf(t[i], kFar), even)", "fmaf(e[i], t[i], even)", 7),
    _m("no guard in the cross sum", "sums.cuh", "e[i] == 0 ? 0.0f : e[i] * (t[i] - u)", "e[i] * (t[i] - u)"),
    _m(
        "the last maximum wins",
        "sums.cuh",
        "for (int i = kGroup - 1; i >= 0; --i)\n      if (x[i] == group_max) at = i;",
        "for (int i = 0; i < kGroup; ++i)\n      if (x[i] == group_max) at = i;",
    ),
    _m(
        "half a warp is folded", "sums.cuh", "for (int o = 16; o; o >>= 1) x +=", "for (int o = 8; o; o >>= 1) x +=", 29
    ),
    _m(
        "a row without a finite logit is not NaN",
        "sums.cuh",
        "if (s.sum_exp == 0) s.row_max = -INFINITY, s.sum_exp = NAN;",
        "",
    ),
    _m("no barrier before the records are read", "row_threads.cuh", "    sync();\n    Sums all", "    Sums all", 28),
    _m(
        "a block barrier for a cluster",
        "row_threads.cuh",
        "if (CLUSTER > 1) return cooperative_groups::this_cluster().sync();",
        "",
        28,
    ),
    _m(
        "records go to one's own block alone",
        "row_threads.cuh",
        "float* const there = at_rank(records, to);",
        "float* const there = records;",
    ),
    _m("an ignored row is read", "token_stats.cuh", "if (y == rows.ignore_index) {", "if (false) {"),
    _m("a target outside the vocabulary is looked up", "vector_load.cuh", "if (!rows.holds(y)) return NAN;", "", 15),
    _m("entropy without its constant", "token_stats.cuh", "return logf(s.sum_exp) - kLn2 *", "return -kLn2 *"),
    _m("entropy in units of log 2", "token_stats.cuh", "- kLn2 * (s.weighted_sum", "- (s.weighted_sum"),
    _m("the reference's sum is the policy's", "token_stats.cuh", "- logf(s.sum_exp) + logf(s.ref_sum_exp)", ""),
    _m(
        "the gradient is not divided by the temperature",
        "gradient.cuh",
        "k = inverse_temperature / s.sum_exp",
        "k = 1.0f / s.sum_exp",
        23,
    ),
    _m(
        "the target's gradient is not divided by the temperature",
        "gradient.cuh",
        "(1.0f - e / at.sum_exp) * at.inverse_temperature",
        "(1.0f - e / at.sum_exp)",
    ),
    _m(
        "p is rounded before it is taken from 1",
        "gradient.cuh",
        "(1.0f - e / at.sum_exp)",
        "(1.0f - as_float(__nv_bfloat16(e / at.sum_exp)))",
        9,
    ),
    _m("the sign of the entropy's gradient", "gradient.cuh", "to.slope = -up.entropy", "to.slope = up.entropy"),
    _m(
        "the divergence itself is left out of its gradient",
        "gradient.cuh",
        "((logf(s.ref_sum_exp) - log_sum) - s.kl)",
        "(logf(s.ref_sum_exp) - log_sum)",
    ),
    _m("masked columns get a gradient", "gradient.cuh", "g[i] = kept >> i & 1 ? g[i] : 0.0f;", "(void)kept;"),
    _m(
        "a dead row's gradient is not written",
        "backward.cuh",
        "return fill_zero(out, from, stop, rows.columns, int(threadIdx.x), BLOCK);",
        "return;",
        16,
    ),
    _m("the upstream gradient of the first row for all", "backward.cuh", "get(in.dlogp, r)", "get(in.dlogp, 0)", 11),
    _m(
        "a target outside the mask moves its row",
        "backward.cuh",
        "if (mask && rows.holds(y) && !mask[y]) up.logp = 0;",
        "",
    ),
    _m(
        "the last slice overruns the row",
        "backward.cuh",
        "from + slice < rows.columns ? from + slice : rows.columns",
        "from + slice",
        tests=BOUNDS,
    ),
    _m(
        "the copies are not waited for",
        "fused_policy.cuh",
        "        __pipeline_wait_prior(kFlight - 1);",
        "        __pipeline_wait_prior(kFlight + 1);",
        28,
    ),
    _m("the penalty is left out of the gradient", "fused_policy.cuh", "dlogp += kl_weight * term.derivative;", "", 22),
    _m(
        "the entropy bonus has the wrong sign",
        "fused_policy.cuh",
        "loss -= double(entropy_weight)",
        "loss += double(entropy_weight)",
    ),
    _m("a row without weight is evaluated", "fused_policy.cuh", "if (weight != 0) {", "{"),
    _m(
        "a dead row's gradient is not written in the fused pass",
        "fused_policy.cuh",
        "  } else if (to) {  // not read, but written",
        "  } else if (false) {",
        16,
    ),
    _m(
        "every block thinks it is the last",
        "ordered_sum.cuh",
        "*flag = atomicAdd(ticket, 1u) == blocks - 1;",
        "*flag = atomicAdd(ticket, 1u) == 0;",
    ),
    _m(
        "parts behind the first 1024 are lost",
        "ordered_sum.cuh",
        "k < n; k += kMore * kAdders",
        "k < kAdders; k += kMore * kAdders",
    ),
    _m(
        "no barrier between the warps and their sum",
        "elementwise.cuh",
        "  if (t % 32 == 0) warps[t / 32] = sum;\n  __syncthreads();",
        "  if (t % 32 == 0) warps[t / 32] = sum;",
        28,
    ),
    _m("multiplied by the weight instead of left out", "elementwise.cuh", "if (weight != 0) {", "{", 17),
    _m(
        "the count of a mean is left out",
        "elementwise.cuh",
        "job.total ? S(1.0 / double(*job.total)) * job.share : job.share",
        "job.share",
    ),
    _m("what is taken away is added", "../column_inputs.h", "x -= job.minus[1][i]", "x += job.minus[1][i]"),
    _m(
        "the slope is that of the value",
        "elementwise.cuh",
        "job.of_loss ? weight * term.derivative",
        "false ? weight * term.derivative",
    ),
    _m(
        "0 times an infinite factor",
        "../column_inputs.h",
        "return own == 0 ? S(0) : own * factor;",
        "return own * factor;",
        17,
    ),
    _m(
        "the scan reads dead tokens",
        "gae.cuh",
        "live[i] = inside && (!job.mask || job.mask[t]);",
        "live[i] = inside;",
        31,
    ),
    _m("zero is skip", "gae.cuh", "(inside && job.masked == Masked::zero)", "false"),
    _m("the scan forgets the carry of its warp", "gae.cuh", "if (w == warp) state = carry;", ""),
    _m("maps are composed the wrong way round", "gae.cuh", "upto = then(before, upto)", "upto = then(upto, before)"),
    _m(
        "no barrier before the totals are read",
        "gae.cuh",
        "    if (lane == 31) set[warp] = upto;\n    __syncthreads();",
        "    if (lane == 31) set[warp] = upto;",
        28,
    ),
    _m("one set of totals for all chunks", "gae.cuh", "totals + turn * kScanWarps", "totals"),
    _m(
        "the gradient of the target is 1 % too large",
        "gradient.cuh",
        "at.dlogp * (1.0f - e / at.sum_exp)",
        "1.01f * at.dlogp * (1.0f - e / at.sum_exp)",
        32,
    ),
    _m(
        "the upstream gradient is ignored",
        "backward.cuh",
        "Upstream<float> up{get(in.dlogp, r),",
        "Upstream<float> up{1.0f,",
        10,
    ),
    _m(
        "the temperature twice in the log-probability",
        "token_stats.cuh",
        "(logit - row_max) * inverse_temperature -",
        "(logit - row_max) * inverse_temperature * inverse_temperature -",
        24,
    ),
    _m(
        "the last warp is left out of the sum",
        "row_threads.cuh",
        "read_record<kSums>(records + threadIdx.x % 32, kWarps);",
        "read_record<kSums>(records + (threadIdx.x % 32 == 31 ? 30 : threadIdx.x % 32), kWarps);",
        30,
    ),
    _m("a last part is left out", "ordered_sum.cuh", "k + i * kAdders < n ?", "k + i * kAdders < n - 1 ?", 30),
    _m("the sum over parts forgets a warp", "ordered_sum.cuh", "+ (warps[2] + warps[3])", "+ warps[2]", 30),
    _m(
        "an entropy from a rounded log-sum-exp",
        "token_stats.cuh",
        "return logf(s.sum_exp) - kLn2 * (s.weighted_sum / s.sum_exp);",
        "return (s.row_max + logf(s.sum_exp)) - (s.row_max + kLn2 * (s.weighted_sum / s.sum_exp));",
        8,
    ),
    _m(
        "gamma is left out of the trace",
        "gae.cuh",
        "const double decay = job.gamma * job.lam;",
        "const double decay = job.lam;",
    ),
    _m(
        "a row of 0 weight but an entropy bonus is dead",
        "fused_policy.cuh",
        "(weight != 0 || entropy_weight != 0 || kl_weight != 0)",
        "weight != 0",
    ),
    _m("a gradient that is already made is made again", "backward.cuh", "  if (get(unless, 0) == 1.0f) return;\n", ""),
    _m(
        "a gradient that is not yet made passes for made",
        "backward.cuh",
        "get(unless, 0) == 1.0f",
        "get(unless, 0) != 0.0f",
    ),
    _m(
        "the target's column keeps the gradient of the others",
        "gradient.cuh",
        "if (!mask || mask[y]) row[y] =",
        "if (false) row[y] =",
    ),
    _m("a target outside the mask gets a gradient", "gradient.cuh", "if (!mask || mask[y]) row[y] =", "row[y] ="),
    _m(
        "few blocks take one slice each",
        "backward.cuh",
        "job += gridDim.x)",
        "job += rows.rows * slices)",
        tests=("test_cuda_launches.py",),
    ),
)
