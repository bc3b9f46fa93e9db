"""Prints docs/presets.md from the table of presets: ``python docs/presets.py > docs/presets.md``; a test holds the page
fresh.
"""

from rlkernels import presets

HEAD = """# Presets

Printed by `python docs/presets.py` from `rlkernels.presets`; a test holds it fresh. One name per system and version
gives the keywords of our functions that its code or paper uses:

```python
from rlkernels import policy_loss, presets

loss = policy_loss(logprobs, old, advantages, mask, **presets.settings("verl-0.9", policy_loss))
loss = policy_loss(logprobs, old, advantages, mask, **presets.settings("verl-0.9", policy_loss, "gspo"))
```

`settings` returns a new dict, which you may change. A word behind a slash is a variant. `logits_policy_loss` and
`linear_policy_loss` have the keywords of `policy_loss`, and so for the other losses. `coefficients(name)` returns what
a system multiplies whole terms with. Where cases of a system are among the golden files (`tests/guarantees/golden`),
they run with nothing but its name. The others hold what the source of that version says, and no number of it was
compared.
"""


def page():
    """The whole page."""
    return HEAD + "".join(f"\n```\n{presets.describe(name)}\n```\n" for name in presets.names())


if __name__ == "__main__":
    print(page(), end="")
