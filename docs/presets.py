"""Prints docs/presets.md from the table of presets: ``python docs/presets.py > docs/presets.md``; a test holds the page
fresh.
"""

import textwrap

from rlkernels import presets

WIDTH = 100
"""The letters of a line that the site shows on a wide screen."""

HEAD = """# Presets

Printed by `python docs/presets.py` from `rlkernels.presets`; a test holds it fresh. One name per system and version
gives the keywords of our functions that its code or paper uses:

```python
from rlkernels import policy_loss, presets

verl = presets.settings("verl-0.9", policy_loss)
gspo = presets.settings("verl-0.9", policy_loss, "gspo")
loss = policy_loss(logprobs, old, advantages, mask, **verl)
loss = policy_loss(logprobs, old, advantages, mask, **gspo)
```

`settings` returns a new dict, which you may change. Where it holds `normalizers` already, add yours to
them: `kw["normalizers"] = {**kw.get("normalizers", {}), "batch_num_tokens": n}`.

A word behind a slash is a variant. `logits_policy_loss` and `linear_policy_loss` have the keywords of `policy_loss`,
and so for the other losses. `coefficients(name)` returns what a system multiplies whole terms with. Where cases of a
system are among the golden files (`tests/guarantees/golden`), they run with nothing but its name. The others hold
what the source of that version says, and no number of it was compared.
"""


def page():
    """The whole page."""
    return HEAD + "".join(f"\n```\n{wrapped(presets.describe(name))}\n```\n" for name in presets.names())


def wrapped(text):
    """Returns lines of which the rest stands further in where they are too long."""
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


if __name__ == "__main__":
    print(page(), end="")
