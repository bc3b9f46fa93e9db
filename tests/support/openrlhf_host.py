"""OpenRLHF's own modules on a machine without its accelerators, with stubs for packages that they only import.

``stock`` loads the few files of the loss layer by themselves, in a second. ``imported`` imports the package, in twenty.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
import torch

STUBS = ("deepspeed", "flash_attn", "peft", "pylatexenc", "ray", "torchdata", "vllm", "wandb")
NAMES = (
    "aggregate_loss compute_approx_kl compute_entropy compute_reward log_probs_from_logits masked_mean "
    "masked_normalize DPOLoss GPTLMLoss KDLoss KTOLoss LogExpLoss PairWiseLoss PRMLoss PolicyLoss SFTLoss ValueLoss "
    "VanillaKTOLoss"
).split()
MAKER = "trainer/ppo_utils/experience_maker.py"
METHODS = ("get_advantages_and_returns", "get_cumulative_returns")


def stub(name):
    found = mock.MagicMock(name=name)
    found.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return found


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A finder of packages that are not installed, and of every module within them."""

    def __init__(self, tops):
        self.tops = tops

    def find_spec(self, name, path, target=None):
        # Of ``flash_attn.ops`` OpenRLHF asks whether it is there, and then takes its cross-entropy.
        if name.partition(".")[0] not in self.tops or name.startswith("flash_attn.ops"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return mock.MagicMock(name=spec.name, __path__=[])

    def exec_module(self, module):
        pass


def stub_what_is_missing():
    absent = [name for name in STUBS if importlib.util.find_spec(name) is None]
    sys.meta_path.append(Stubs(absent))


@contextlib.contextmanager
def uncompiled():
    """``compute_entropy`` compiles at import, and a C++ compiler may be missing."""
    with mock.patch.object(torch, "compile", lambda f=None, **_: f if f is not None else (lambda g: g)):
        yield


def root(version):
    """The folder of the installed package; skips where it is not there or of another version."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        pytest.skip(f"OpenRLHF is not installed: pip install --no-deps openrlhf=={version}")
    if metadata.version("openrlhf") != version:
        pytest.skip(f"OpenRLHF {metadata.version('openrlhf')} is installed, and {version} is wanted")
    return Path(spec.submodule_search_locations[0])


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stock(version="0.11.2"):
    """A namespace of the loss layer of the installed wheel, the estimators of the experience maker as functions."""
    folder = root(version)
    package = types.ModuleType("stock_openrlhf")
    package.__path__ = [str(folder / "models")]
    around = ["ppo_utils.experience", "ppo_utils.length_penalty", "ray.launcher"]
    stubs = {f"openrlhf.trainer.{name}": stub(name) for name in around}
    stubs |= {name: stub(name) for name in ("openrlhf.utils.logging_utils", "openrlhf.utils.seqlen_balancing")}
    stubs |= {"deepspeed": stub("deepspeed"), "ray": stub("ray"), package.__name__: package}
    found = types.SimpleNamespace()
    with mock.patch.dict(sys.modules, stubs), uncompiled():
        utils, loss = (
            load(f"{package.__name__}.{name}", folder / "models" / f"{name}.py") for name in ("utils", "loss")
        )
        for name in NAMES:
            for module in (utils, loss):
                if hasattr(module, name):
                    setattr(found, name, getattr(module, name))
        if version == "0.11.2":
            sys.modules["openrlhf.models.utils"] = utils
            maker = load("stock_openrlhf_maker", folder / MAKER).RemoteExperienceMaker
            for name in METHODS:
                setattr(found, name, functools.partial(getattr(maker, name), None))
    return found


def imported(version="0.11.2"):
    """Imports ``openrlhf.models`` as a trainer does, with stubs for what is not installed."""
    root(version)
    stub_what_is_missing()
    with uncompiled():
        return importlib.import_module("openrlhf.models")
