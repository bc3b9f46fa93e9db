"""The memory that torch hands out while something runs."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run):
    """The most memory above the start that torch's allocator handed out while ``run`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        result = run()
    now = peak = 0
    for event in sorted(
        (e for e in events.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return peak
