"""Mistakes in the fused head: which rows enter which product, what is summed over chunks and ranks, and what a bound fills up."""
from mutant import Mutant

ROWS, POLICY, PREFERENCES, CHUNKS, CONTRACT, WAITS = (
    f"tests/test_{name}.py" for name in ("linear_rows", "linear_policy", "linear_preferences", "linear_chunks", "linear_contract", "host_waits"))
ROUNDED = "tests/test_linear_rounded.py"
GROUP = "tests/test_parallel.py::test_on_every_rank"


def _m(name, file, old, new, *tests):
    return Mutant(name, f"rlkernels/{file}", old, new, tests)


MUTANTS = (
    # rows
    _m("a product of odd rows", "chunks.py", "return -(-rows // ROWS) * ROWS", "return rows", ROWS),
    _m("dead rows of a bound enter as they are", "chunks.py", "return found if self.dead is None else found.masked_fill_(",
       "return found if True else (", ROWS),
    _m("a bound too small passes", "chunks.py", "enough = live.sum() <= bound", "enough = live.sum() <= 2 * bound", "tests/test_linear_bad_inputs.py"),
    _m("rows that may move come last", "chunks.py", "torch.where(moving, 0, torch.where(live, 1, 2))", "torch.where(moving, 1, torch.where(live, 0, 2))", ROWS),
    _m("a row with a KL term stands still", "sweep.py", "if self.kl is not None or self.entropy_weight is not None or not still",
       "if self.entropy_weight is not None or not still", ROWS),
    _m("a row that only its entropy moves is taken out", "sweep.py", "dlogp != 0 if entropy_weight is None else (dlogp != 0) | (entropy_weight != 0))",
       "dlogp != 0)", POLICY),
    _m("rows close up without their hidden states", "sweep.py", "hidden, dlogits, x = hidden[kept], dlogits[:len(rows)], x[:len(rows)]",
       "dlogits, x = dlogits[:len(rows)], x[:len(rows)]", POLICY),
    _m("rows close up without their logits", "sweep.py", "for moved in {id(x): x, id(dlogits): dlogits}.values():", "for moved in (dlogits,):", POLICY, ROWS),
    # units
    _m("the rows that fill a bound count for the last sequence", "linear_losses.py", "if rows.dead is None else ~rows.dead", "", POLICY),
    _m("the rows that fill a bound belong to no sequence", "units.py",
       "return torch.cat([self.offsets[:-1], self.offsets.new_full((1,), len(self.found))])", "return self.offsets", POLICY, PREFERENCES),
    _m("a chunk's units begin where the batch does", "units.py", "return offsets - offsets[:1]", "return offsets", POLICY, PREFERENCES),
    _m("bincount waits for the device", "units.py", "return order, torch.searchsorted(ordered, torch.arange(count + 1, device=sequence.device))",
       "return order, torch.cat([ordered.new_zeros(1), torch.bincount(ordered, minlength=count + 1)[:count].cumsum(0)])", WAITS),
    _m("a second sweep takes the logits of the last part", "sweep.py", "            kept = None\n", "",
       POLICY, PREFERENCES),
    _m("rejected answers first", "linear_preferences.py", "sums[0::2], sums[1::2], *part", "sums[1::2], sums[0::2], *part", PREFERENCES),
    _m("a chunk's mean for its share", "linear_preferences.py", "checked.part(first, last)).sum() / max(pairs, 1)", "checked.part(first, last)).mean()",
       PREFERENCES),
    _m("sequences that cannot move make their gradient", "units.py", "return self.moving is None or first < self.moving", "return True", ROWS),
    _m("sequences that move stand still", "units.py", "moves = segment_reduce((~still)[order].double(), offsets) > 0",
       "moves = segment_reduce(still[order].double(), offsets) == 0", ROWS),
    # the way back
    _m("the scale of the logits is forgotten on the way back", "head.py", "            d.mul_(self.scale)\n", "            pass\n", POLICY),
    _m("the slope of the softcap", "head.py", ".square_().neg_().add_(1.0))", ".neg_().add_(1.0))", POLICY),
    _m("the bias of the first chunk", "head.py", "dbias.add_(d.sum(0, dtype=dbias.dtype))", "dbias.copy_(d.sum(0, dtype=dbias.dtype))", POLICY),
    _m("every chunk fills the weight's gradient", "linear.py", "        self.first = False\n", "", POLICY, CHUNKS),
    _m("the hidden states' gradient is rounded before it is scaled", "linear.py", "real if wide else hidden.dtype", "hidden.dtype", CONTRACT, POLICY),
    _m("a gradient is given away twice", "registry.py", "        ctx.held = None\n        return None, None, None", "        return None, None, None",
       CONTRACT),
    _m("the upstream gradient is forgotten", "registry.py", "        gradient.mul_(upstream)\n", "        gradient.mul_(1.0)\n", POLICY),
    _m("fp16 is rounded as it comes", "sweep.py", "if self.chunk.products.gradient_dtype == torch.float16 else None", "if False else None", ROUNDED),
    _m("a gradient that was brought near 1 stays there", "sweep.py", "                    gradient.div_(self.scale)\n", "                    pass\n", ROUNDED),
    _m("a loss that was brought near 1 stays there", "sweep.py", "loss if sweep.scale is None else loss / sweep.scale", "loss",
       ROUNDED),
    _m("a gradient is rounded before the scale of the logits", "head.py", "plain = softcap is None and logit_scale == 1.0 and", "plain = softcap is None and",
       ROUNDED),
    # the shard
    _m("the gradient of hidden states stays one rank's", "linear.py",
       "            torch.distributed.all_reduce(self.hidden, group=self.shard.process_group())\n", "            pass\n", GROUP),
    _m("targets of other shards point to the last column", "parallel.py", "targets - shard.start, shard.columns)), here",
       "targets - shard.start, shard.columns - 1)), here", GROUP),
)
