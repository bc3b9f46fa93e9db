"""DeepSpeed-Chat's own loss code on small problems: how it is loaded without DeepSpeed, and what it is asked.

The checkout is named by the environment variable ``DEEPSPEED_CHAT``: the folder ``applications/DeepSpeed-Chat`` of
DeepSpeedExamples. Inputs are drawn by ``random.Random``, whose numbers no version of torch changes.
"""

import ast
import contextlib
import importlib
import os
import random
import sys
import types
from pathlib import Path

import torch
from torch import nn

VARIABLE = "DEEPSPEED_CHAT"
COMMIT = "45b4b7156c8794a3452a5a7d03dbd8d797068569"
SETTINGS = {
    "kl_ctl": 0.1,
    "clip_reward_value": 5,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "compute_fp32_loss": False,
}
"""What ``DeepSpeedPPOTrainer.__init__`` puts on a trainer."""
PAD, VOCAB = 0, 13
SEEDS = range(2)


def checkout():
    """The folder of DeepSpeed-Chat, or None."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else None


@contextlib.contextmanager
def originals(folder):
    """DeepSpeed-Chat's modules, imported beside a stub of DeepSpeed, whose engine no loss calls; none of them stays."""
    # First, because transformers would take the stub for DeepSpeed.
    importlib.import_module("transformers.models.llama.modeling_llama")
    before = set(sys.modules)
    names = ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.accelerator")
    partition = "deepspeed.runtime.zero.partition_parameters"
    stubs = {name: types.ModuleType(name) for name in (*names, partition)}
    stubs["deepspeed"].zero = types.SimpleNamespace(GatheredParameters=None)
    stubs[partition].ZeroParamStatus = None
    stubs["deepspeed.accelerator"].get_accelerator = lambda: None
    sys.modules.update(stubs)
    sys.path.insert(0, str(folder))
    try:
        yield types.SimpleNamespace(
            ppo=importlib.import_module("dschat.rlhf.ppo_trainer"),
            reward=importlib.import_module("dschat.utils.model.reward_model"),
            dpo=script(folder / "training/step2_dpo_finetuning/main.py", "get_batch_logps"),
        )
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("dschat", "deepspeed"):
                del sys.modules[name]


def script(path, function):
    """A module with one function of a script, whose other imports need DeepSpeed."""
    tree = ast.parse(path.read_text())
    wanted = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    module = types.ModuleType("step2_dpo_main")
    module.__file__, module.torch = str(path), torch
    exec(compile(ast.Module([wanted], []), str(path), "exec"), vars(module))
    return module


def trainer(ppo, **settings):
    """A trainer without engines, which its losses do not use."""
    made = ppo.DeepSpeedPPOTrainer.__new__(ppo.DeepSpeedPPOTrainer)
    vars(made).update(SETTINGS, **settings)
    return made


class Fixed(nn.Module):
    """A transformer whose hidden states are given."""

    def __init__(self, hidden, model_type):
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=hidden.shape[-1], model_type=model_type)
        self.hidden = nn.Parameter(hidden)

    def forward(self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, use_cache=None, **more):
        assert set(more) == (set() if self.config.model_type == "llama" else {"head_mask"})
        return (self.hidden,)


def reward_model(kind, hidden, head, opt=False, **options):
    """A reward model of the class ``kind`` over given hidden states, with the head ``head``."""
    base = Fixed(hidden, "opt" if opt else "llama")
    made = kind(base, types.SimpleNamespace(pad_token_id=PAD), num_padding_at_beginning=int(opt), **options)
    made.to(hidden.dtype)
    with torch.no_grad():
        made.v_head.weight.copy_(head)
    return made


def normal(draw, *shape):
    numbers = torch.tensor([draw.gauss(0, 1) for _ in range(torch.Size(shape).numel())], dtype=torch.float64)
    return numbers.view(shape)


def whole(draw, low, high, *shape):
    return torch.tensor([draw.randrange(low, high) for _ in range(torch.Size(shape).numel())]).view(shape)


def logits(seed):
    """``(logits, labels)``: the logits are a view without their last position, as the trainer passes them."""
    draw = random.Random(seed)
    return 3 * normal(draw, 2, 5, VOCAB)[:, :-1], whole(draw, 0, VOCAB, 2, 5)[:, 1:]


def tokens(seed):
    """Six columns ``[4, 7]`` and a mask with holes, dead tails, and a row with one live token."""
    draw = random.Random(seed)
    columns = [normal(draw, 4, 7) for _ in range(6)]
    mask = whole(draw, 0, 3, 4, 7) > 0
    mask[0], mask[1, 4:], mask[2] = True, False, False
    mask[2, 0] = True
    return columns, mask.long()


def experience(seed):
    """``(prompts, log_probs, ref_log_probs, reward_score, action_mask)``.

    The answers: full, one token, none, padding inside, scores beyond the clip.
    """
    draw = random.Random(seed)
    prompts = whole(draw, 1, VOCAB, 5, 3)
    mask = torch.ones(5, 8, dtype=torch.long)
    mask[0, :1] = 0
    mask[1, 3:] = 0
    mask[2, 2:] = 0
    mask[3, 4], mask[3, 6:] = 0, 0
    return prompts, normal(draw, 5, 8), normal(draw, 5, 8), 6 * normal(draw, 5), mask


