"""A figure to reach, and the file of a run. Needs nothing that is not in Python."""

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Target:
    """A figure to reach: its value in this run, and the bound that it must keep."""

    text: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def met(self) -> bool | None:
        """Tells whether the bound is met; None where a side of the comparison was not measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def limit(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"

    @property
    def number(self) -> str:
        return "-" if self.value is None else f"{self.value:.3g}"

    def verdict(self, stated: bool = True) -> str:
        """``stated``: the figure is stated for the shape that was measured."""
        return "not measured" if self.met is None else "other shape" if not stated else "met" if self.met else "NOT MET"

    def record(self, value: str = "value") -> dict[str, object]:
        """The target as plain data; ``value`` is the key of its value."""
        return {"text": self.text, "bound": self.bound, "at_least": self.at_least, value: self.value, "met": self.met}


def of_record(data: dict[str, object], value: str = "worst") -> Target:
    """The target that ``record`` made this of."""
    return Target(data["text"], data[value], data["bound"], data["at_least"])


def save(path: Path, data: dict[str, object]) -> None:
    """Writes JSON whole or not at all: an interrupted run keeps the file of the case before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)
