"""Mistakes in the fused head: which rows enter which product, what is summed over chunks and ranks, and what a bound
fills up.
"""

from mutant import Mutant

ROWS, POLICY, PREFERENCES, CHUNKS, CONTRACT, WAITS = (
    f"test_{name}.py"
    for name in (
        "linear_row_selection",
        "linear_policy_loss",
        "linear_preference_loss",
        "linear_chunking",
        "linear_autograd",
        "host_syncs",
    )
)
ROUNDED, PLAN = "test_linear_16bit_gradient.py", "test_chunk_plan.py"
GROUP = "test_vocab_parallel.py::test_on_every_rank"


def _m(name, file, old, new, *tests):
    return Mutant(name, f"rlkernels/{file}", old, new, tests)


MUTANTS = (
    # rows
    _m("a matmul of odd rows", "linear/chunking.py", "return -(-rows // ROWS) * ROWS", "return rows", ROWS),
    _m(
        "padding rows enter as they are",
        "linear/chunking.py",
        "        return rows.masked_fill_(nothing[:, None], 0.0)\n",
        "        return rows\n",
        ROWS,
    ),
    _m(
        "a bound too small passes",
        "linear/chunking.py",
        "enough = live.sum() <= bound",
        "enough = live.sum() <= 2 * bound",
        "test_linear_bad_inputs.py",
    ),
    _m(
        "rows that may have a gradient come last",
        "linear/chunking.py",
        "torch.where(trained, 0, torch.where(live, 1, 2))",
        "torch.where(trained, 1, torch.where(live, 0, 2))",
        ROWS,
    ),
    _m(
        "a row with a KL term has no gradient",
        "linear/token_loss.py",
        "others = self.kl, self.entropy_weight, self.square_weight",
        "others = self.entropy_weight, self.square_weight",
        ROWS,
    ),
    _m(
        "a row that only its entropy moves is taken out",
        "linear/token_loss.py",
        "moves if entropy_weight is None else moves | (entropy_weight != 0)",
        "moves",
        POLICY,
    ),
    _m(
        "rows close up without their hidden states",
        "linear/chunked_loss.py",
        "hidden, dlogits, logits = hidden[kept], dlogits[: len(rows)], logits[: len(rows)]",
        "dlogits, logits = dlogits[: len(rows)], logits[: len(rows)]",
        POLICY,
    ),
    _m(
        "rows close up without their logits",
        "linear/chunked_loss.py",
        "for buffer in {id(logits): logits, id(dlogits): dlogits}.values():",
        "for buffer in (dlogits,):",
        POLICY,
        ROWS,
    ),
    # stretches
    _m(
        "the gradient of a chunk is written over one that waits",
        "linear/projection.py",
        "return self.buffers[1][self.waiting : self.waiting + logits.shape[0], : self.width]",
        "return self.buffers[1][: logits.shape[0], : self.width]",
        ROUNDED,
    ),
    _m(
        "a gradient waits where the next one has no room",
        "linear/projection.py",
        "self.waiting + self.rows <= self.kept",
        "self.waiting < self.kept",
        ROUNDED,
    ),
    _m(
        "gradients that still wait are lost to a loss",
        "linear/chunked_loss.py",
        "        self.gradients.finish(self.projection)\n",
        "",
        ROUNDED,
    ),
    _m(
        "gradients that still wait are lost to statistics",
        "linear/token_stats.py",
        "    gradients.finish(projection)\n",
        "",
        ROUNDED,
    ),
    _m(
        "a stretch takes more memory than the budget",
        "linear/chunk_plan.py",
        "(3 * limit - largest * unit) // (2 * unit) if keeps else room",
        "(3 * limit - largest * unit) // unit if keeps else room",
        PLAN,
    ),
    _m(
        "a chunk of few rows is as cheap as its rows",
        "linear/chunk_plan.py",
        "max(_weight_waves(shape) * rows, least)",
        "_weight_waves(shape) * rows",
        PLAN,
    ),
    _m(
        "a plan takes longer than full chunks",
        "linear/chunk_plan.py",
        "            if ticks(stretches, shape) <= most:\n",
        "            if stretches:\n",
        PLAN,
    ),
    _m(
        "the default budget follows a gradient that nobody wants",
        "linear/head.py",
        "trained = weight.requires_grad and torch.is_grad_enabled()",
        "trained = True",
        PLAN,
    ),
    # sequences
    _m(
        "the rows that fill a bound belong to no sequence",
        "linear/sequence_chunks.py",
        "return torch.cat([self.offsets[:-1], self.offsets.new_full((1,), len(self.selection))])",
        "return self.offsets",
        POLICY,
        PREFERENCES,
    ),
    _m(
        "a chunk's units begin where the batch does",
        "linear/sequence_chunks.py",
        "return offsets - offsets[:1]",
        "return offsets",
        POLICY,
        PREFERENCES,
    ),
    _m(
        "bincount waits for the device",
        "linear/sequence_chunks.py",
        "return order, torch.searchsorted(ordered, torch.arange(count + 1, device=sequence.device))",
        "return order, torch.cat([ordered.new_zeros(1), torch.bincount(ordered, minlength=count + "
        "1)[:count].cumsum(0)])",
        WAITS,
    ),
    _m(
        "a second pass takes the logits of the last part",
        "linear/chunked_loss.py",
        "        buffered = None\n",
        "",
        POLICY,
        PREFERENCES,
    ),
    _m(
        "rejected answers first",
        "linear/preference_loss.py",
        "logps[0::2], logps[1::2], *references",
        "logps[1::2], logps[0::2], *references",
        PREFERENCES,
    ),
    _m(
        "a chunk's mean for its share",
        "linear/preference_loss.py",
        "losses.sum() / options.num_pairs",
        "losses.mean()",
        PREFERENCES,
    ),
    _m(
        "zero-gradient sequences make their gradient",
        "linear/sequence_chunks.py",
        "return self.trained is None or first < self.trained",
        "return True",
        ROWS,
    ),
    _m(
        "sequences with a gradient make none",
        "linear/sequence_chunks.py",
        "trained = segment_reduce((~zero_gradient)[order].double(), offsets) > 0",
        "trained = segment_reduce(zero_gradient[order].double(), offsets) == 0",
        ROWS,
    ),
    # the way back
    _m(
        "the scale of the logits is forgotten on the way back",
        "linear/projection.py",
        "            dlogits.mul_(self.scale)\n",
        "            pass\n",
        POLICY,
    ),
    _m(
        "the slope of the softcap", "linear/projection.py", ".square_().neg_().add_(1.0))", ".neg_().add_(1.0))", POLICY
    ),
    _m(
        "the bias of the first chunk",
        "linear/projection.py",
        "dbias.add_(dlogits.sum(0, dtype=dbias.dtype))",
        "dbias.copy_(dlogits.sum(0, dtype=dbias.dtype))",
        POLICY,
    ),
    _m(
        "every chunk fills the weight's gradient",
        "linear/gradients.py",
        "        self.first = False\n",
        "",
        POLICY,
        CHUNKS,
    ),
    _m(
        "the hidden states' gradient is rounded before it is scaled",
        "linear/gradients.py",
        "real if wide else hidden.dtype",
        "hidden.dtype",
        CONTRACT,
        POLICY,
    ),
    _m(
        "a gradient is given away twice",
        "ops/loss_with_gradients.py",
        "        ctx.held = None\n        return (",
        "        return (",
        CONTRACT,
    ),
    _m(
        "the upstream gradient is forgotten",
        "ops/loss_with_gradients.py",
        "        gradient.mul_(upstream)\n",
        "        gradient.mul_(1.0)\n",
        POLICY,
    ),
    _m("fp16 is rounded as it comes", "linear/chunked_loss.py", "if narrow else None", "if False else None", ROUNDED),
    _m(
        "a gradient that was brought near 1 stays there",
        "linear/chunked_loss.py",
        "                    gradient.div_(self.scale)\n",
        "                    pass\n",
        ROUNDED,
    ),
    _m(
        "a loss that was brought near 1 stays there",
        "linear/token_loss.py",
        "of_rows.loss if loop.scale is None else of_rows.loss / loop.scale",
        "of_rows.loss",
        ROUNDED,
    ),
    _m(
        "a gradient is rounded before the scale of the logits",
        "linear/projection.py",
        "unchanged = head.softcap is None and head.logit_scale == 1.0 and",
        "unchanged = head.softcap is None and",
        ROUNDED,
    ),
    # the shard
    _m(
        "the gradient of hidden states stays one rank's",
        "linear/gradients.py",
        "            torch.distributed.all_reduce(self.hidden, group=self.head.shard.process_group())\n",
        "            pass\n",
        GROUP,
    ),
    _m(
        "targets of other shards point to the last column",
        "linear/vocab_parallel.py",
        "targets - shard.start, shard.columns)",
        "targets - shard.start, shard.columns - 1)",
        GROUP,
    ),
    _m(
        "ids of a teacher on other shards have the gradient of a column of this one",
        "linear/vocab_parallel.py",
        "ids - shard.start, shard.columns)",
        "ids - shard.start, shard.columns - 1)",
        GROUP,
    ),
    _m(
        "the logits at a teacher's ids stay one rank's",
        "linear/vocab_parallel.py",
        "return all_gather(own, group).amax(0)",
        "return own",
        GROUP,
    ),
)
