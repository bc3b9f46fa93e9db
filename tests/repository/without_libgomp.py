"""A command where no OpenMP runtime of the system can be opened, so that torch's own is the only one there is.

    python tests/repository/without_libgomp.py COMMAND...

A mount namespace of a new user lays /dev/null over each ``libgomp.so.1`` that the loader would find. It ends with
the command, needs no rights, and is refused on some systems: then the status is 77.
"""

import shutil
import subprocess
import sys

COVER = 'for path in {}; do mount --bind /dev/null "$path" || exit 77; done; exec "$@"'
REFUSED = 77


def libraries():
    """Returns the paths under which the loader knows the runtime."""
    program = shutil.which("ldconfig") or "/sbin/ldconfig"
    lines = subprocess.run([program, "-p"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(" => ")[1] for line in lines if line.strip().startswith("libgomp.so.1 ")]


def words(command):
    """Returns the command that runs ``command`` in such a namespace."""
    script = COVER.format(" ".join(f"'{path}'" for path in libraries()))
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *map(str, command)]


def possible():
    """Tells whether this system gives such namespaces."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return subprocess.run(words(["true"]), capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(subprocess.run(words(sys.argv[1:]), check=False).returncode if possible() else REFUSED)
