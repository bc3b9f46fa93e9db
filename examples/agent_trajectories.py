"""GRPO steps on the logs of an agent that calls a tool: from messages to one packed batch, and its loss.

    python examples/agent_trajectories.py
    python examples/agent_trajectories.py --quick     # a few steps, for a test

Two rollouts answer the same prompt. Each log holds the messages of a user and a tool, an error that the framework wrote
in the role of the assistant, and answers of the model. Only the answers are trained, with their end of turn. The
rollout with reward 1 becomes more likely, and the other one less.

The tokenizer stands for one of transformers: its tokens are bytes. The model knows nothing but the token before, so
that no attention has to be kept apart at the ends of rows. A transformer takes ``cu_seqlens`` or ``position_ids`` for
that.
"""

import sys

import torch
from torch import nn

import rlkernels as rlk
from rlkernels.trajectories import from_openmanus, token_batch, token_rows

VOCAB, WIDTH = 128, 32


class Bytes:
    """A tokenizer whose tokens are bytes, with a chat template of one line per message."""

    eos_token = "\x03"

    def apply_chat_template(self, messages, add_generation_prompt, **options):
        turns = "".join(f"{m['role']}: {m['content']}{self.eos_token}\n" for m in messages)
        return turns + "assistant: " * add_generation_prompt

    def encode(self, text, **options):
        return list(text.encode("ascii"))


def log(answer):
    """The memory of an agent that looks something up, fails once, and answers."""
    return [
        {"role": "user", "content": "what is the capital of France?"},
        {"role": "assistant", "content": "search(capital of France)"},
        {"role": "tool", "content": "Paris is the capital of France."},
        {"role": "assistant", "content": "Error encountered while processing: timeout"},
        {"role": "assistant", "content": answer},
    ]


def main(quick=False):
    torch.manual_seed(0)
    steps = 3 if quick else 20
    tokenizer = Bytes()
    rollouts = [
        from_openmanus(log(answer), reward=reward, rollout_id=i)
        for i, (answer, reward) in enumerate([("Paris", 1.0), ("Lyon", 0.0)])
    ]
    rows = [row for rollout in rollouts for row in token_rows(rollout, tokenizer)]
    batch = token_batch(rows, layout="packed", pad_to=8)
    text = bytes(batch.targets[batch.mask].tolist()).decode()
    print("trained:", text.replace(tokenizer.eos_token, " | "))

    advantages = batch.of_rollouts(rlk.group_advantages(batch.row_rewards, batch.group_ids))
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)

    def logprobs():
        return rlk.token_logprobs(model(batch.input_ids), batch.targets)

    def of_rollouts():
        return rlk.sequence_sums(logprobs().detach(), batch.mask, batch.cu_seqlens)

    old, before = logprobs().detach(), of_rollouts()
    for _ in range(steps):
        loss = rlk.policy_loss(
            logprobs(),
            old,
            advantages,
            batch.mask,
            aggregation="rollout-mean",
            normalizers={"rollout_ids": batch.rollout_ids},
            cu_seqlens=batch.cu_seqlens,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    better, worse = (of_rollouts() - before).tolist()
    print(
        f"log-probability of the rollouts after {steps} steps: {better:+.2f} with reward 1, {worse:+.2f} with reward 0"
    )
    if not quick and not better > 1 > -1 > worse:
        sys.exit("not learned: expected a gain above 1 with reward 1, and a loss above 1 with reward 0")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
