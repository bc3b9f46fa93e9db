"""Three real TRL trainers over one set of pairs, and one run of one of them."""

import importlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from rlkernels import ops
from rlkernels.cli.demo import meter
from rlkernels.integrations import trl as integration

FUSED, PAIRS = ("trl.trainer.utils", "_ChunkedLogProbFunction"), ("trl.trainer.reward_trainer", "nn")
# What each trainer says of its progress, under the key it logs it by.
PROGRESS = {"reward": "accuracy", "dpo": "rewards/accuracies", "grpo": "reward"}


@dataclass(frozen=True)
class Setting:
    """Everything the three trainers share."""

    policy: str
    reward: str
    trained: dict[str, str]
    out: str
    pairs: list[dict[str, str]]
    held_out: list[dict[str, str]]
    steps: dict[str, int]
    device: str
    seed: int
    small: bool


@dataclass
class Run:
    """One training run: per-step curves, the seconds of each step that were spent in the seam, the kernels that served
    it.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    progress: list[float | None] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    largest_call_seconds: float = 0.0
    peak_bytes: int = 0
    seconds: float = 0.0
    held_out_accuracy: float | None = None
    seam_calls: int = 0
    kernels: dict[str, int] = field(default_factory=dict)


class _Recorder(TrainerCallback):
    def __init__(self, run: Run, key: str, watch: meter.Stopwatch, advance):
        self.run, self.key, self.watch, self.advance = run, key, watch, advance

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.run.losses.append(logs["loss"])
            self.run.grad_norms.append(logs["grad_norm"])
            self.run.progress.append(logs.get(self.key))

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.lap()
        self.advance()


def make(name: str, setting: Setting) -> Any:
    """The trainer, built from the saved models under the seed: two calls build the same trainer."""
    set_seed(setting.seed)
    common = {
        "output_dir": f"{setting.out}/{name}",
        "max_steps": setting.steps[name],
        "report_to": "none",
        "use_cpu": setting.device == "cpu",
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "seed": setting.seed,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        # With the default of 1e-8, an element whose gradient cancels to rounding noise moves a full step in a direction
        # that is noise.
        "adam_epsilon": 1e-6,
    }
    tokenizer = AutoTokenizer.from_pretrained(setting.policy)
    if name == "reward":
        texts = [
            {"chosen": p["prompt"] + p["chosen"], "rejected": p["prompt"] + p["rejected"]}
            for p in setting.pairs + setting.held_out
        ]
        count = len(setting.pairs)
        return trl.RewardTrainer(
            AutoModelForSequenceClassification.from_pretrained(setting.reward, num_labels=1),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(texts[:count]),
            eval_dataset=Dataset.from_list(texts[count:]),
            args=trl.RewardConfig(
                per_device_train_batch_size=4 if setting.small else 32,
                per_device_eval_batch_size=32,
                max_length=128,
                learning_rate=5e-4,
                center_rewards_coefficient=0.01,
                **common,
            ),
        )
    model = AutoModelForCausalLM.from_pretrained(setting.policy if name == "dpo" else setting.trained["dpo"])
    if name == "dpo":
        return trl.DPOTrainer(
            model,
            ref_model=AutoModelForCausalLM.from_pretrained(setting.policy),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(setting.pairs),
            args=trl.DPOConfig(
                per_device_train_batch_size=2 if setting.small else 6,
                max_length=128,
                learning_rate=1e-3,
                beta=0.1,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, 1.0],
                **common,
            ),
        )
    prompts = Dataset.from_list([{"prompt": p["prompt"]} for p in setting.pairs])
    return trl.GRPOTrainer(
        model,
        reward_funcs=setting.trained["reward"],
        train_dataset=prompts,
        processing_class=tokenizer,
        args=trl.GRPOConfig(
            per_device_train_batch_size=4 if setting.small else 16,
            num_generations=4,
            max_completion_length=8 if setting.small else 24,
            num_iterations=2,
            beta=0.04,
            learning_rate=1e-3,
            **common,
        ),
    )


def train(name: str, setting: Setting, patched: bool, advance) -> tuple[Run, meter.Stopwatch]:
    """Trains once under a stopwatch.

    ``patched`` puts our kernels in for the duration; ``advance`` is called after every step.
    """
    run, before = Run(), ops.calls()
    if patched:
        integration.patch()
    try:
        module, attribute = PAIRS if name == "reward" else FUSED
        with meter.around(importlib.import_module(module), attribute) as watch:
            trainer = make(name, setting)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_Recorder(run, PROGRESS[name], watch, advance))
            start = time.perf_counter()
            trainer.train()
            run.seconds, run.loss_seconds = time.perf_counter() - start, watch.laps
        run.kernels = {f"{op} on {backend}": n for (op, backend), n in (ops.calls() - before).items()}
        run.seam_calls = sum(integration.status().calls.values()) if patched else 0
        if name == "reward":
            run.held_out_accuracy = trainer.evaluate()["eval_accuracy"]
        if not patched:
            trainer.save_model(setting.trained[name])
    finally:
        integration.unpatch()
    return run, watch


def repeat_alone(runs: list[Run], watches: list[meter.Stopwatch]) -> None:
    """Repeats the largest call of each run, without the trainer around it, for the speed-up and the
    peak extra memory.
    """
    for run, watch, seconds in zip(runs, watches, meter.in_turns(watches), strict=True):
        run.largest_call_seconds, run.peak_bytes = seconds, meter.peak_extra_bytes(watch)


def quiet() -> None:
    """Other libraries' progress bars and remarks stay off the terminal; errors do not."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for library in ("transformers", "trl", "datasets", "accelerate", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)


def torch_device(wanted: str) -> str:
    """``auto`` is a GPU where there is one.

    Raises:
        RuntimeError: a GPU is asked for and torch sees none.
    """
    seen = torch.cuda.is_available()
    if wanted == "cuda" and not seen:
        raise RuntimeError("--device cuda, but torch sees no GPU; use --device cpu")
    return ("cuda" if seen else "cpu") if wanted == "auto" else wanted
