"""Pictures of docs/performance.md, drawn as SVG from the figures that were measured: standard library alone.

    python benchmarks/report/figures.py docs/figures           # writes NAME.svg beside the JSON files of a folder
    python benchmarks/report/figures.py docs/figures --check   # writes nothing; fails where a picture is not theirs

A file holds what one command measured: the machine, the commit, the command, and groups of figures by contender. Equal
files give equal pictures, byte by byte, so that a test can hold them fresh.
"""

import argparse
import json
import sys
from html import escape
from pathlib import Path

WIDTH, LEFT, RIGHT, BAR, GAP = 520, 140, 60, 16, 5
OURS = {"rlkernels": "#3949ab", "rlkernels, in place": "#7986cb", "fp32": "#7986cb", "bf16": "#3949ab"}
OTHERS = "#b0b7c3"
LETTERS = "text{font:13px system-ui,sans-serif;fill:#212121;stroke:#fff;stroke-width:3px;paint-order:stroke}"
STYLE = LETTERS + ".h{font-size:15px;font-weight:600}.s{font-size:11px;fill:#616161}"


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(words)}</text>'


def wrapped(words: str, letters: int) -> list[str]:
    """Returns the lines of a text of at most so many letters."""
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + len(word) >= letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def written(value: float, unit: str) -> str:
    """Returns a figure as the page writes it."""
    return f"{value:.2f}" if unit == "ratio" else f"{value}"


def picture(data: dict, name: str) -> str:
    """Returns the SVG of one figure: a bar per contender on one scale from 0, with its number behind it.

    Ratios get a line at 1.
    """
    heading, unit = data["figures"][name]["heading"], data["figures"][name]["unit"]
    groups = [(group["name"].replace("`", ""), group[name]) for group in data["groups"]]
    scale = (WIDTH - LEFT - RIGHT) / max(value for _, bars in groups for value in bars.values())
    title = heading if unit == "ratio" else f"{heading}, {unit}"
    drawn, y = [text(12, 24, title, ' class="h"'), text(12, 44, data["title"].replace("`", ""))], 58.0
    for label, bars in groups:
        y += 18
        drawn.append(text(12, y, label, ' font-weight="600"'))
        y += 6
        for contender, value in bars.items():
            long = value * scale
            colour = OURS.get(contender, OTHERS)
            drawn.append(text(LEFT - 8, y + 12, contender, ' text-anchor="end"'))
            drawn.append(f'<rect x="{LEFT}" y="{y:g}" width="{long:.2f}" height="{BAR}" fill="{colour}"/>')
            drawn.append(text(round(LEFT + long + 5, 2), y + 12, written(value, unit)))
            y += BAR + GAP
    if unit == "ratio":
        drawn.insert(2, f'<path d="M{LEFT + scale:.2f} 58V{y:g}" stroke="#212121" stroke-dasharray="3 3"/>')
    y += 6
    for line in wrapped(f"{data['conditions']}, commit {data['commit']}: {data['command']}", 76):
        y += 15
        drawn.append(text(12, y, line, ' class="s"'))
    height = f"{y + 14:g}"
    told = "; ".join(
        f"{label}: " + ", ".join(f"{contender} {written(value, unit)}" for contender, value in bars.items())
        for label, bars in groups
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(told)}</desc>",
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>',
            *drawn,
            "</svg>\n",
        ]
    )


def pictures(folder: Path) -> dict[str, str]:
    """Returns the SVG of every figure of a folder's JSON files by the name of its file."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {f"{name}.svg": picture(data, name) for data in files for name in data["figures"]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a picture differs")
    args = parser.parse_args(arguments)
    wanted = pictures(args.folder)
    there = {path.name: path.read_text() for path in args.folder.glob("*.svg")}
    differ = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    for name in [] if args.check else differ:
        if name in wanted:
            (args.folder / name).write_text(wanted[name])
        else:
            (args.folder / name).unlink()
    print(*differ, sep="\n", end="\n" if differ else "")
    return int(args.check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())
