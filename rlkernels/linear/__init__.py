"""Statistics and losses from hidden states and an lm_head, without the ``[T, V]`` logits.

The public functions are in ``token_stats``, ``policy_loss``, ``sft_loss``, ``distillation_loss``, ``preference_loss``
and ``unpaired_preference_loss``. Each of them checks its head once (``head.linear_head``) and multiplies it chunk by
chunk (``projection``). Files by layer, lowest first; a file imports from the layers to its left:

    matmul, memory, chunking, rank_agreement < vocab_parallel, chunk_plan < head < projection < gradients
    < sequence_chunks < chunked_loss < token_loss, token_stats < answers, sequence_loss, distillation_loss
    < exact_kl < policy_loss, sft_loss, preference_loss, unpaired_preference_loss
"""
