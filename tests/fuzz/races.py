"""A thread writes into the ids of a call while the call runs: it raises, or the answer is that of the ids before; it
never crashes.

    python tests/fuzz/races.py SECONDS
"""

import sys
import threading
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS / "support")]

import torch  # noqa: E402
from reference import same_bits  # noqa: E402

import rlkernels as rlk  # noqa: E402

ROWS, VOCAB = 2000, 500
ALLOWED = (IndexError, ValueError, RuntimeError)


class Calls:
    """Functions of one tensor of ids, its right contents, and others that must be refused."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        x, h, w = (torch.randn(*shape, generator=draw) for shape in ((ROWS, VOCAB), (ROWS, 16), (VOCAB, 16)))
        old, advantages, targets = (
            torch.zeros(ROWS),
            torch.randn(ROWS, generator=draw),
            torch.randint(VOCAB, (ROWS,), generator=draw),
        )
        wrong = torch.full_like(targets, 2**40)
        ends = torch.arange(0, ROWS + 1, 10)
        astray = ends.clone()
        astray[1::2] = 10**12
        self.of_targets = {
            "token_logprobs": lambda ids: self._trained(x, lambda leaf: rlk.token_logprobs(leaf, ids).sum()),
            "logits_policy_loss": lambda ids: self._trained(
                x, lambda leaf: rlk.logits_policy_loss(leaf, ids, old, advantages)
            ),
            "sft_loss": lambda ids: self._trained(x, lambda leaf: rlk.sft_loss(leaf, ids)),
            "linear_token_logprobs": lambda ids: self._trained(
                h, lambda leaf: rlk.linear_token_logprobs(leaf, w, ids).sum()
            ),
            "linear_policy_loss": lambda ids: self._trained(
                h, lambda leaf: rlk.linear_policy_loss(leaf, w, ids, old, advantages)
            ),
        }
        self.of_offsets = {
            "gae": lambda ids: list(rlk.gae(old, advantages, cu_seqlens=ids)),
            "sequence_sums": lambda ids: [rlk.sequence_sums(advantages, cu_seqlens=ids)],
            "policy_loss": lambda ids: self._trained(
                old, lambda leaf: rlk.policy_loss(leaf, advantages, advantages, cu_seqlens=ids, ratio_level="sequence")
            ),
            "linear_dpo_loss": lambda ids: self._trained(
                h, lambda leaf: rlk.linear_dpo_loss(leaf, w, targets, cu_seqlens=ids, reference_free=True)
            ),
        }
        self.ids = {
            **dict.fromkeys(self.of_targets, (targets, wrong)),
            **dict.fromkeys(self.of_offsets, (ends, astray)),
        }

    @staticmethod
    def _trained(x, loss):
        leaf = x.detach().clone().requires_grad_()
        value = loss(leaf)
        return [value.detach(), *torch.autograd.grad(value, leaf)]


def main(seconds):
    calls, counts, findings = Calls(), {}, []
    functions = {**calls.of_targets, **calls.of_offsets}
    for name, function in functions.items():
        right, wrong = calls.ids[name]
        ids, stop = right.clone(), threading.Event()
        expected, end = function(right), time.monotonic() + seconds / len(functions)

        # .data: behind autograd's back, as a loader's buffer is filled.
        def write(memory=ids.data, right=right, wrong=wrong, stop=stop):
            while not stop.is_set():
                memory.copy_(wrong)
                memory.copy_(right)

        writer = threading.Thread(target=write)
        writer.start()
        answered = refused = 0
        while time.monotonic() < end:
            try:
                got = function(ids)
            except ALLOWED:
                refused += 1
                continue
            answered += 1
            if not all(map(same_bits, got, expected)):
                findings.append(name)
        stop.set()
        writer.join()
        counts[name] = answered, refused
        print(f"{name}: {answered} answers, {refused} refused", flush=True)
    for name in sorted(set(findings)):
        print(f"{findings.count(name)} times: {name} mixed old ids with new ones")
    print(f"{sum(map(sum, counts.values()))} calls, {len(findings)} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
