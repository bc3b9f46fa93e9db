"""The check of what a model of transformers is called with."""

from typing import Any

from rlkernels import checks


def check_tokens(caller: str, batch: dict[str, Any]) -> None:
    """Refuses arguments of a model of transformers that hold no token, or one sequence without its axis.

    Most of these models fail on an empty batch, each at another place.
    """
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        x = batch.get(name)
        if x is None:
            continue
        checks.tensor(caller, name, x)
        expected = "[B, L, H]" if name.endswith("embeds") else "[B, L]"
        if x.dim() < expected.count(",") + 1:
            raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}, expected {expected}")
        if 0 in x.shape[:2]:
            raise ValueError(
                f"{caller}: {name} has shape {tuple(x.shape)}, expected {expected} with B >= 1 and L >= 1, because a "
                "model cannot run an empty batch; leave the call out, or, where other processes run the model at the "
                "same time, pass one sequence with a mask of 0, whose loss and gradients are 0"
            )
