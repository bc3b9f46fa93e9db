"""Mistakes in the C++ kernels for the CPU.

Neighbours share a header: what one mutant compiles again, the next would have to restore anyway.
"""

from mutant import Mutant

BACKEND, POLICY = "test_cpu_rows.py", "test_cpu_columns.py"
GUARD = f"{BACKEND}::test_no_kernel_touches_a_byte_behind_its_tensors"
STATS = (
    f"{BACKEND}::test_statistics_and_gradients_keep_the_error_policy",
    f"{BACKEND}::test_a_whole_block_of_minus_infinity_counts_as_absent",
    f"{BACKEND}::test_bits_depend_on_the_row_alone",
    GUARD,
)
DEAD = (f"{BACKEND}::test_what_a_dead_row_holds_reaches_nothing", *STATS)
FUSED = (
    f"{POLICY}::test_the_fused_pass_is_float64_autograd",
    f"{POLICY}::test_the_fused_pass_has_the_bits_of_two_passes",
    f"{POLICY}::test_a_term_of_weight_zero_is_left_out_of_the_fused_pass",
)
SMALL = (
    "test_weighted_loss.py",
    f"{POLICY}::test_elementwise_is_the_oracle_and_its_derivative",
    f"{POLICY}::test_elementwise_sums_in_one_order_and_skips_weight_zero",
    f"{POLICY}::test_gae_is_a_python_loop_padded_and_packed",
)
VALUES, EDGES = "test_logprobs_special_values.py::test_", "test_mutant_edges.py::test_"
GEMM = ("test_cpu_matmul.py",)
MAXIMA = "test_guarantees.py::test_the_divergence_is_right_wherever_the_maxima_lie"
ASKED = {name: GEMM for name in ("gemm.cpp", "gemm_tile.h", "gemm_bf16.cpp", "gemm_f32.cpp")} | {
    "gemm_amx.cpp": ("test_cpu_tiles.py",),
    "fused_policy.cpp": FUSED,
    "elementwise.cpp": SMALL,
    "../column_inputs.h": SMALL,
    "gae.cpp": SMALL,
}


def _m(name, file, old, new, *faults, equivalent="", tests=None):
    return Mutant(name, f"csrc/cpu/{file}", old, new, tests or ASKED.get(file, DEAD), faults, equivalent)


