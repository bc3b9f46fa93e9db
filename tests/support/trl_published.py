"""A pytest plugin for TRL's own tests: on a CPU, without the Hub, and with ``PUBLISHED=ours`` under the patch, with
``PUBLISHED=rounded`` under the patch that rounds the logits of a head to bf16 as TRL does.

The tests are TRL's, and so are the functions but for those that the patch replaces.
"""

import importlib
import os
import re
from pathlib import Path

import torch
import transformers

OURS = os.environ.get("PUBLISHED") in ("ours", "rounded")
if OURS:
    from rlkernels.integrations import trl as integration

    integration.patch(logits_dtype=torch.bfloat16 if os.environ["PUBLISHED"] == "rounded" else None)


def pytest_configure(config):
    known = importlib.import_module("trl.import_utils")
    # The tests ask for packages that this version of TRL does not know of.
    for name in re.findall(r"is_\w+_available", Path("tests/testing_utils.py").read_text()):
        if not hasattr(known, name):
            setattr(known, name, lambda *args, **kwargs: False)
    from tests import testing_utils

    # The fused head runs on a CPU, too.
    testing_utils.require_torch_accelerator = lambda test: test


def tiny(architecture):
    configuration = getattr(transformers, architecture).config_class(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if "Deepseek" in architecture else 2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(7)
    return transformers.AutoModelForCausalLM.from_config(configuration)


_from_the_hub = transformers.AutoModelForCausalLM.from_pretrained.__func__


def from_pretrained(cls, name, *args, dtype=None, torch_dtype=None, **kwargs):
    """Returns a random model in place of one of the Hub's random models."""
    if str(name).startswith("trl-internal-testing/tiny-"):
        return tiny(name.split("tiny-")[1].split("-")[0]).to(dtype or torch_dtype or torch.float32)
    return _from_the_hub(cls, name, *args, **kwargs)


transformers.AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)


def pytest_terminal_summary(terminalreporter):
    if OURS:
        status = integration.status()
        handed = {
            name: sum(n for (of, _), n in status.delegations.items() if of == name) for name, _ in status.delegations
        }
        terminalreporter.write_line(f"calls of ours: {status.calls}, handed to TRL: {handed}")
