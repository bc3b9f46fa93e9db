"""Calls of the functions of reward models, for ``public_calls``, and their bad inputs, for ``bad_inputs``."""

import torch

import rlkernels


def data(shape, draw):
    """What these calls need beside the data of the others; ``shape``: that of a padded batch."""
    rows, length = shape
    return {
        "ids": torch.tensor([[3, 4, 5, 9, 9], [3, 6, 9, 7, 7], [3, 5, 5, 9, 0], [3, 6, 7, 9, 9]]),
        "span_scores": torch.randn(4, length, generator=draw),
        "soft": torch.rand(shape, generator=draw),
        "places": torch.tensor([[9, 5, 9, 9, 5], [9, 9, 5, 5, 5], [5, 9, 9, 9, 9]]),
        "reward_ids": torch.tensor([7, 30]),
        "lists": torch.full((length,), rows),
    }


def calls(rlk):
    """The calls, by their names; ``rlk``: the library, as the caller sees it."""
    return {
        "pairwise_reward_loss": lambda d: rlk.pairwise_reward_loss(
            d["pair_a"], d["pair_b"], margin=d["pair_c"], center_coef=0.1
        ),
        "pairwise_reward_loss of weights": lambda d: rlk.pairwise_reward_loss(
            d["pair_a"],
            d["pair_b"],
            margin=d["pair_c"],
            center_coef=d["number"],
            pair_weights=d["token_weights"].view(-1)[:6],
            mask=d["groups"] == 4,
            return_metrics=True,
        ),
        "pairwise_reward_loss of each pair": lambda d: rlk.pairwise_reward_loss(
            d["pair_a"], d["pair_b"], center_coef=0.1, reduction="none"
        ),
        "span_reward_loss": lambda d: rlk.span_reward_loss(
            d["span_scores"], d["ids"], 9, allow_first_difference=True, normalizers={"num_sequences": d["count"]}
        ),
        "rank_list_loss": lambda d: rlk.rank_list_loss(d["values"], mask=d["mask"], return_metrics=True),
        "rank_list_loss of lengths": lambda d: rlk.rank_list_loss(
            d["values"].view(-1), d["lists"], mask=d["mask"].view(-1), kind="sigmoid", aggregation="list-mean"
        ),
        "process_reward_loss": lambda d: rlk.process_reward_loss(
            d["logits"], d["targets"], d["places"], 9, mask=d["mask"], weights=d["token_weights"], return_metrics=True
        ),
        "process_reward_loss of a packed batch": lambda d: rlk.process_reward_loss(
            d["logits"].flatten(0, 1),
            d["soft"].view(-1),
            reward_token_ids=d["reward_ids"],
            cu_seqlens=d["cu"],
            aggregation="seq-mean-token-mean",
            normalizers={"num_sequences": d["count"]},
        ),
        "solution_scores": lambda d: rlk.solution_scores(d["soft"], d["mask"], kind="product"),
        "solution_scores of a packed batch": lambda d: rlk.solution_scores(d["soft"].view(-1), cu_seqlens=d["cu"]),
        "end_scores": lambda d: rlk.end_scores(d["values"], d["mask"])[0],
        "end_scores of ids": lambda d: rlk.end_scores(d["values"], input_ids=d["places"], pad_id=5, prompt_length=2)[0],
        "end_scores of a packed batch": lambda d: rlk.end_scores(d["values"].view(-1), cu_seqlens=d["cu"])[0],
        "reward_scores": lambda d: rlk.reward_scores(d["hidden"], d["head"], attention_mask=d["mask"]),
        "reward_scores of a packed batch": lambda d: rlk.reward_scores(
            d["hidden"].flatten(0, 1), d["head"], cu_seqlens=d["cu"], bias=d["bias"][:1]
        ),
        "reward_scores of every token": lambda d: rlk.reward_scores(
            d["hidden"], d["weight"][:2], attention_mask=d["mask"], bias=d["bias"][:2], positions="all"
        ),
    }


BAD = {
    "B46": (
        lambda: rlkernels.span_reward_loss(torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int64), 0),
        ValueError,
        "rewards has 5 rows; chosen and rejected come in pairs",
    ),
    "B47": (
        lambda: rlkernels.span_reward_loss(torch.zeros(6, 1), torch.tensor([[1], [1], [2], [1], [1], [1]]), 0),
        ValueError,
        "pair 2 differs at its first token",
    ),
    "B48 sum": (
        lambda: rlkernels.rank_list_loss(torch.zeros(10), torch.tensor([4, 5])),
        ValueError,
        "lengths sum to 9, scores has 10",
    ),
    "B48 negative": (
        lambda: rlkernels.rank_list_loss(torch.zeros(10), [12, -2]),
        ValueError,
        "lengths holds -2, expected numbers of scores, at least 0",
    ),
}