MUTANTS = (
    _m(
        "the tail counts as zeros",
        "blocks.h",
        "for (int64_t c = n; c < kChunk; ++c) set_none(to[c]);",
        "for (int64_t c = n; c < kChunk; ++c) to[c] = T{};",
        1,
    ),
    _m(
        "the tail is read one column too far",
        "blocks.h",
        "for (int64_t c = 0; c < n; ++c) to[c] = x[c];",
        "for (int64_t c = 0; c <= n; ++c) to[c] = x[c];",
        2,
    ),
    _m(
        "the maximum starts at zero",
        "sums.h",
        "float row_max = kNone, ref_row_max",
        "float row_max = 0, ref_row_max",
        4,
    ),
    _m(
        "a new maximum of the reference moves nothing",
        "sums.h",
        "ref_step = double(ref_candidate) - double(ref_row_max);",
        "ref_step = 0;",
        tests=(MAXIMA,),
    ),
    _m(
        "a new maximum of the reference leaves out the row's own",
        "sums.h",
        "      cross_sum[0] += ref_step * peaks;\n",
        "",
        tests=(MAXIMA,),
    ),
    _m("the sum is not rescaled", "sums.h", "        sum_exp *= shrink;\n", "", 5),
    _m(
        "the weighted sum is not rescaled",
        "sums.h",
        "weighted_sum = shrink * (weighted_sum + step * sum_exp)",
        "weighted_sum = weighted_sum + step * sum_exp",
        6,
    ),
    _m("the squares are rescaled once", "sums.h", "square_sum *= shrink * shrink", "square_sum *= shrink"),
    _m(
        "no guard in the cross sum",
        "sums.h",
        "to.cross_sum[2 * k] += e[2 * k] == 0.0f ? Vec{} : a;",
        "to.cross_sum[2 * k] += a;",
        7,
    ),
    _m(
        "the peaks of the block before are forgotten",
        "sums.h",
        "        sum_exp[0] += peaks;  // they are like any other column now\n",
        "",
    ),
    _m(
        "a row without a finite logit is not NaN",
        "sums.h",
        "if (row_max == kNone || out.sum_exp != out.sum_exp)",
        "if (out.sum_exp != out.sum_exp)",
        7,
        tests=(EDGES + "a_row_without_a_finite_logit_has_no_logsumexp",),
    ),
    _m(
        "0 times NaN",
        "backward.cpp",
        "  if (dlogp == 0 && upstream.entropy == 0 && upstream.kl == 0) {",
        "  if (false) {",
        tests=("test_guarantees.py::test_law_2_a_target_outside_of_the_mask_moves_nothing_whatever_the_row_holds",),
    ),
    _m(
        "the last lane is left out of the sum",
        "sums.h",
        "for (int i = 0; i < kLanes; ++i) sum += v[i];",
        "for (int i = 0; i < kLanes - 1; ++i) sum += v[i];",
        30,
    ),
    _m(
        "masked columns keep a NaN gradient",
        "gradient.h",
        "    select(out + c, out + c, X{}, job.mask + c, n);",
        "    (void)n;",
        tests=(VALUES + "special_values_follow_the_table_and_leave_the_neighbours_alone",),
    ),
    _m(
        "no guard in the gradient of the divergence",
        "gradient.h",
        "e == 0.0f ? Vec{} : e * rest",
        "e * rest",
        7,
        tests=(VALUES + "kl_where_one_model_excludes_a_column",),
    ),
    _m(
        "the streamed head is left out",
        "gradient.h",
        "  if (head) gradient_block<kTerms, false>(out, row, ref, head, at);\n",
        "",
        tests=(f"{BACKEND}::test_a_streamed_gradient_has_the_bits_of_a_small_one",),
    ),
    _m("bf16 is cut instead of rounded", "simd.h", "return bits + 0x7fff + ((bits >> 16) & 1);", "return bits;", 9),
    _m(
        "ties of bf16 are rounded up",
        "simd.h",
        "return bits + 0x7fff + ((bits >> 16) & 1);",
        "return bits + 0x8000;",
        tests=(EDGES + "a_gradient_halfway_between_two_numbers_is_rounded_to_the_even_one",),
    ),
    _m(
        "no bound before the exponential", "simd.h", "const { return larger(lowest, d); }", "const { return d; }", 7, 18
    ),
    _m(
        "entropy from lse - E[x]",
        "token_stats.cpp",
        "return std::log(sums.sum_exp) - sums.weighted_sum / sums.sum_exp / temperature;",
        "return float(sums.row_max / temperature + std::log(sums.sum_exp)) - float(sums.row_max / temperature + "
        "sums.weighted_sum / sums.sum_exp / temperature);",
        8,
        tests=(*STATS, "test_logprobs_precision.py::test_a_peaked_row_keeps_its_tiny_entropy"),
    ),
    _m(
        "the log-probability is 1 % too large",
        "token_stats.cpp",
        "return (x - sums.row_max) / batch.temperature_of(r) - std::log(sums.sum_exp);",
        "return 1.01 * ((x - sums.row_max) / batch.temperature_of(r) - std::log(sums.sum_exp));",
        32,
    ),
    _m(
        "the temperature twice",
        "token_stats.cpp",
        "return (x - sums.row_max) / batch.temperature_of(r) -",
        "return (x - sums.row_max) / batch.temperature_of(r) / batch.temperature_of(r) -",
        24,
    ),
    _m(
        "the reference's sum is left out of the divergence",
        "token_stats.cpp",
        "- std::log(p.sum_exp) + std::log(q.sum_exp)",
        "- std::log(p.sum_exp)",
    ),
    _m("the mask is not counted in the mean", "token_stats.cpp", "count += mask[c] != 0;", "count += 1;", 25),
    _m(
        "any maximum is the top one",
        "token_stats.cpp",
        "if (batch.supports(r, c) && batch.value(row, c) == sums.row_max) return false;",
        "(void)c;",
    ),
    _m("a dead row's outputs are not written", "token_stats.cpp", "        put(to, 0);\n", "        (void)to;\n", 16),
    _m(
        "g is ignored",
        "backward.cpp",
        "const Upstream<double> upstream{double(get(in.dlogp)),",
        "const Upstream<double> upstream{1.0,",
        10,
    ),
    _m(
        "a dead row's gradient is not written",
        "backward.cpp",
        "return (void)std::memset(to, 0, size_t(batch.columns * batch.bytes()));",
        "return;",
        16,
    ),
    _m(
        "the target's gradient is not divided by the temperature",
        "backward.cpp",
        "at_target = dlogp * (1 - p) / temperature;",
        "at_target = dlogp * (1 - p);",
        23,
    ),
    _m(
        "p is rounded before it is taken from 1",
        "backward.cpp",
        "at_target = dlogp * (1 - p) / temperature;",
        "{ uint16_t b[2]; float f = float(p); std::memcpy(b, &f, 4); b[0] = 0; std::memcpy(&f, b, 4); "
        "at_target = dlogp * (1 - f) / temperature; }",
        9,
    ),
    _m(
        "the sign of the entropy's gradient",
        "backward.cpp",
        "slope = -upstream.entropy / temperature;",
        "slope = upstream.entropy / temperature;",
    ),
    _m(
        "a target outside the mask moves its row",
        "backward.cpp",
        "const double dlogp = inside ? upstream.logp : 0;",
        "const double dlogp = upstream.logp;",
        tests=("test_cpu_columns.py::test_eager_and_native_agree_where_a_target_is_outside_the_support",),
    ),
    _m(
        "32-bit row offset",
        "../arguments.h",
        "return (r / level) * outer + (r % level) * inner;",
        "return int32_t((r / level) * outer + (r % level) * inner);",
        3,
        tests=("test_logprobs_layouts.py",),
    ),
    _m(
        "the stride of the targets is ignored",
        "arguments.h",
        "at += stride * bytes)",
        "at += bytes)",
        14,
        tests=("test_logprobs_layouts.py",),
    ),
    _m(
        "targets are not checked",
        "arguments.h",
        "if (y != ignore_index && (y < 0 || y >= columns)) return r;",
        "(void)y;",
        15,
        tests=(f"{POLICY}::test_bad_values_are_named",),
    ),
    _m(
        "a tensor passes in any layout",
        "../tensors.h",
        " || !says(x, k.is_contiguous, Py_True)",
        "",
        12,
        tests=("test_gate.py::test_every_tensor_of_every_op_in_another_layout_gives_the_bits_of_its_contiguous_copy",),
    ),
    _m(
        "a tensor passes in any shape",
        "../tensors.h",
        " || !equal(ask(x, k.shape), shape)",
        "",
        tests=(
            "test_gate.py::test_the_quick_half_of_the_gate_lets_pass_what_the_other_half_leaves_as_it_is_and_nothing_else",
        ),
    ),
    _m(
        "a thread of the pool keeps its own mode",
        "mode.h",
        "    if (mode != before) set_float_mode(mode);\n",
        "    (void)mode;\n",
        tests=("test_native_hostile.py::test_flushed_subnormal_numbers_are_flushed_by_every_thread",),
    ),
    _m(
        "the penalty is left out of the gradient",
        "fused_policy.cpp",
        "      dlogp += kl_weight * term.derivative;\n",
        "",
        22,
    ),
    _m("a row without weight is evaluated", "fused_policy.cpp", "    if (weight != 0) {", "    {", 17),
    _m(
        "the entropy bonus has the wrong sign",
        "fused_policy.cpp",
        "loss -= double(entropy_weight)",
        "loss += double(entropy_weight)",
    ),
    _m("multiplied by the weight instead of left out", "elementwise.cpp", "    if (weight != 0) {", "    {", 17),
    _m(
        "the last part is left out",
        "elementwise.cpp",
        "for (const double sum : sums) total += sum;",
        "for (size_t k = 0; k + 1 < sums.size(); ++k) total += sums[k];",
        30,
    ),
    _m(
        "the count of a mean is left out",
        "elementwise.cpp",
        "(of_loss->total ? Real(1.0 / double(*of_loss->total)) : Real(1))",
        "Real(1)",
    ),
    _m("what is taken away is added", "../column_inputs.h", "x -= job.minus[1][i]", "x += job.minus[1][i]"),
    _m(
        "0 times an infinite factor",
        "../column_inputs.h",
        "return own == 0 ? S(0) : own * factor;",
        "return own * factor;",
        17,
    ),
    _m("both slopes have one sign", "elementwise.cpp", "job.opposite[i] = -slope", "job.opposite[i] = slope"),
    _m("the scan reads dead tokens", "gae.cpp", "const bool live = !mask || mask[t];", "const bool live = true;", 31),
    _m("zero is skip", "gae.cpp", "if (live || job.masked == Masked::zero) {", "if (live) {"),
    _m("gamma is left out of the trace", "gae.cpp", "job.gamma * job.lam * trace", "job.lam * trace"),
    _m("a slice forgets the one before", "gemm.cpp", "job.accumulate || k > 0", "job.accumulate"),
    _m(
        "a slice of fp32 has the elements of one of bf16",
        "gemm.cpp",
        "const int64_t slice = kSlice * kernels.elements;",
        "const int64_t slice = 2 * kSlice;",
    ),
    _m("a run forgets the one before", "gemm_tile.h", "    if (begin > 0)\n", "    if (begin < 0)\n"),
    _m(
        "the lanes behind the last column are written",
        "gemm_tile.h",
        "v + 1 < kVectors ? __mmask16(0xffff) : last",
        "__mmask16(0xffff)",
    ),
    _m(
        "the element behind an odd depth counts",
        "gemm_bf16.cpp",
        "rows > 1 ? lanes : 0, rows > 1 ? even + row : even));\n    return _mm512_or_si512(low, _mm512_slli",
        "lanes, rows > 1 ? even + row : even));\n    return _mm512_or_si512(low, _mm512_slli",
    ),
    _m(
        "fp32 is rounded down to bf16",
        "gemm_bf16.cpp",
        "_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd)",
        "bits",
    ),
    _m(
        "fp32 operands are read one beyond",
        "gemm_f32.cpp",
        "_mm512_maskz_loadu_epi32(lanes, from)",
        "_mm512_loadu_epi32(from)",
    ),
    _m(
        "the odd row behind an odd depth counts in a tile",
        "gemm_amx.cpp",
        "_mm256_maskz_loadu_epi16(rows > 1 ? lanes : 0, rows > 1 ? even + row : even);",
        "_mm256_maskz_loadu_epi16(lanes, rows > 1 ? even + row : even);",
    ),
    _m(
        "old words of b stand behind the depth",
        "gemm_amx.cpp",
        "p < whole_words(x.depth); ++p)",
        "p < words_of(x.depth); ++p)",
    ),
    _m("the tiles of a are not transposed", "gemm_amx.cpp", "      transpose(words);\n", ""),
    _m(
        "the second 16 rows of a tile are the first",
        "gemm_amx.cpp",
        "_tile_stream_loadd(5, a + t.a_panel, kLine);",
        "_tile_stream_loadd(5, a, kLine);",
    ),
    _m("a register of sums keeps those of the tile before", "gemm_amx.cpp", "  if (kAcross > 1) _tile_zero(1);\n", ""),
    _m(
        "the tiles are used without a configuration",
        "gemm_amx.cpp",
        "void begin() { _tile_loadconfig(&kConfiguration); }",
        "void begin() {}",
    ),
    _m(
        "a lane behind the last is that of the first row",
        "gemm_amx.cpp",
        "l < x.lanes ? Pairs::along(from + k, x.depth - k) : _mm512_setzero_si512()",
        "Pairs::along(from + k, x.depth - k)",
        equivalent="sums of absent rows are stored nowhere",
    ),
)
