"""The table of docs/performance.md, from the recorded predictions: ``python -m benchmarks.gpu_model --page``."""

from benchmarks.gpu_model.head import HIDDEN, TOKENS, VOCAB
from benchmarks.gpu_model.predictions import Prediction, table
from benchmarks.gpu_model.rows import SCAN, VOCABULARIES
from benchmarks.gpu_model.rows import TOKENS as ROWS

BACKENDS = ("cuda", "triton")
OVER_ROWS = {
    "token_stats": "`token_stats` with entropy, of 1 read",
    "two_models": "two models with exact KL, of 2 reads",
    "fused_policy": "`fused_policy` with the gradient, of 1 read and 1 write",
    "token_stats_backward": "`token_stats_backward`, of 1 read and 1 write",
}
HEADS = {
    "linear_policy_loss": "`linear_policy_loss`, of 3 products",
    "linear_policy_loss 1 GiB": "... `logits_budget=2**30`",
    "linear_token_stats": "`linear_token_stats`, of 4 products",
    "linear_token_stats 1 GiB": "... `logits_budget=2**30`",
}


def shares(found: list[Prediction]) -> str:
    """The shares at both ends of clock and latency, in bold where a goal is missed."""
    cells = []
    for p in found:
        low, high = (f"{x:.0%}".removesuffix("%") for x in (p.share_of_roof, p.share_at_best or p.share_of_roof))
        text = low if low == high else f"{low}-{high}"
        cells.append(text if p.reached else f"**{text}**")
    return ", ".join(cells)


def markdown() -> str:
    """Two tables: kernels over rows by vocabulary, heads by tokens; percent."""
    known = table()
    lines = [f"| percent, bf16, V {', '.join(map(str, VOCABULARIES))} | CUDA C++ | Triton |", "|---|---|---|"]
    for kernel, name in OVER_ROWS.items():
        cells = [shares([known[kernel, b, "bf16", (ROWS, v)] for v in VOCABULARIES]) for b in BACKENDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [shares([known["gae", b, "fp32", SCAN]]) for b in BACKENDS]
    lines.append(f"| `gae` {list(SCAN)} with a mask, fp32, of 2 reads and 2 writes | {' | '.join(cells)} |")
    lines += ["", f"| percent, bf16, H {HIDDEN}, V {VOCAB}, T {', '.join(map(str, TOKENS))} | CUDA C++ | Triton |"]
    lines.append("|---|---|---|")
    for call, name in HEADS.items():
        cells = [shares([known[call, b, "bf16", (t, HIDDEN, VOCAB)] for t in TOKENS]) for b in BACKENDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
