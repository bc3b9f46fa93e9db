"""Parts that both modules of ``setup.py`` share: the switches, the compiler, the run of ninja, and the note that is
left where a module was not built.

No name of the machine's is in a ninja file: sources, headers and results have fixed names in the build folder, so that
no blank, quote or dollar in a path has to survive ninja, a shell and a compiler's list of headers.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PACKAGE = "rlkernels"
HEADERS = Path(sysconfig.get_path("include"))
# Pip keeps a wheel, and would install it without native code once more.
AGAIN = "run pip install again (--force-reinstall --no-deps --no-cache-dir)"
LOAD = (
    "import importlib.machinery as m, importlib.util as u, sys; name, path = sys.argv[1:]; loader = "
    "m.ExtensionFileLoader(name, path); "
    "loader.exec_module(u.module_from_spec(u.spec_from_loader(name, loader)))"
)


class Failed(Exception):
    """The reason, in one line, why a module cannot be built here; ``output``: what the compiler said."""

    def __init__(self, reason, output=""):
        super().__init__(reason)
        self.output = output


def switch(name, value):
    """The value of a variable that is 0, 1 or auto.

    Raises:
        SystemExit: it is something else.
    """
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{name} must be 0, 1 or auto, got {value!r}")
    return value


def compiler():
    """The words that start a C++ compiler: ``CXX``, or the first one on PATH; none where there is none.

    Raises:
        SystemExit: ``CXX`` names what is not there.
    """
    given = os.getenv("CXX", "").strip()
    # A path with a blank needs no quotes, a compiler with flags is split.
    words = [given] if shutil.which(given) else shlex.split(given)
    if words and shutil.which(words[0]) is None:
        raise SystemExit(f"CXX={given} was not found on PATH; unset it to build with the compiler that is")
    if words:  # ninja runs elsewhere, where a relative path leads nowhere
        return [os.path.abspath(words[0]) if os.sep in words[0] else words[0], *words[1:]]
    return [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]


def missing(cxx):
    """Name what a build needs and is not here, in one line, or None."""
    if not cxx:
        return f"no C++ compiler (c++, g++, clang++) was found at install time; install g++ and {AGAIN}"
    if not (HEADERS / "Python.h").is_file():  # a Debian python3 without python3-dev
        return (
            f"no Python headers were found at install time (no Python.h in {HEADERS}); install python3-dev and {AGAIN}"
        )
    return None


def compiles(cxx, code, *flags):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        return (
            subprocess.run(
                [*cxx, *flags, str(source), "-o", str(source.with_suffix(""))], capture_output=True
            ).returncode
            == 0
        )


def command(words):
    """Words as a ninja file has them: quoted for the shell, dollars doubled for ninja."""
    return shlex.join(words).replace("$", "$$")


def jobs():
    """The number of compilers that run side by side: ``MAX_JOBS``, else as many as there are processors for this
    process.

    Raises:
        SystemExit: ``MAX_JOBS`` is not a whole number of at least 1.
    """
    text = os.getenv("MAX_JOBS", "").strip()
    if text and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise SystemExit(
            f"MAX_JOBS must be a whole number of at least 1, got {text!r}; unset it to use every processor"
        )
    return (
        int(text) if text else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def _bring(folder, name, target):
    """Makes ``target`` reachable as ``folder/name``."""
    place = folder / name
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
    try:
        place.symlink_to(target, target_is_directory=True)
    except OSError:  # a file system without links
        shutil.copytree(target, place)


def _ninja():
    try:
        import ninja
        import pybind11
    except ImportError as error:
        raise Failed(f"{error.name} is not installed; build with isolation, or pip install pybind11 ninja") from error
    return str(Path(ninja.BIN_DIR, "ninja")), pybind11


def _run(words):
    """Runs a command; what it prints is shown while it does, and is the output of ``Failed`` where it fails."""
    said = []
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        for line in process.stdout:
            said.append(line)
            sys.stdout.write(
                line.encode(sys.stdout.encoding or "ascii", "replace").decode(sys.stdout.encoding or "ascii")
            )
            sys.stdout.flush()
    if process.returncode != 0:
        raise Failed(_cause(said), "".join(said))


def _cause(said):
    """The program that failed, and the line that tells most: the first with an error in it, else the last that is not
    ninja's own.
    """
    lines = [line.strip() for line in said]
    # Ninja repeats the command there.
    commands = [after for line, after in zip(lines, lines[1:], strict=False) if line.startswith("FAILED:")]
    own = [line for line in lines if line and line not in commands and not line.startswith(("FAILED:", "ninja:", "["))]
    words = commands[0].split() if commands else ["ninja"]
    told = next(
        (line for line in own if re.search(r"\berror\b", line, re.IGNORECASE)), own[-1] if own else "it said nothing"
    )
    return f"{words[0]} failed: {told}"


def make(name, folder, out, root, at_once, write):
    """Builds a module in ``folder`` with ``at_once`` compilers and puts it at ``out``.

    ``write(plan, include)`` adds rules and edges to the ninja plan; the last edge makes ``name.so``. That is loaded
    once: a module that links and does not load would break every import of the package.

    Raises:
        Failed: a compiler, the linker, the loader or the file system failed.
    """
    program, pybind11 = _ninja()
    from ninja.ninja_syntax import Writer

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for link, target in (("csrc", root / "csrc"), ("pybind11", Path(pybind11.get_include())), ("python", HEADERS)):
            _bring(folder, link, target.resolve())
        with open(folder / "build.ninja", "w", encoding="utf-8", errors="surrogateescape") as file:
            # The versions, because the names of their folders no longer tell them: a new one compiles the bindings
            # again.
            write(
                Writer(file),
                f"-Ipybind11 -Ipython -DRLK_BINDINGS={pybind11.__version__}/{sysconfig.get_python_version()}",
            )
        _run([program, "-C", str(folder), f"-j{at_once}"])
        # Set where one machine builds for another, which cannot load the result.
        if not os.getenv("_PYTHON_HOST_PLATFORM"):
            _load(name, folder / f"{name}.so")
        replace(folder / f"{name}.so", out)
    except OSError as error:
        raise Failed(f"the build failed: {error}") from error


def _load(name, path):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, f"{PACKAGE}.{name}", str(path)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise Failed(f"the module was built and does not load: {said.splitlines()[-1]}", said)


def replace(source, target):
    """Copies a file so that a process which has the old one mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, half)
    shutil.copymode(source, half)
    os.replace(half, target)


def note(package, name, reason=None, output=""):
    """Writes into the package why it has no module ``name``, then the compiler's output; without a reason takes that
    note away.

    Returns:
        The file. ``rlkernels.backends`` reads its first line.
    """
    file = Path(package, f"{name}.build.log")
    file.unlink(missing_ok=True)
    if reason is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{PACKAGE}.{name} was not built: {reason}\n\n{output}", encoding="utf-8", errors="replace")
        # Of an earlier build, from other sources.
        for stale in Path(package).glob(f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"):
            stale.unlink()
    return file


def say(text):
    """One line on the standard error stream; pip shows it with ``-v``."""
    print(f"{PACKAGE}: {text}", file=sys.stderr, flush=True)
