"""Object files named by the hash of all that went into them, so that a build compiles only what no earlier one has.

The mutation run plants one mistake in one header at a time: what does not include it is not compiled again, and neither
is what it restores.
"""

import fcntl
import hashlib
import os
import re
import shlex
import subprocess
from pathlib import Path

QUOTED = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def parts(source, folders):
    """``{path: text}`` of a source and of every file that it includes by a quoted name, found beside the includer or in
    ``folders``.
    """
    found, waiting = {}, [Path(source).resolve()]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = file.read_text()
        for name in QUOTED.findall(found[file]):
            places = [place / name for place in (file.parent, *map(Path, folders))]
            waiting += [place.resolve() for place in places if place.exists()][:1]
    return found


def digest(*texts):
    """A name for these texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def compiler_version(cxx):
    return subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True, check=True).stdout


def build(folder, cxx, link, objects, folders, suffix="", also=""):
    """Compiles and links ``objects``, ``(name, flags, source)`` each, under ``folder``; returns the path of
    ``<digest><suffix>``.

    ``folders`` are searched for includes. ``also`` goes into the names: the version of a library whose headers are not
    ours.

    Raises:
        RuntimeError: the compiler refused; its output is in the message.
    """
    import ninja
    from ninja.ninja_syntax import Writer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    include = " ".join(f"-I{place}" for place in folders)
    version, edges = compiler_version(cxx), {}
    for name, flags, source in objects:
        texts = [text for _, text in sorted(parts(source, folders).items())]
        edges[folder / f"{name}-{digest(version, also, cxx, flags, *texts)}.o"] = flags, source
    target = folder / f"{digest(link, *(path.name for path in edges))}{suffix}"
    with open(folder / "lock", "w") as lock:  # the workers of one test run ask for the same module
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        with open(folder / "build.ninja", "w") as file:
            plan = Writer(file)
            # Written under another name first: what an interrupted compiler leaves must not pass for an object.
            plan.rule("compile", f"{cxx} $flags {include} -c $in -o $out.part && mv $out.part $out")
            plan.rule(
                "link",
                f"{cxx} {link} @$out.rsp -o $out.part && mv $out.part $out",
                rspfile="$out.rsp",
                rspfile_content="$in_newline",
            )
            for path, (flags, source) in edges.items():
                if not path.exists():
                    plan.build(str(path), "compile", str(source), variables={"flags": flags})
            plan.build(str(target), "link", [str(path) for path in edges])
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder, f"-j{min(os.cpu_count() or 1, 8)}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the sources do not compile:\n{done.stdout[-6000:]}")
    return target
