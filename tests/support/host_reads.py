"""A device where there is none: the checks are told whether the host reads values."""

from rlkernels import checks


def answer(monkeypatch, reads):
    """Lets every check believe that the host reads all values (True) or none (False)."""
    # Both, because the checks of losses ask the module of tensors, and all others ask the package.
    for module in (checks, checks.tensors):
        monkeypatch.setattr(module, "host_reads", lambda x: reads)
