"""Mistakes of a user, each on a line that names a part of what a type checker says about it."""

import torch

import rlkernels as rlk

x = torch.zeros(2, 3)
ids = torch.zeros(2, 3, dtype=torch.int64)

rlk.token_weights(x, "token_mean")  # error: expected "Literal['token-mean'
rlk.aggregate(x, None, "seq-mean-token-mean", num_sequence=2)  # error: Unexpected keyword argument "num_sequence"
rlk.policy_loss(x, x, x, ratio_level="sentence")  # error: No overload variant of "policy_loss"
rlk.policy_loss(x, x, x, kl_coef="0.1")  # error: No overload variant of "policy_loss"
rlk.policy_loss(x, x, x, [[1, 1, 0], [1, 0, 0]])  # error: "Tensor", "Tensor", "Tensor", "list[list[int]]"
loss = rlk.value_loss(x, x, x, return_metrics=True)
loss.backward()  # error: "tuple[Tensor, dict[str, Tensor]]" has no attribute "backward"
rlk.dpo_loss(x[:, 0], x[:, 1], loss_type="sigmod")  # error: No overload variant of "dpo_loss"
rlk.sft_loss(x, ids, normalizers={"horizn": 3})  # error: No overload variant of "sft_loss"
rlk.gae(x, x, masked="skipped")  # error: expected "Literal['skip', 'zero', 'none']"
rlk.group_advantages(x[:, 0], ids[:, 0], baseline="rloo")  # error: expected "Literal['mean'
rlk.token_stats(x, ids, outputs="entropy")  # error: Argument "outputs" to "token_stats" has incompatible type "str"
rlk.token_stats(x, ids).kl.sum()  # error: has no attribute "sum"
rlk.use_backend("gpu")  # error: expected "Literal['eager', 'cpu', 'triton', 'cuda']"
rlk.available_backends()["missing"]  # error: has no key "missing"
