"""Builds the documentation of this version beside those of other versions, with a selector on every page.

    python docs/publish.py FOLDER    # FOLDER/0.2 (of 0.2.0.dev0: FOLDER/dev), FOLDER/versions.json, FOLDER/index.html

Any web server shows the folder. Its layout is that of mike, which mkdocs-material's selector reads: a folder per minor
version, a copy of the newest release under ``latest``, and a list. A version that is built again replaces itself.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SELECTOR = "RLKERNELS_DOCS_SELECTOR"
"""The variable that makes ``site_hooks.py`` put the selector on the pages; a site by itself has no list to read."""
LATEST = "latest"


def name_of(version):
    """Returns the folder of a version: its first two numbers, or ``dev`` where it comes before its release."""
    return "dev" if ".dev" in version else ".".join(version.split(".")[:2])


def order(entry):
    """Returns what sorts the newest first, and ``dev``, which is newer than all, before them."""
    return [float("inf")] if entry["version"] == "dev" else [int(n) for n in entry["version"].split(".")]


def listed(entries, version):
    """Returns the list of versions with this one in it, the newest first; the newest release alone is ``latest``."""
    kept = [entry for entry in entries if entry["version"] != name_of(version)]
    kept = sorted([*kept, {"version": name_of(version), "title": version}], key=order, reverse=True)
    releases = [entry["version"] for entry in kept if entry["version"] != "dev"]
    return [entry | {"aliases": [LATEST] if entry["version"] in releases[:1] else []} for entry in kept]


def build(folder):
    """Builds the site of the sources here, strictly."""
    words = [sys.executable, "-m", "mkdocs", "build", "-q", "--config-file", ROOT / "mkdocs.yml", "--site-dir", folder]
    subprocess.run(words, cwd=ROOT, check=True, env={**os.environ, SELECTOR: "1", "NO_MKDOCS_2_WARNING": "1"})


def publish(folder, version, build=build):
    """Adds the site of ``version`` to a folder of sites."""
    folder.mkdir(parents=True, exist_ok=True)
    name, index = name_of(version), folder / "versions.json"
    build(folder / name)
    entries = listed(json.loads(index.read_text()) if index.exists() else [], version)
    index.write_text(json.dumps(entries, indent=1) + "\n")
    latest = next((entry["version"] for entry in entries if entry["aliases"]), None)
    if latest == name:
        shutil.rmtree(folder / LATEST, ignore_errors=True)
        shutil.copytree(folder / name, folder / LATEST)
    start = f"{LATEST if latest else name}/index.html"
    head = f'<meta charset="utf-8"><title>rlkernels</title><meta http-equiv="refresh" content="0; url={start}">'
    # Without an icon that is named, a browser asks for one at the root, where there is none.
    head += f'<link rel="icon" href="{start.replace("index.html", "assets/images/favicon.png")}">'
    (folder / "index.html").write_text(f'<!doctype html>{head}<a href="{start}">rlkernels</a>\n')


def main():
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "rlkernels/__init__.py").read_text(), re.MULTILINE)[1]
    folder = Path(sys.argv[1]).resolve()
    publish(folder, version)
    print(f"{folder / name_of(version)} holds the documentation of {version}")


if __name__ == "__main__":
    main()
