"""Hooks of mkdocs: reference pages made from docs/api.md, links that leave the folder, formulas as MathML.

MathML is what browsers typeset by themselves. So no page fetches a script, and formulas are readable without one.
"""

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OF_THE_REPOSITORY = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def sections():
    """Returns ``(title, names)`` of each section of docs/api.md: the names of a table, or of bullets a module's own."""
    parts = re.split(r"^## (.+)\n", (ROOT / "docs/api.md").read_text(), flags=re.M)[1:]
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        names = [f"rlkernels.{name}" for name in re.findall(r"^\| `(\w+)` \|", text, re.M)]
        if not names:
            module = re.search(r"^`(rlkernels\.\w+)`", text.strip())[1]
            names = [f"{module}.{name}" for name in re.findall(r"`(\w+)`", "".join(re.findall(r"^\*.*", text, re.M)))]
        yield title, names


def to_the_reference(markdown):
    """Makes each public name of docs/api.md a link to its place in the reference."""
    for _, names in sections():
        for name in names:
            short = name.rpartition(".")[2]
            found = re.compile(rf"^(\| |\*.*?(?<!\[))(`{short}`)(?!\])", re.M)
            markdown, count = found.subn(rf"\1[\2][{name}]", markdown, count=1)
            if not count:
                raise ValueError(f"docs/api.md: no place of {name} is found")
    return markdown


def slug(title):
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def reference(title, names):
    """Returns the page of a section: each name with its signature, its types and its docstring."""
    return f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"


def on_config(config):
    """Puts the selector of versions on the pages that ``publish.py`` builds: it reads a list beside the site."""
    if os.environ.get("RLKERNELS_DOCS_SELECTOR"):
        config.extra["version"] = {"provider": "mike", "alias": True}
    return config


def on_files(files, config):
    for title, names in sections():
        files.append(File.generated(config, f"reference/{slug(title)}.md", content=reference(title, names)))
    for name, path in OF_THE_REPOSITORY.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points a link of the repository to its page here, or makes it the name of the file where there is none."""
    here = page.file.src_uri
    if here == "api.md":
        markdown = to_the_reference(markdown)

    def replace(match):
        text, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        inside = path.removeprefix("docs/") if here in OF_THE_REPOSITORY else path
        moved = {source: name for name, source in OF_THE_REPOSITORY.items()}.get(Path(path).name, inside)
        if files.get_file_from_path(moved) and moved == Path(moved).as_posix() and not moved.startswith(".."):
            return f"[{text}]({moved}{'#' + anchor if anchor else ''})" if "/" not in here else match[0]
        leaves = path.startswith("../") and not (ROOT / "docs" / Path(here).parent / path).resolve().is_relative_to(
            ROOT / "docs"
        )
        return f"`{path.removeprefix('../')}`" if leaves or here in OF_THE_REPOSITORY else match[0]

    return re.sub(r"(?<!!)\[([^\]\[]+)\]\(([^)\s]+)\)", replace, markdown)


def of_the_reference(row):
    """Returns a row without "required" where it stands for several arguments, and exceptions without brackets.

    mkdocstrings knows neither type nor default of ``entropy, entropy_coef``; the signature above the table has both.
    """
    text = row[0]
    if re.search(r"<td>\s*</td>", text):
        text = text.replace("<em>required</em>", "")
    return re.sub(r"<code>\(((?:(?!</code>).)*Error\b(?:(?!</code>).)*)\)</code>", r"<code>\1</code>", text, flags=re.S)


def on_page_content(content, page, config, files):
    """Typesets the formulas that arithmatex found, and takes the backslash off a bar in the code of a table.

    GitHub's Markdown wants it there, and Python's keeps it. Rows of the reference become ``of_the_reference``.
    """

    def typeset(match):
        formula = html.unescape(match[2]).strip()
        display = formula.startswith(r"\[")
        return convert(formula[2:-2], display="block" if display else "inline")

    content = re.sub(r'<tr class="doc-section-item">.*?</tr>', of_the_reference, content, flags=re.S)
    content = re.sub(r"<td\b.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), content, flags=re.S)
    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', typeset, content, flags=re.S)


LONG = 28
"""Letters of a word that a column of a table shows in one piece."""
SHORT = 10
"""Letters of a piece of code in a table that is no place to break, such as ``2 T H V``."""


def on_post_page(output, page, config):
    """Lets long names in tables break behind an underscore, a dot or a slash, and short code nowhere, once the search
    has read the page.
    """

    def breakable(match):
        if len(match[2]) <= SHORT:
            return match[1] + match[2].replace(" ", "&nbsp;") + match[3]
        words = re.split(r"( )", match[2])
        return match[1] + "".join(re.sub(r"([_./])", r"\1<wbr>", w) if len(w) > LONG else w for w in words) + match[3]

    def cell(match):
        return re.sub(r"(<code>)([^<]+)(</code>)", breakable, match[0])

    return re.sub(r"<td\b.*?</td>", cell, output, flags=re.S)
