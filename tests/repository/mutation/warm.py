"""A process that has imported torch once and forks for each run of pytest: the import is a third of what a mutant
costs.

Reads lists of pytest's arguments, one JSON line each, and answers ``[status, output]``; status null: not done after
``LIMIT`` seconds, where the first argument is that limit.
"""

import importlib.util
import json
import os
import signal
import sys
import tempfile
import time

import numpy  # noqa: F401
import pytest
import torch  # noqa: F401

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import triton  # noqa: F401


def run(arguments, limit):
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            status = 5
            try:
                status = int(pytest.main(arguments))
            finally:
                sys.stdout.flush()
                os._exit(status)
        end = time.monotonic() + limit
        done, status = os.waitpid(child, os.WNOHANG)
        while not done and time.monotonic() < end:
            time.sleep(0.05)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        output.seek(0)
        text = output.read()
    return os.waitstatus_to_exitcode(status) if done else None, text


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        limit, *arguments = json.loads(line)
        answers.write(json.dumps(run(arguments, limit)) + "\n")
        answers.flush()
