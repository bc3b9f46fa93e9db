"""The ``rlkernels`` command.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``, imported when called.
"""

import argparse
import importlib
import sys

import rlkernels

COMMANDS = {
    "demo": "train three real TRL trainers on the standard library's documentation, stock and with our kernels, and "
    "compare",
    "doctor": "which backend serves what on this machine, and why one is absent",
}


def main(argv: list[str] | None = None) -> int:
    """Runs ``rlkernels <command>`` and returns the exit status: 0 success, 1 the command's own failure, 2 usage, 130
    interrupted. Without a command it prints the help.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="rlkernels", description="The loss layer of reinforcement learning for language models."
    )
    parser.add_argument("--version", action="version", version=f"rlkernels {rlkernels.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    module = None
    for name, sentence in COMMANDS.items():
        command = commands.add_parser(name, help=sentence, description=sentence[0].upper() + sentence[1:] + ".")
        if argv[:1] == [name]:
            module = importlib.import_module(f"rlkernels.cli.{name}")
            module.add_arguments(command)
    args = parser.parse_args(argv)
    if module is None:
        parser.print_help()
        return 0
    return module.run(args)
