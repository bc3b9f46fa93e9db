"""A reward or value model: any base model of transformers with a head of one number, or of several."""

import json
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from rlkernels import checks
from rlkernels.integrations.transformers.model_inputs import check_tokens
from rlkernels.losses.reward_head import reward_scores
from rlkernels.types import Mask, RewardScores, ScorePositions, TokenIds

HEAD_FILE = "reward_head.safetensors"


class RewardModel(nn.Module):
    r"""A base model and a linear head: the score of each sequence (a reward model), or of each token (a value model).

    ``score = h . w (+ b)`` by ``reward_scores``; ``h`` is the base's last hidden state, final norm included.

    Args:
        model: a base model (``AutoModel``), a ``*ForCausalLM``, whose base is taken without a copy, or a
            ``*ForSequenceClassification``, whose ``score`` is taken as the head. peft may be around the last two.
        num_labels: numbers per score.
        bias: whether the head has a bias, which begins at 0.
        positions: ``"end"`` scores the last token of each sequence, ``"all"`` every token.
        dtype: of the head; that of the base unless given. fp32 is worth it beside a bf16 base.

    A new head is drawn with standard deviation ``1 / sqrt(H + 1)``, as the reward models of "Learning to summarize from
    human feedback" (Stiennon et al., 2020) were.

    Raises:
        TypeError: an encoder-decoder, or no model of transformers.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> critic = RewardModel(LlamaModel(LlamaConfig(vocab_size=11, **sizes)), positions="all")
        >>> critic(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]])).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_labels: int = 1,
        bias: bool = False,
        positions: ScorePositions = "end",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        caller = "RewardModel"
        checks.choice(caller, "positions", positions, get_args(ScorePositions))
        num_labels = checks.positive_integer(caller, "num_labels", num_labels)
        peft = hasattr(model, "get_base_model")
        whole = model.get_base_model() if peft else model
        config = getattr(whole, "config", None)
        if config is None or not hasattr(whole, "base_model"):
            raise TypeError(f"{caller}: model must be a model of transformers, got {type(model).__name__}")
        if getattr(config, "is_encoder_decoder", False):
            raise TypeError(f"{caller}: {type(whole).__name__} is an encoder-decoder; pass a decoder")
        self.base, self.positions = whole.base_model, positions
        self._adapted = peft
        score = getattr(whole, "score", None)
        score = getattr(score, "base_layer", score)
        if isinstance(score, nn.Linear):
            self.score = score
            return
        first = next(self.base.parameters())
        width = config.get_text_config().hidden_size
        self.score = nn.Linear(width, num_labels, bias=bias, device=first.device, dtype=dtype or first.dtype)
        if not self.score.weight.is_meta:
            nn.init.normal_(self.score.weight, std=(width + 1) ** -0.5)
            if bias:
                nn.init.zeros_(self.score.bias)

    @property
    def config(self) -> Any:
        """Returns the configuration of the base."""
        return self.base.config

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Turns gradient checkpointing of the base on."""
        self.base.gradient_checkpointing_enable(**options)

    def gradient_checkpointing_disable(self) -> None:
        """Turns gradient checkpointing of the base off."""
        self.base.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: TokenIds | None = None,
        attention_mask: Mask | None = None,
        *,
        positions: ScorePositions | None = None,
        **batch: Any,
    ) -> RewardScores:
        """Computes the scores of a padded batch.

        Args:
            input_ids: ``[B, L]``; None with ``inputs_embeds`` in ``batch``.
            attention_mask: ``[B, L]``; padding on either side. Without it every sequence ends at ``L - 1``.
            positions: instead of that of the model.
            batch: further arguments of the base.

        Returns:
            ``[B]``, or ``[B, L]`` with ``"all"``, where padding scores 0; with several labels ``[..., k]``; fp32 (fp64
            for an fp64 head).

        Raises:
            ValueError, TypeError: as ``reward_scores``; a batch without a token.
        """
        named = {"input_ids": input_ids, "attention_mask": attention_mask}
        given = {name: x for name, x in named.items() if x is not None}
        check_tokens("RewardModel", {**given, **batch})
        outputs = self.base(**{"use_cache": False, "return_dict": True, **given, **batch})
        hidden: Tensor = outputs.last_hidden_state
        return reward_scores(
            hidden.to(self.score.weight.dtype),
            self.score.weight,
            bias=self.score.bias,
            attention_mask=attention_mask,
            positions=self.positions if positions is None else positions,
        )

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Saves the base as transformers does, and the head beside it in ``reward_head.safetensors``.

        Args:
            options: keywords of the base's ``save_pretrained``.

        Raises:
            TypeError: the base has adapters; save them by peft, and the head by ``state_dict``.
        """
        from safetensors.torch import save_file

        if self._adapted or hasattr(self.base, "peft_config"):
            raise TypeError(
                "RewardModel.save_pretrained: the base has adapters of peft; save them by the peft model's "
                "save_pretrained and the head by score.state_dict(), or merge them first"
            )
        folder = Path(folder)
        self.base.save_pretrained(folder, **options)
        tensors = {name: x.detach().contiguous() for name, x in self.score.state_dict().items()}
        save_file(tensors, folder / HEAD_FILE, metadata={"rlkernels": json.dumps({"positions": self.positions})})

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "RewardModel":
        """Loads what ``save_pretrained`` wrote.

        Args:
            options: keywords of ``AutoModel.from_pretrained``, such as ``dtype``. The head keeps its
                own.

        Raises:
            FileNotFoundError: the folder holds no head.
        """
        from safetensors import safe_open
        from transformers import AutoModel

        path = Path(folder) / HEAD_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"RewardModel.from_pretrained: {path} does not exist; expected a folder that "
                "RewardModel.save_pretrained wrote"
            )
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            positions = json.loads((file.metadata() or {})["rlkernels"])["positions"]
        weight = tensors["weight"]
        model = cls(
            AutoModel.from_pretrained(folder, **options),
            num_labels=weight.shape[0],
            bias="bias" in tensors,
            positions=positions,
            dtype=weight.dtype,
        )
        model.score.load_state_dict(tensors)
        return model
