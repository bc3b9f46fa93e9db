"""Runs of TRL's own trainers on tiny models without downloads: losses, gradient norms, and the way of the parameters.

Run as a program it compares stock with ours, case by case, and prints one line of JSON for each:
``python tests/support/trl_runs.py slice|wide [--only TEXT]``; it takes the TRL that comes first on the path.
"""

import contextlib
import json
import os
import random
import sys
import tempfile
import time
import warnings

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_DISABLED="true", TRL_EXPERIMENTAL_SILENCE="1")

import torch  # noqa: E402
import trl_rollouts  # noqa: E402

TOLERANCE = 1e-4
"""Correct runs differ by up to 2e-6, runs whose log-probabilities are 1 % wrong by 1e-3 and more."""

DPO_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
GROUPS = ("grpo", "rloo", "gmpo")
"""Trainers that take groups of answers to a prompt."""
GRPO_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")

SLICE = {
    "dpo/sigmoid": {},
    "dpo/ipo weighted": {"loss_type": ["ipo"], "use_weighting": True},
    "dpo/ld": {"ld_alpha": 0.5},
    "dpo/precomputed": {"precompute_ref_log_probs": True},
    "grpo/dapo": {"loss_type": "dapo", "beta": 0.04, "num_iterations": 2},
    "grpo/sequence, GAS 2, 4 steps per generation": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    },
    "rloo/plain": {"beta": 0.05},
    "kto/kto": {"loss_type": "kto"},
    "kto/apo": {"loss_type": "apo_zero_unpaired"},
    "sft/nll": {"loss_type": "nll"},
    "sft/dft": {"loss_type": "dft"},
    "reward/margin": {},
    "reward/centred": {"center_rewards_coefficient": 0.01},
    "distillation/jsd": {"beta": 0.5},
    "cpo/sigmoid": {},
    "orpo/plain": {},
    "ppo/plain": {},
}
"""Name of a case, ``trainer/variant``, to options of its configuration."""

WIDE = {
    **SLICE,
    **{f"dpo/{t}, {d}": {"loss_type": [t], "f_divergence_type": d} for t in DPO_TYPES for d in DIVERGENCES},
    **{
        f"dpo/exo_pair, {d}": {"loss_type": ["exo_pair"], "f_divergence_type": d, "label_smoothing": 1e-3}
        for d in DIVERGENCES
    },
    "dpo/LoRA": {"peft": True},
    **{
        f"grpo/{t}, {level}, beta {beta}": {
            "loss_type": t,
            "importance_sampling_level": level,
            "beta": beta,
            "num_iterations": 2,
        }
        for t in GRPO_TYPES
        for level in ("token", "sequence")
        for beta in (0.0, 0.04)
    },
    "grpo/entropy quantile": {"top_entropy_quantile": 0.4},
    "grpo/truncated mask": {"mask_truncated_completions": True, "max_completion_length": 24},
    "grpo/tool mask": {"tools": True, "beta": 0.04, "num_iterations": 2},
    "async_grpo/tool mask": {},
    "distillation/forward": {"beta": 0.0},
    "distillation/reverse": {"beta": 1.0},
}


def words(n):
    return " ".join(f"w{random.randrange(90)}" for _ in range(n))


def distinct(completions, **_):
    return [float(len(set(c.split()))) for c in completions]


