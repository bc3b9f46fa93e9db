"""A plugin of pytest, ``-p verl_under_ours``: verl's names are ours before a test imports them, and calls are counted.

The policy losses, which ``patch`` never replaces, are put under verl's names here, for verl's tests alone.
"""

import collections

from verl.trainer.ppo import core_algos

from rlkernels.integrations import verl
from rlkernels.integrations.verl.bypass import compute_policy_loss_bypass_mode
from rlkernels.integrations.verl.policy_losses import POLICY_LOSSES

LOSSES = {**POLICY_LOSSES, "bypass_mode": compute_policy_loss_bypass_mode}
calls: collections.Counter[str] = collections.Counter()


def counted(name, function):
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call


def pytest_configure(config):
    verl.patch()
    for name, function in LOSSES.items():
        ours = counted(function.__name__, function)
        setattr(core_algos, function.__name__, ours)
        if name in core_algos.POLICY_LOSS_REGISTRY:
            core_algos.POLICY_LOSS_REGISTRY[name] = ours


def pytest_terminal_summary(terminalreporter):
    status = verl.status()
    terminalreporter.write_line(f"calls of ours: {dict(sorted({**status.calls, **calls}.items()))}")
    terminalreporter.write_line(f"calls handed over: {status.delegations}")
