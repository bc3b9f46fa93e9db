"""``rlkernels demo``: three real TRL trainers on real text, each twice, stock and with our kernels; fails unless both
runs agree.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import warnings
from pathlib import Path

from rlkernels.installing import how

NEEDED = ("tokenizers", "transformers", "datasets", "accelerate", "trl", "rich", "matplotlib")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_DISABLED": "true"}
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "KINETO_LOG_LEVEL": "99",
}
# On several, transformers would wrap the model in DataParallel, which TRL refuses.
ONE_GPU = {"CUDA_VISIBLE_DEVICES": "0"}
FULL = {
    "docstrings": None,
    "vocabulary": 16384,
    "hidden": 128,
    "layers": 2,
    "held_out": 256,
    "reward": 50,
    "dpo": 30,
    "grpo": 36,
}
SMALL = {
    "docstrings": 1500,
    "vocabulary": 2048,
    "hidden": 64,
    "layers": 2,
    "held_out": 32,
    "reward": 4,
    "dpo": 4,
    "grpo": 4,
}
TRAINERS = ("reward", "dpo", "grpo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("rlkernels-demo"),
        help="folder for demo.png and demo.json (default: %(default)s)",
    )
    steps = ", ".join(f"{FULL[name]} {name}" for name in TRAINERS)
    parser.add_argument("--steps", type=_positive, help=f"steps of each trainer (default: {steps})")
    parser.add_argument(
        "--quick", action="store_true", help="a small model and a few steps each: shows that it runs, learns nothing"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the text, the weights and the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU where there is one"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 where stock and patched disagree or no kernel of ours was called; 2 where the demo cannot run here;
    130 on Ctrl-C.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"rlkernels demo needs {', '.join(missing)}; {how('demo')}")
    # Read by the libraries when they are imported, so before the first import of any of them.
    os.environ.update(OFFLINE)
    for name, value in {**QUIET, **ONE_GPU}.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    try:
        return _demo(args)
    except KeyboardInterrupt:
        print("rlkernels demo: interrupted, nothing was written", file=sys.stderr)
        return 130


def _demo(args) -> int:
    import rich.console

    from rlkernels.cli.demo import corpus, models, report
    from rlkernels.cli.demo import trainers as demo_trainers
    from rlkernels.integrations import trl as integration

    console = rich.console.Console(highlight=False, soft_wrap=True)
    demo_trainers.quiet()
    size = dict(SMALL if args.quick else FULL)
    if args.steps is not None:
        size.update(dict.fromkeys(TRAINERS, args.steps))
    try:
        device = demo_trainers.torch_device(args.device)
        patch = integration.patch()
        integration.unpatch()
        texts = corpus.docstrings(limit=size["docstrings"])
    except (ImportError, RuntimeError, FileNotFoundError) as error:
        return _refuse(f"rlkernels demo: {error}")
    lines = corpus.passages(texts)
    pairs = corpus.preference_pairs(lines, args.seed)
    with tempfile.TemporaryDirectory(prefix="rlkernels-demo-") as directory:
        tokenizer = models.train_tokenizer(texts, size["vocabulary"])
        policy, reward, parameters = models.build(Path(directory), tokenizer, args.seed, size["hidden"], size["layers"])
        facts = report.facts(device, len(texts), len(lines), len(tokenizer), parameters, size)
        report.announce(console, facts, patch)
        setting = demo_trainers.Setting(
            policy=policy,
            reward=reward,
            trained={name: f"{directory}/trained-{name}" for name in TRAINERS},
            out=f"{directory}/out",
            pairs=pairs[: -size["held_out"]],
            held_out=pairs[-size["held_out"] :],
            steps={name: size[name] for name in TRAINERS},
            device=device,
            seed=args.seed,
            small=args.quick,
        )
        with report.bars(console) as bars:
            runs = {name: _pair(bars, demo_trainers, name, setting) for name in TRAINERS}
    results = report.compare(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    picture, record = args.out / "demo.png", args.out / "demo.json"
    report.draw(runs, results, facts, picture)
    report.write(record, runs, results, facts, vars(args), patch)
    report.conclude(console, runs, results, (picture, record))
    return 0 if all(result.passed for result in results.values()) else 1


def _pair(bars, demo_trainers, name, setting):
    trained = []
    for patched in (False, True):
        task = bars.add_task(f"{name:6s} {'rlkernels' if patched else 'stock'}", total=setting.steps[name])
        trained.append(demo_trainers.train(name, setting, patched, lambda task=task: bars.advance(task)))
    runs, watches = map(list, zip(*trained, strict=True))
    demo_trainers.repeat_alone(runs, watches)
    return runs


def _refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
