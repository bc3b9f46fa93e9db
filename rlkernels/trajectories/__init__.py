"""The way from the logs of agents to batches: messages with their provenance, rows of tokens, batches of both layouts.

The token ids and log-probabilities that were recorded at the call of the model are the reference. Text that is
tokenised again drifts, so the converters from text are a convenience, and ``TokenRow.mismatches`` says where they
differ. No package beside torch is imported, because the tokenizer is the caller's.
"""

from rlkernels.trajectories.batches import TokenBatch, token_batch
from rlkernels.trajectories.logs import (
    from_agent_tree,
    from_autogen,
    from_autogpt,
    from_metagpt,
    from_openai,
    from_openmanus,
    from_steps,
    search_results,
)
from rlkernels.trajectories.model import Message, Mismatch, Span, TokenRow, Trajectory
from rlkernels.trajectories.rows import token_rows

__all__ = [
    "Message",
    "Mismatch",
    "Span",
    "TokenBatch",
    "TokenRow",
    "Trajectory",
    "from_agent_tree",
    "from_autogen",
    "from_autogpt",
    "from_metagpt",
    "from_openai",
    "from_openmanus",
    "from_steps",
    "search_results",
    "token_batch",
    "token_rows",
]
