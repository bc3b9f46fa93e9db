"""Deliberate mistakes in the CUDA kernels, one text replacement each, and the run that shows that the tests find them.

    python tests/cuda_backend/mutants.py [number ...]

Each mutant is built for the CPU and must make the quick tests fail; what survives is printed and is the exit status.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = ("test_cuda_rows.py", "test_cuda_hostile.py", "test_cuda_policy.py", "test_cuda_small.py", "test_cuda_schedules.py")

MUTANTS = (
    ("columns past the end count", "columns.cuh",
     "column + i < columns ? row[column + i] : T(-INFINITY)",
     "column + i < columns ? row[column + i] : T(0.0f)"),
    ("the tail reads one column too many", "columns.cuh", "item[i] = column + i < columns ?", "item[i] = column + i <= columns ?"),
    ("the tail stores one column too many", "columns.cuh",
     "if (column + i < columns) row[column + i] = item[i]",
     "if (column + i <= columns) row[column + i] = item[i]"),
    ("32-bit row offset", "rows.h", "+ ((r / level) * outer + (r % level) * inner)", "+ int((r / level) * outer + (r % level) * inner)"),
    ("the outer stride is ignored", "rows.h", "+ ((r / level) * outer + (r % level) * inner)", "+ (r * inner + (level == 1 ? r * outer : 0))"),
    ("the stride of the targets is ignored", "rows.h", "r * target_stride * target_bytes", "r * target_bytes"),
    ("the mask is the first row's", "rows.h", "+ r * mask_stride : nullptr", ": nullptr"),
    ("the mask is dropped", "token_stats.cuh", "drop_columns(a, kept);", ""),
    ("the mask of the reference is dropped", "token_stats.cuh", "if (kWhat & kReference) drop_columns(b, kept);", ""),
    ("the maximum starts at zero", "sums.cuh", "float top = kNone, sum", "float top = 0, sum"),
    ("the sum is not rescaled", "sums.cuh", "  s.sum *= decay;", ""),
    ("the weighted sum is not rescaled", "sums.cuh", "decay * fmaf(gap, s.sum, s.weighted)", "fmaf(gap, s.sum, s.weighted)"),
    ("the weighted sum forgets the move of the base", "sums.cuh", "decay * fmaf(gap, s.sum, s.weighted)", "decay * s.weighted"),
    ("the squares are rescaled once", "sums.cuh", "s.squares *= decay * decay", "s.squares *= decay"),
    ("the cross sum forgets the reference's base", "sums.cuh", "fmaf(gap - ref_gap, s.sum, s.cross)", "fmaf(gap, s.sum, s.cross)"),
    ("no guard against 0 times -inf", "sums.cuh", "fmaf(e[i], fmaxf(t[i], kFar), even)", "fmaf(e[i], t[i], even)"),
    ("no guard in the cross sum", "sums.cuh", "e[i] == 0 ? 0.0f : e[i] * (t[i] - u)", "e[i] * (t[i] - u)"),
    ("the last maximum wins", "sums.cuh",
     "for (int i = kGroup - 1; i >= 0; --i)\n      if (x[i] == top) at = i;",
     "for (int i = 0; i < kGroup; ++i)\n      if (x[i] == top) at = i;"),
    ("half a warp is folded", "sums.cuh", "for (int o = 16; o; o >>= 1) x +=", "for (int o = 8; o; o >>= 1) x +="),
    ("a row without a finite logit is not NaN", "sums.cuh", "if (s.sum == 0) s.top = -INFINITY, s.sum = NAN;", ""),
    ("no barrier before the records are read", "row.cuh", "    sync();\n    Sums all", "    Sums all"),
    ("a block barrier for a cluster", "row.cuh", "if (CLUSTER > 1) return cooperative_groups::this_cluster().sync();", ""),
    ("records go to one's own block alone", "row.cuh", "float* const there = at_rank(records, to);", "float* const there = records;"),
    ("an ignored row is read", "token_stats.cuh", "if (y == rows.ignore_index) {", "if (false) {"),
    ("a target outside the vocabulary is looked up", "columns.cuh", "if (!rows.holds(y)) return NAN;", ""),
    ("entropy without its constant", "token_stats.cuh", "return logf(s.sum) - kLn2 *", "return -kLn2 *"),
    ("entropy in units of log 2", "token_stats.cuh", "- kLn2 * (s.weighted", "- (s.weighted"),
    ("the reference's sum is the policy's", "token_stats.cuh", "- logf(s.sum) + logf(s.ref_sum)", ""),
    ("the gradient is not divided by the temperature", "gradient.cuh", "k = inverse_temperature / s.sum", "k = 1.0f / s.sum"),
    ("the target's gradient is not divided by the temperature", "gradient.cuh",
     "(1.0f - e / at.sum) * at.inverse_temperature",
     "(1.0f - e / at.sum)"),
    ("p is rounded before it is taken from 1", "gradient.cuh", "(1.0f - e / at.sum)", "(1.0f - as_float(__nv_bfloat16(e / at.sum)))"),
    ("the sign of the entropy's gradient", "gradient.cuh", "to.slope = -up.entropy", "to.slope = up.entropy"),
    ("the divergence itself is left out of its gradient", "gradient.cuh",
     "((logf(s.ref_sum) - log_sum) - s.kl)",
     "(logf(s.ref_sum) - log_sum)"),
    ("masked columns get a gradient", "gradient.cuh", "g[i] = kept >> i & 1 ? g[i] : 0.0f;", ""),
    ("a dead row's gradient is not written", "backward.cuh",
     "return fill_zero(out, from, stop, rows.columns, int(threadIdx.x), BLOCK);",
     "return;"),
    ("the upstream gradient of the first row for all", "backward.cuh", "get(in.dlogp, r)", "get(in.dlogp, 0)"),
    ("a target outside the mask moves its row", "backward.cuh", "if (mask && rows.holds(y) && !mask[y]) up.logp = 0;", ""),
    ("the last slice overruns the row", "backward.cuh", "from + slice < rows.columns ? from + slice : rows.columns", "from + slice"),
    ("the copies are not waited for", "fused_policy.cuh",
     "        __pipeline_wait_prior(kFlight - 1);",
     "        __pipeline_wait_prior(kFlight + 1);"),
    ("the penalty is left out of the gradient", "fused_policy.cuh", "dlogp += kl_weight * term.derivative;", ""),
    ("the entropy bonus has the wrong sign", "fused_policy.cuh", "loss -= double(entropy_weight)", "loss += double(entropy_weight)"),
    ("a row without weight is evaluated", "fused_policy.cuh", "if (weight != 0) {", "{"),
    ("a dead row's gradient is not written in the fused pass", "fused_policy.cuh",
     "  } else if (to) {  // not read, but written",
     "  } else if (false) {"),
    ("every block thinks it is the last", "parts.cuh",
     "*flag = atomicAdd(ticket, 1u) == blocks - 1;",
     "*flag = atomicAdd(ticket, 1u) == 0;"),
    ("parts behind the first 128 are lost", "parts.cuh", "k < n; k += kMore * kAdders", "k < kAdders; k += kMore * kAdders"),
    ("no barrier between the warps and their sum", "elementwise.cuh",
     "  if (t % 32 == 0) warps[t / 32] = sum;\n  __syncthreads();",
     "  if (t % 32 == 0) warps[t / 32] = sum;"),
    ("multiplied by the weight instead of left out", "elementwise.cuh", "if (weight != 0) {", "{"),
    ("the scan reads dead tokens", "scan.cuh", "live[i] = inside && (!job.mask || job.mask[t]);", "live[i] = inside;"),
    ("zero is skip", "scan.cuh", "(inside && job.masked == Masked::zero)", "false"),
    ("the scan forgets the carry of its warp", "scan.cuh", "if (w == warp) state = carry;", ""),
    ("maps are composed the wrong way round", "scan.cuh", "upto = then(before, upto)", "upto = then(upto, before)"),
    ("no barrier before the totals are read", "scan.cuh",
     "    if (lane == 31) set[warp] = upto;\n    __syncthreads();",
     "    if (lane == 31) set[warp] = upto;"),
    ("one set of totals for all chunks", "scan.cuh", "totals + turn * kScanWarps", "totals"),
)


def killed(number, folder):
    """Does the suite fail with that mutant?"""
    name, file, old, new = MUTANTS[number]
    source = HERE.parents[1] / "csrc"
    tree = Path(folder) / str(number)
    shutil.copytree(source, tree)
    target = next(path for path in (tree / "cuda" / file, tree / file) if path.exists())
    text = target.read_text()
    if text.count(old) < 1:
        raise SystemExit(f"mutant {number} ({name}): its text is no longer in {file}; bring the list up to date")
    target.write_text(text.replace(old, new))
    environment = {**os.environ, "RLKERNELS_TEST_CSRC": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", f"cache_dir={tree / 'cache'}", *(str(HERE / test) for test in TESTS)]
    status = subprocess.run(command, env=environment, capture_output=True).returncode
    return status == 1 or status < 0  # a crash is a find too; 2 to 5 are pytest's own troubles


def main(numbers):
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            dead = killed(number, folder)
            print(f"{number:3d} {'killed  ' if dead else 'SURVIVED'} {MUTANTS[number][0]}", flush=True)
            survivors += [] if dead else [number]
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main([int(a) for a in sys.argv[1:]] or range(len(MUTANTS))))
