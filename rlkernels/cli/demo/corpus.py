"""Real text that every machine has: the documentation strings of Python's standard library, read from source and never
imported.
"""

import ast
import random
import re
import sysconfig
from pathlib import Path

# Tests, and applications that happen to live in the library: their strings are fixtures more than documentation.
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
PROMPT_WORDS = 6
WORDS = range(16, 41)


def docstrings(root: Path | None = None, limit: int | None = None) -> list[str]:
    """Every docstring of the library under ``root``, or the first ``limit``, in the order of file names.

    Raises:
        FileNotFoundError: the library comes without its source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts[:-1]):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # templates and deliberately broken files are part of some distributions
            nodes = (
                n
                for n in ast.walk(tree)
                if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            )
            found += [text for text in map(ast.get_docstring, nodes) if text]
            if limit is not None and len(found) >= limit:
                return found[:limit]
    if not found:
        raise FileNotFoundError(
            f"no Python source with docstrings under {root}; the demo reads the standard library's own files"
        )
    return found


def passages(texts: list[str]) -> list[str]:
    """Paragraphs of prose, each once, cut to ``WORDS`` words: code, tables and signatures are left out."""
    kept = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            words = paragraph.split()
            line = " ".join(words[: WORDS[-1]])
            prose = sum(c.isalpha() or c in " ,.'" for c in line)
            if len(words) >= WORDS[0] and prose >= 0.93 * len(line):
                kept[line] = None
    return list(kept)


def corrupt(words: list[str], vocabulary: list[str], rng: random.Random) -> list[str]:
    """The same passage gone wrong: some neighbours change places, some words come from elsewhere, some are misspelt."""
    words = list(words)
    for i in range(len(words) - 1):
        if rng.random() < 0.2:
            words[i], words[i + 1] = words[i + 1], words[i]
    for i, word in enumerate(words):
        fate = rng.random()
        if fate < 0.1:
            words[i] = rng.choice(vocabulary)
        elif fate < 0.2 and len(word) > 3:
            at = rng.randrange(1, len(word) - 2)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return words


def preference_pairs(lines: list[str], seed: int) -> list[dict[str, str]]:
    """One pair per passage, shuffled: its first words as prompt, the rest as ``chosen``, the rest corrupted as
    ``rejected``.
    """
    rng = random.Random(seed)
    vocabulary = sorted({word for line in lines for word in line.split()})
    pairs = []
    for line in lines:
        words = line.split()
        head, tail = words[:PROMPT_WORDS], words[PROMPT_WORDS:]
        wrong = corrupt(tail, vocabulary, rng)
        while wrong == tail:  # a short passage can come out whole: nobody could prefer either
            wrong = corrupt(tail, vocabulary, rng)
        pairs.append({"prompt": " ".join(head), "chosen": " " + " ".join(tail), "rejected": " " + " ".join(wrong)})
    rng.shuffle(pairs)
    return pairs
