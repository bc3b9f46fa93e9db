"""DPO from hidden states: pairs of answers, a reference, and no logits in memory.

    pip install transformers
    python examples/dpo.py
    python examples/dpo.py --quick     # a few steps, which learn nothing yet

The prompt is a bag of words, and the answer repeats it. People prefer answers in the order of the alphabet, and the
supervised model writes the words in any order. So each pair has one answer in order and one out of order, of the same
words. DPO widens the margin between the two kinds beyond that of the reference, without a reward model and without
sampling.

A margin also widens where both kinds become less likely, and the policy then writes a third kind. The term ``"sft"``,
with the weight SFT, keeps the chosen answers likely. Set SFT to 0 and watch the last column: the accuracy is as good,
but few of the sampled answers are in order.

``linear_dpo_loss`` takes the hidden states of both answers and the matrix of the head. It multiplies a chunk of tokens
at a time, and only tokens of answers: here a third of them are those of prompts.
"""

import copy
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rlkernels as rlk

WORDS, LENGTH, PAIRS, BETA, SFT = 26, 5, 64, 0.1, 0.2
SEPARATOR, END = WORDS, WORDS + 1


def model():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS + 2, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
    )


def shuffled(words):
    """Returns each row of words in an order of its own."""
    return words.gather(1, torch.rand(words.shape).argsort(1))


def sequences(words, answers):
    """Puts prompts, separators, answers and ends together; returns the tokens and the mask of the targets."""
    mark = torch.ones(len(words), 1, dtype=torch.long)
    tokens = torch.cat([words, SEPARATOR * mark, answers, END * mark], 1)
    # Position t scores token t + 1, so the separator is the first position whose target is a token of the answer.
    mask = (torch.arange(tokens.shape[1] - 1) >= LENGTH).expand(len(words), -1)
    return tokens, mask


def pairs(count):
    """Draws pairs, [2 count, L]: the chosen answers first, then the rejected ones in the same order."""
    words = torch.rand(count, WORDS).argsort(1)[:, :LENGTH]
    chosen = words.sort(1).values
    rejected = shuffled(words)
    # A shuffle that is in order by chance is no rejected answer.
    rejected = torch.where((rejected == chosen).all(1, keepdim=True), chosen.flip(1), rejected)
    return sequences(torch.cat([words, words]), torch.cat([chosen, rejected]))


def hidden_of(policy, tokens):
    return policy.model(tokens[:, :-1]).last_hidden_state


def loss_of(policy, reference, tokens, mask):
    """Returns the DPO loss of pairs, and its metrics."""
    targets = tokens[:, 1:]
    with torch.no_grad():
        logprobs = rlk.linear_token_logprobs(hidden_of(reference, tokens), reference.lm_head.weight, targets)
        ref_chosen, ref_rejected = rlk.sequence_sums(logprobs, mask).chunk(2)
    return rlk.linear_dpo_loss(
        hidden_of(policy, tokens),
        policy.lm_head.weight,
        targets,
        mask,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        beta=BETA,
        loss_type=("sigmoid", "sft"),
        loss_weights=(1.0, SFT),
        return_metrics=True,
    )


@torch.no_grad()
def in_order(policy, count=200):
    """Returns the share of sampled answers that hold the words of their prompt in order."""
    words = torch.rand(count, WORDS).argsort(1)[:, :LENGTH]
    tokens = torch.cat([words, torch.full((count, 1), SEPARATOR)], 1)
    for _ in range(LENGTH):
        tokens = torch.cat([tokens, torch.multinomial(policy(tokens).logits[:, -1].softmax(-1), 1)], 1)
    return (tokens[:, LENGTH + 1 :] == words.sort(1).values).all(1).float().mean().item()


def train(policy, steps, rate, loss_at):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(quick=False):
    torch.manual_seed(0)
    warm_up, steps = (2, 2) if quick else (800, 200)
    policy = model()

    def supervised(step):
        words = torch.rand(128, WORDS).argsort(1)[:, :LENGTH]
        tokens, mask = sequences(words, shuffled(words))
        return rlk.linear_sft_loss(hidden_of(policy, tokens), policy.lm_head.weight, tokens[:, 1:], mask)

    train(policy, warm_up, 3e-3, supervised)
    reference, held_out = copy.deepcopy(policy).requires_grad_(False), pairs(256)
    found = []

    def report(step):
        with torch.no_grad():
            loss, metrics = loss_of(policy, reference, *held_out)
        found.append((metrics["accuracy"].item(), metrics["reward_margin"].item(), in_order(policy)))
        accuracy, margin, ordered = found[-1]
        print(f"{step:4}  {loss.item():13.3f}  {accuracy:8.3f}  {margin:6.3f}  {ordered:8.3f}")

    def preference(step):
        if step % max(steps // 5, 1) == 0:
            report(step)
        return loss_of(policy, reference, *pairs(PAIRS))[0]

    print("step  held-out loss  accuracy  margin  in order")
    train(policy, steps, 3e-4, preference)
    report(steps)
    if quick:
        return
    accuracy, margin, ordered = found[-1]
    if accuracy < 0.95 or margin <= found[0][1] or ordered < 0.5:
        sys.exit("not learned: expected an accuracy of 0.95, a margin that rises, and half of the answers in order")
    print(f"learned: {ordered:.1%} of the sampled answers are in order, and {found[0][2]:.1%} were before")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