def sequences(seed):
    """``(logits, input_ids, label_mask)`` of the DPO script."""
    draw = random.Random(seed)
    mask = whole(draw, 0, 2, 4, 6)
    mask[0], mask[1] = 1, 0
    return 3 * normal(draw, 4, 6, VOCAB), whole(draw, 0, VOCAB, 4, 6), mask.int()


PAIRS = ("padded", "identical", "full", "opt", "padding inside")


def pairs(name, seed):
    """``(input_ids, hidden, head)``: three pairs ``[6, 8]`` that share two tokens."""
    draw = random.Random(f"{name} {seed}")
    ids = whole(draw, 3, VOCAB, 6, 8)
    ids[3:, :2] = ids[:3, :2]
    ids[3:, 2] = ids[:3, 2] % (VOCAB - 3) + 3
    if name != "full":
        for row in range(6):
            ids[row, draw.randrange(4, 9) :] = PAD
    if name == "identical":
        ids[3], ids[4] = ids[0], ids[1]
    if name == "opt":
        ids[:, 0] = PAD
    if name == "padding inside":
        ids[1, 3] = ids[3, 4] = PAD
    return ids, normal(draw, 6, 8, 3), normal(draw, 1, 3)


def answers(seed):
    """``(input_ids, hidden, head)`` of ``forward_value``: padding before the prompt of three tokens, and in answers."""
    draw = random.Random(seed)
    ids = whole(draw, 1, VOCAB, 4, 8)
    ids[0, 0] = ids[1, 5] = PAD
    ids[2, 3:] = PAD
    return ids, normal(draw, 4, 8, 3), normal(draw, 1, 3)


PROMPT = 3


def system(losses, reward_kind):
    """The functions of one system under DeepSpeed-Chat's names.

    Args:
        losses: an object with the functions of the trainer and of the DPO script.
        reward_kind: its class of reward models.
    """

    def reward_forward(ids, hidden, head, opt, **options):
        model = reward_model(reward_kind, hidden, head, opt, **options)
        out = model(ids, attention_mask=(ids != PAD).long())
        return tuple(out.values()), (model.rwtransformer.hidden, model.v_head.weight)

    def reward_values(ids, hidden, head):
        model = reward_model(reward_kind, hidden, head)
        out = model.forward_value(ids, (ids != PAD).long(), prompt_length=PROMPT)
        return tuple(out.values()), (model.rwtransformer.hidden, model.v_head.weight)

    return types.SimpleNamespace(losses=losses, forward=reward_forward, values=reward_values)


def of_originals(modules, **settings):
    """The system of the originals."""
    made = trainer(modules.ppo, **settings)
    names = ("actor_loss_fn", "critic_loss_fn", "get_advantages_and_returns", "compute_rewards")
    losses = types.SimpleNamespace(**{name: getattr(made, name) for name in names})
    losses.gather_log_probs = modules.ppo.gather_log_probs
    losses.get_batch_logps = modules.dpo.get_batch_logps
    return system(losses, modules.reward.RewardModel)


def measured(own, dtype=torch.float64):
    """Every result of a system on every problem, with its gradients: from the name of a case to its tensors."""
    found = {}

    def add(name, results, leaves):
        results = results if isinstance(results, tuple) else (results,)
        # Unequal upstream gradients, so that no two positions can be taken for each other.
        total = sum((x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in results)
        gradients = torch.autograd.grad(total, leaves) if leaves else ()
        found[name] = [x.detach() for x in (*results, *gradients)]

    for seed in SEEDS:
        z, labels = logits(seed)
        leaf = z.to(dtype).requires_grad_()
        add(f"gather_log_probs {seed}", own.losses.gather_log_probs(leaf, labels), (leaf,))
        columns, mask = tokens(seed)
        new, old, advantages, value, returns, rewards = (x.to(dtype) for x in columns)
        for name, arguments in (("actor_loss_fn", (new, old, advantages)), ("critic_loss_fn", (value, new, returns))):
            leaf = arguments[0].clone().requires_grad_()
            add(f"{name} {seed}", getattr(own.losses, name)(leaf, *arguments[1:], mask), (leaf,))
        add(f"get_advantages_and_returns {seed}", own.losses.get_advantages_and_returns(value, rewards, 2), ())
        prompts, new, ref, score, mask = experience(seed)
        made = own.losses.compute_rewards(prompts, new.to(dtype), ref.to(dtype), score.to(dtype), mask)
        start = prompts.shape[1] - 1
        ends = start + mask[:, start:].sum(1, keepdim=True)
        # As ``train_rlhf`` does at once.
        add(f"compute_rewards {seed}", torch.where(torch.arange(mask.shape[1]) <= ends, made, 0.0), ())
        z, ids, mask = sequences(seed)
        leaf = z.to(dtype).requires_grad_()
        add(f"get_batch_logps {seed}", own.losses.get_batch_logps(leaf, ids, mask), (leaf,))
        for name in PAIRS:
            ids, hidden, head = pairs(name, seed)
            add(f"forward, {name} {seed}", *own.forward(ids, hidden.to(dtype), head.to(dtype), opt=name == "opt"))
        ids, hidden, head = answers(seed)
        add(f"forward_value {seed}", *own.values(ids, hidden.to(dtype), head.to(dtype)))
    return found
