"""The operations of reward models in the golden files, as calls of the public functions; see golden_ops."""

import torch
from golden_adapter import expect

import rlkernels as rlk


def pairwise_reward_loss(x, p):
    loss, metrics = rlk.pairwise_reward_loss(
        x["chosen"],
        x["rejected"],
        margin=x.get("margin"),
        center_coef=p.pop("center_coef"),
        kind=p.pop("kind"),
        reduction=p.pop("aggregation"),
        return_metrics=True,
    )
    return {"loss": loss, "accuracy": metrics["accuracy"]}


def divergence_span_loss(x, p):
    loss, chosen, rejected = rlk.span_reward_loss(
        x["rewards"], x["input_ids"], p.pop("pad_id"), num_padding_at_beginning=p.pop("num_padding_at_beginning")
    )
    return {"loss": loss, "chosen_end_scores": chosen, "rejected_end_scores": rejected}


def rank_list_loss(x, p):
    aggregation = p.pop("aggregation").replace("_", "-")
    return {
        "loss": rlk.rank_list_loss(x["scores"], x["offsets"].long().diff(), kind=p.pop("kind"), aggregation=aggregation)
    }


def value_head_pairwise(x, p):
    expect(p.pop("layout") == "padded", "layout")
    scores, pairs = (
        rlk.reward_scores(x["hidden"], x["weight"], attention_mask=x["attention_mask"], bias=x.get("bias")),
        p.pop("num_pairs"),
    )
    return {"scores": scores, "loss": rlk.pairwise_reward_loss(scores[:pairs], scores[pairs:])}


def end_token_index(x, p):
    if "seq_lens" in x:
        ends = x["seq_lens"].cumsum(0)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        return {"index": rlk.end_scores(torch.zeros(int(ends[-1])), cu_seqlens=offsets)[1]}
    mask = x["attention_mask"]
    return {"index": rlk.end_scores(torch.zeros(mask.shape), mask)[1]}


def end_score(x, p):
    scores, ends = rlk.end_scores(
        x["values"], input_ids=x["input_ids"], pad_id=p.pop("pad_id"), prompt_length=p.pop("prompt_length")
    )
    return {"index": ends, "score": scores}


def reward_normalizer(x, p):
    normalizer = rlk.RewardNormalizer(unbiased=p.pop("unbiased"), std_min=p.pop("std_min"))
    normalizer.update(x["rewards"])
    return {"mean": normalizer.mean, "std": normalizer.std, "normalized": normalizer.normalize(x["rewards"])}


def prm_loss(x, p):
    soft, labels = p.pop("soft"), x["labels"]
    loss, metrics = rlk.process_reward_loss(
        x["logits"],
        labels.to(x["logits"].dtype) if soft else labels.long(),
        x["input_ids"],
        p.pop("placeholder_id"),
        reward_token_ids=p.pop("reward_token_ids"),
        ignore_index=p.pop("ignore_index"),
        return_metrics=True,
    )
    return {"loss": loss, "accuracy": metrics["accuracy"]}


def step_score_reduction(x, p):
    offsets = x["offsets"].long()
    return {kind: rlk.solution_scores(x["step_scores"], kind=kind, cu_seqlens=offsets) for kind in p.pop("kinds")}


ADAPTERS = (
    pairwise_reward_loss,
    divergence_span_loss,
    rank_list_loss,
    value_head_pairwise,
    end_token_index,
    end_score,
    reward_normalizer,
    prm_loss,
    step_score_reduction,
)
