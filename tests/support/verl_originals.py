"""verl's own functions on the calls of ``verl_cases``; imports verl."""

import dataclasses
import importlib

import numpy
import torch
import verl_cases

HOMES = ("verl.trainer.ppo.core_algos", "verl.utils.torch_functional", "verl.trainer.ppo.rollout_corr_helper")


def version():
    return importlib.import_module("verl").__version__


def original(name):
    """verl's function, whatever was patched since: the one that its module defined."""
    for home in HOMES:
        held = vars(importlib.import_module(home)).get(name)
        if held is not None:
            assert held.__globals__["__name__"] == home, f"{name} is patched"
            return held
    raise LookupError(name)


def actor_config(settings):
    """verl's ActorConfig of the settings of a case."""
    from verl.trainer.config import RolloutCorrectionConfig
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

    settings, own = dict(settings), dict(settings["policy_loss"])
    if "rollout_correction" in own:
        own["rollout_correction"] = RolloutCorrectionConfig(**own["rollout_correction"])
    settings["policy_loss"], totals = PolicyLossConfig(**own), settings.pop("global_batch_info")
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
    config.global_batch_info.update(totals)
    return config


def run(case, dtype=torch.float64, function=None):
    """Runs verl's function, or another one, with verl's own configuration and array of prompts."""
    if "index" in case.args:
        index = numpy.array(case.args["index"], dtype=object)
        case = dataclasses.replace(case, args={**case.args, "index": index})
    config = None if case.settings is None else actor_config(case.settings)
    return verl_cases.call(original(case.name) if function is None else function, case, dtype, config)
