"""A byte-level BPE tokenizer, a small Llama and its reward twin, made from nothing and saved to a directory."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``size`` entries: every string can be encoded, so there is no unknown token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2], padding_side="left"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def build(
    directory: Path, tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int, layers: int
) -> tuple[str, str, int]:
    """Writes a policy and a reward model with random weights, and the tokenizer beside each.

    They are used through their paths: TRL opens ``config._name_or_path`` again for reward models and implicit
    references.

    Returns:
        ``(policy path, reward path, number of parameters of the policy)``.
    """
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    paths, sizes = [], []
    for name, architecture, extra in (
        ("policy", LlamaForCausalLM, {}),
        ("reward", LlamaForSequenceClassification, {"num_labels": 1}),
    ):
        torch.manual_seed(seed)
        model = architecture(LlamaConfig(**config, **extra))
        paths.append(str(directory / name))
        sizes.append(sum(p.numel() for p in model.parameters()))
        model.save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
    return paths[0], paths[1], sizes[0]
