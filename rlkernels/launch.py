"""The command ``python -m rlkernels.launch MODULE``: a trainer's own program with the patch on, Ray's workers included.

    python -m rlkernels.launch openrlhf.cli.train_ppo_ray --actor.model_name_or_path ...
    python -m rlkernels.launch --patch openrlhf,trl my_recipe.train --config recipe.yaml

``MODULE`` runs as ``python -m MODULE`` does: as ``__main__``, with its own ``sys.argv`` and exit code. A host is
patched when the program has imported it, so that a process that does not need it does not load it. Each process that
patches says so in one line per host on stderr, and at its end how often our kernels were called.

Children that the program starts by other means than Ray, such as ``multiprocessing`` with ``spawn``, are new
interpreters and not patched; ``RLKERNELS_PATCH`` patches one that imports ``rlkernels``.
"""

import argparse
import atexit
import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from rlkernels.integrations._after_import import after_import
from rlkernels.integrations._patching import status
from rlkernels.integrations._ray import hook_workers

TRIGGERS = {"openrlhf": "openrlhf.models", "trl": "trl", "verl": "verl", "deepspeed_chat": "dschat", "slime": "slime"}
"""The module of each host whose import is the moment to patch it."""
NAME = "rlkernels.launch"

_seen: set[str] = set()
"""The hosts that this process waits for, or has patched."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; ``arguments`` stand for ``sys.argv[1:]``.

    Raises:
        SystemExit: 2 for a wrong command line, 1 where the module cannot be found, and what the module itself exits
            with.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    names = _hosts(parser, options.patch)
    reason = _missing(options.module)
    if reason is not None:
        print(f"{NAME}: {reason}", file=sys.stderr)
        raise SystemExit(1)
    patch_when_imported(names)
    hook_workers(names, "rlkernels.launch:set_up_worker")
    sys.argv = [options.module, *options.arguments]
    # The first entry becomes the file of the module, as in ``python -m``.
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}",
        description="Runs MODULE as python -m MODULE does, with rlkernels patched into the trainers that it imports, "
        "and into those that the workers of Ray import.",
        epilog="Every argument behind MODULE is the module's own.",
    )
    parser.add_argument(
        "--patch",
        default="openrlhf",
        metavar="HOST[,HOST]",
        help=f"the trainers to patch, among {', '.join(TRIGGERS)} (default: openrlhf)",
    )
    parser.add_argument("module", metavar="MODULE", help="the module to run, such as openrlhf.cli.train_ppo_ray")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the arguments of MODULE")
    return parser


def _hosts(parser: argparse.ArgumentParser, text: str) -> list[str]:
    """Returns the names of ``--patch``; an unknown one is an error of the command line."""
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    unknown = [name for name in names if name not in TRIGGERS]
    if unknown or not names:
        parser.error(f"argument --patch: {text!r} names {unknown or 'no trainer'}; known are {', '.join(TRIGGERS)}")
    return list(dict.fromkeys(names))


def _missing(module: str) -> str | None:
    """Returns why ``python -m MODULE`` could not start, or None."""
    if module.endswith(".py") or os.sep in module:
        return f"{module!r} is a file; pass the name of a module, such as 'package.train'"
    names = [".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 2)]
    for name in names:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError as error:
            if error.name not in names:
                raise
            spec = None
        if spec is None:
            return f"no module named {name!r}" + (f" (of {module!r})" if name != module else "")
    if spec is not None and spec.submodule_search_locations is not None:
        if importlib.util.find_spec(f"{module}.__main__") is None:
            return f"no module named {module}.__main__; {module!r} is a package and cannot be run"
    return None


def patch_when_imported(names: Sequence[str], where: str = "") -> None:
    """Patches each host as soon as this process has imported it, and reports that on stderr.

    Args:
        names: hosts among ``TRIGGERS``.
        where: words for this process, which stand behind its number.
    """
    for name in names:
        if name not in _seen:
            _seen.add(name)
            after_import(TRIGGERS[name], lambda name=name: _patch(name, where))  # type: ignore[misc]
    atexit.register(_report_calls, tuple(names), where)


def set_up_worker(names: Sequence[str]) -> None:
    """Prepares a worker process of Ray; the setup hook calls it before the worker's first task."""
    patch_when_imported(names, " (Ray worker)")


def _say(text: str, where: str) -> None:
    print(f"{NAME}: process {os.getpid()}{where}: {text}", file=sys.stderr, flush=True)


def _patch(name: str, where: str) -> None:
    """Patches a host and reports it: one line, and in the first process one per attribute."""
    report = importlib.import_module(f"rlkernels.integrations.{name}").patch()
    _say(f"{report.host} patched, {len(report.replaced)} attributes", where)
    if not where:
        for line in (*report.replaced, *report.skipped):
            print(f"{NAME}:   {line}", file=sys.stderr, flush=True)


def _report_calls(names: tuple[str, ...], where: str) -> None:
    """Says at the end of a process how often our kernels were called, or that nothing of a host was imported."""
    states = status()
    for name in names:
        state = states.get(name)
        if state is None or not state.replaced:
            if not where:  # a worker need not import every host
                _say(f"{name} was not imported here; nothing was patched", where)
            continue
        calls, delegated = sum(state.calls.values()), sum(state.delegations.values())
        _say(f"{state.host}: {calls} calls served, {delegated} handed to the original", where)


if __name__ == "__main__":
    # By its own name, because a worker of Ray imports the module by that name, and the trainer becomes ``__main__``.
    importlib.import_module(NAME).main()
