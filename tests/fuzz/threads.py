"""Eight threads call every public function at once: each result is, bit by bit, that of the same call alone.

python tests/fuzz/threads.py SECONDS
"""

import random
import sys
import threading
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS / "support")]

import public_calls  # noqa: E402
import torch  # noqa: E402
from reference import same_bits  # noqa: E402

THREADS = 8


def large(d):
    """Functions whose gradients come from the memory that is kept between calls, and whose loops run in parallel."""
    import rlkernels as rlk

    draw = torch.Generator().manual_seed(0)
    x, targets = torch.randn(64, 70_000, generator=draw), torch.randint(70_000, (64,), generator=draw)
    old, advantages = torch.randn(64, generator=draw) - 11, torch.randn(64, generator=draw)

    def call(function):
        leaf = x.clone().requires_grad_()
        loss = function(leaf)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]

    return [
        lambda: call(lambda leaf: rlk.token_logprobs(leaf, targets)),
        lambda: call(lambda leaf: rlk.logits_policy_loss(leaf, targets, old, advantages)),
    ]


def main(seconds):
    d = public_calls.data()
    jobs = {name: lambda name=name: public_calls.call(name, d) for name in public_calls.CALLS}
    jobs |= {f"large {k}": job for k, job in enumerate(large(d))}
    alone = {name: job() for name, job in jobs.items()}
    counts, findings, end = [0] * THREADS, [], time.monotonic() + seconds
    sys.setswitchinterval(1e-5)

    def work(k):
        order = random.Random(k)
        while time.monotonic() < end:
            name = order.choice(list(jobs))
            try:
                got = jobs[name]()
            except Exception as error:  # a call that is right alone
                findings.append(f"{name} raised {type(error).__name__}: {error}")
                continue
            counts[k] += 1
            if not all(map(same_bits, got, alone[name])):
                findings.append(f"{name} gave other bits than alone")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text in sorted(set(findings)):
        print(f"{findings.count(text)} times: {text}")
    print(f"{sum(counts)} calls from {THREADS} threads, {len(findings)} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
