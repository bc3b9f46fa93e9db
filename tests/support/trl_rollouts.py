"""Rollouts for TRL's trainers that come from no model: an environment's turns under GRPO, and AsyncGRPO's worker.

All of them are drawn at random from seeds, so that two runs of a trainer see the same.
"""

import queue
import random
from types import SimpleNamespace

import numpy as np
import torch


def _tokens(draw, count):
    return [draw.randrange(4, 97) for _ in range(count)]


def environment(prompts, trainer):
    """A ``rollout_func`` of TRL: six tokens of the model, three of a tool, two of the model.

    ``env_mask`` says which; TRL makes its mask of tools of it.
    """
    draw = random.Random(trainer.state.global_step)
    tokenizer = trainer.processing_class
    completions = [_tokens(draw, 11) for _ in prompts]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completions,
        "logprobs": [[-4.5 + 0.1 * draw.random() for _ in ids] for ids in completions],
        "env_mask": [[1] * 6 + [0] * 3 + [1] * 2 for _ in prompts],
    }


def attention(q, k, v, ends_q, ends_k, *_, softmax_scale, **options):
    """``flash_attn_varlen_func`` in plain torch: causal, the last query at the last key of each segment."""
    out, groups = [], q.shape[1] // k.shape[1]
    for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        query, key, value = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(int((d - c) - (b - a)))
        key, value = (x.repeat_interleave(groups, 0) for x in (key, value))
        out.append(torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=softmax_scale))
    return torch.cat(out, 1).transpose(0, 1)


def without_a_gpu():
    """Gives AsyncGRPO what it takes from a GPU: attention, whose kernel it fetches from the Hub, and, for its metric of
    utilisation, the speed of the device.
    """
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    async_grpo_trainer.get_peak_flops_per_device = lambda *_: 1e12
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention)


class Worker:
    """AsyncGRPO's ``rollout_worker``: groups of four answers, of which three tokens are those of a tool."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()

    def start(self):
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        draw = random.Random(5)
        for number in range(48):
            prompt, completion = _tokens(draw, 5), _tokens(draw, 11)
            trained = np.array([0] * 5 + [1] * 6 + [0] * 3 + [1] * 2)
            self.rollout_buffer.put_nowait(
                RolloutSample(
                    prompt=[{"role": "user", "content": ""}],
                    completion=[{"role": "assistant", "content": ""}],
                    input_ids=np.array(prompt + completion),
                    completion_mask=trained,
                    # About those of an untrained model of 97 words, so that some ratios are clipped and some are not.
                    old_log_probs=np.array([-4.57 + 0.5 * (draw.random() - 0.5) for _ in trained], dtype=np.float32),
                    advantage=draw.choice([-1.3, -0.4, 0.5, 1.2]),
                    model_version=0,
                    group_id=number // 4,
                    metrics={},
                )
            )

    def stop(self):
        pass

    def update_model_version(self, model_version):
        pass

    def check_health(self, stale_after_s):
        raise RuntimeError("the rollouts are used up")


class WeightTransfer:
    """AsyncGRPO's ``weight_transfer`` to an engine that is not there."""

    def init_weight_transfer(self):
        pass

    def pause(self):
        pass

    def send_weights(self, iterator):
        for _ in iterator:
            pass

    def resume(self):
        pass

    def destroy(self):
        pass