def models(directory):
    """Writes ``policy`` and ``reward``, models of 97 words, and returns their paths.

    They are used by path, because TRL opens ``_name_or_path`` again for an implicit reference.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokens
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(93))]
    backend = Tokenizer(tokens.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for name, model, extra in (
        ("policy", LlamaForCausalLM, {}),
        ("teacher", LlamaForCausalLM, {}),
        ("reward", LlamaForSequenceClassification, {"num_labels": 1}),
    ):
        torch.manual_seed(7 + (name == "teacher"))
        model(LlamaConfig(**sizes, **extra, tie_word_embeddings=False)).save_pretrained(f"{directory}/{name}")
        tokenizer.save_pretrained(f"{directory}/{name}")
    return directory


def build(case, options, directory, cls=None):
    """Returns the trainer of a case, the same at every call. Plain SGD, because Adam hides a wrong scale."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(0)
    random.seed(0)
    kind, options = case.split("/")[0], dict(options)
    common = dict(output_dir=f"{directory}/out", report_to="none", use_cpu=True, bf16=False, save_strategy="no")
    common |= dict(gradient_checkpointing=False, logging_steps=1, seed=1, optim="sgd", learning_rate=0.05)
    common |= dict(max_steps=3, disable_tqdm=True, per_device_train_batch_size=4 if kind in GROUPS else 2)
    lora, tools = options.pop("peft", False), options.pop("tools", False)
    keywords = {"processing_class": AutoTokenizer.from_pretrained(f"{directory}/policy")}

    def policy(name="policy"):
        return AutoModelForCausalLM.from_pretrained(f"{directory}/{name}")

    def scores():
        return AutoModelForSequenceClassification.from_pretrained(f"{directory}/reward", num_labels=1)

    if lora:
        import peft

        keywords["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if kind in ("dpo", "cpo", "orpo"):
        rows = [dict(prompt=words(5), chosen=" " + words(6), rejected=" " + words(7)) for _ in range(8)]
        if kind == "dpo" and not lora:
            keywords["ref_model"] = policy()
    elif kind in (*GROUPS, "distillation"):
        rows = [dict(prompt=words(5)) for _ in range(8)]
        options = {"max_completion_length": 8, **options}
        if kind == "distillation":
            keywords["teacher_model"] = policy("teacher")
        else:
            options = {"num_generations": 4, "temperature": 0.7, **options}
            keywords["reward_funcs"] = distinct
            if tools:
                keywords["rollout_func"] = trl_rollouts.environment
    elif kind == "async_grpo":
        # Its rollouts are made without prompts; a budget of 0 tokens stands for a batch of a fixed size.
        rows, options = [dict(prompt="w1")], {"token_budget": 0, "max_staleness": 9, "temperature": 0.7, **options}
        keywords |= dict(rollout_worker=trl_rollouts.Worker(), weight_transfer=trl_rollouts.WeightTransfer())
        trl_rollouts.without_a_gpu()
        keywords["reward_funcs"] = distinct
    elif kind == "kto":
        rows = [dict(prompt=words(5), completion=" " + words(6), label=bool(i % 2)) for i in range(8)]
        keywords["ref_model"] = policy()
    elif kind == "sft":
        rows, options = [dict(text=words(12)) for _ in range(8)], {"max_length": 64, **options}
    elif kind == "reward":
        rows = [dict(chosen=words(8), rejected=words(9), margin=0.25 * i) for i in range(8)]
    else:
        tokenizer = keywords["processing_class"]
        rows = [{"input_ids": tokenizer(words(5))["input_ids"]} for _ in range(16)]
        options = dict(total_episodes=8, response_length=8, num_sample_generations=0, missing_eos_penalty=1.0)
        options |= dict(num_mini_batches=1, gradient_accumulation_steps=1)
        common.pop("max_steps")
        keywords |= dict(ref_model=policy(), reward_model=scores(), value_model=scores())
        keywords["eval_dataset"] = Dataset.from_list(rows)
    trainer, configuration = _classes(trl, kind)
    args = configuration(**{**common, **options})
    # AsyncGRPO opens the model itself.
    model = f"{directory}/policy" if kind == "async_grpo" else scores() if kind == "reward" else policy()
    return (cls or trainer)(args=args, model=model, train_dataset=Dataset.from_list(rows), **keywords)


def _classes(trl, kind):
    import importlib

    names = {"sft": "SFT", "distillation": "Distillation", "reward": "Reward", "async_grpo": "AsyncGRPO"}
    name = names.get(kind, kind.upper())
    home = (
        trl
        if kind not in ("cpo", "orpo", "ppo", "gmpo", "async_grpo")
        else importlib.import_module(f"trl.experimental.{kind}")
    )
    return getattr(home, f"{name}Trainer"), getattr(home, f"{name}Config")


def train(trainer):
    """Returns losses, gradient norms and the way from the first to the last parameters, as float64 vectors."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    names = ("loss", "grad_norm", "loss/policy_avg", "loss/value_avg")
    logged = [[e[name] for e in trainer.state.log_history if name in e] for name in names]
    after = dict(trainer.model.named_parameters())
    way = torch.cat([(after[name].detach().double() - p.double()).flatten() for name, p in before.items()])
    return [torch.tensor(x, dtype=torch.float64) for x in logged if x] + [way]


def gap(a, b):
    """Returns the largest relative difference of two runs: of losses, gradient norms and ways."""
    # The size of a loss is 0.01 at least, because RLOO's is 0 but for rounding where its ratios are 1.
    floors = (1e-2, *(0.0 for _ in a[1:]))
    gaps = [(x - y).norm() / x.norm().clamp(min=floor) for x, y, floor in zip(a, b, floors, strict=True)]
    assert all(x.norm() > 0 for x in a[1:]), "nothing was trained"
    return max(gaps).item()


@contextlib.contextmanager
def one_percent_wrong():
    """Makes log-probabilities, divergences and reward margins of ours 1 % wrong."""
    from rlkernels.integrations.trl import functions, replacements

    def wrong(function):
        def call(*args, **kwargs):
            found = function(*args, **kwargs)
            return (1.01 * found[0], *found[1:]) if isinstance(found, tuple) else 1.01 * found

        return call

    places = [
        (functions, "selective_log_softmax"),
        (functions, "selective_log_softmax_and_entropy"),
        (functions.ChunkedLogProbFunction, "apply"),
        (functions.ChunkedDivergenceFunction, "apply"),
        (replacements.LogSigmoid, "__call__"),
    ]
    held = [vars(owner)[name] for owner, name in places]
    for (owner, name), right in zip(places, held, strict=True):
        function = wrong(getattr(right, "__func__", right))
        setattr(owner, name, staticmethod(function) if isinstance(right, staticmethod) else function)
    try:
        yield
    finally:
        for (owner, name), right in zip(places, held, strict=True):
            setattr(owner, name, right)


def compared(case, options, directory):
    """Runs a case stock, patched, and patched with an error of 1 %; returns what a table shows."""
    from rlkernels.integrations import trl as integration

    def run():
        return train(build(case, options, directory))

    start, stock = time.time(), None
    try:
        stock = run()
    except Exception as error:
        if not isinstance(error, AttributeError) or "NoneType" not in str(error):
            return {"case": case, "absent": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        row = {"case": case, "stock": "cannot train without Triton"}
    else:
        row = {"case": case, "stock": "trains"}
    integration.patch()
    try:
        patched = run()
        status = integration.status()
    finally:
        integration.unpatch()
    row |= {"calls": status.calls, "delegations": [list(x) for x in status.delegations]}
    with one_percent_wrong():
        integration.patch()
        try:
            wrong = run()
        finally:
            integration.unpatch()
    reference = patched if stock is None else stock
    row["numbers"] = [x.tolist() for x in reference[:-1]]
    row |= {"gap": None if stock is None else gap(stock, patched), "wrong": gap(reference, wrong)}
    return {**row, "seconds": round(time.time() - start, 1)}


def main(arguments):
    import logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import transformers
    import trl

    cases = {"slice": SLICE, "wide": WIDE}[arguments[0]]
    only = arguments[arguments.index("--only") + 1] if "--only" in arguments else ""
    print(
        json.dumps({"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}),
        flush=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        models(directory)
        for case, options in cases.items():
            if only in case:
                print(json.dumps(compared(case, options, directory)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
