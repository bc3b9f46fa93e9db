"""The data model of agent trajectories: messages with their provenance, and rows of tokens."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from rlkernels.checks import names, numbers
from rlkernels.types import Provenance

PROVENANCES = get_args(Provenance)


@dataclass(frozen=True)
class Message:
    """A message of a trajectory.

    Its provenance says who wrote it, and its role says only how the model reads it. Tokens of provenance ``"model"``
    are trained; ``"framework"`` marks text that an agent framework wrote, such as an error in the role of the
    assistant; ``"environment"`` marks all other text.

    ``tool_calls`` are those of OpenAI's messages. ``prompt_ids`` and ``token_ids`` are the ids of the prompt and of the
    answer as they were recorded at the call of the model, ``logprobs`` the log-probabilities of the answer under the
    rollout engine. ``ended`` is False where the answer was cut before its end of turn. A ``reward`` belongs to the last
    sampled token up to the end of the message.

    Raises:
        ValueError: unknown ``provenance``; recorded numbers of a message that the model did not write; other numbers of
            ``logprobs`` and ``token_ids``; an id below 0; a ``reward`` that is not finite.

    Example:
        >>> Message("assistant", "Error: timeout", "framework").provenance
        'framework'
    """

    role: str
    content: str | None = None
    provenance: Provenance = "environment"
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    ended: bool = True
    reward: float | None = None

    def __post_init__(self) -> None:
        names.choice("Message", "provenance", self.provenance, PROVENANCES)
        if not isinstance(self.role, str):
            raise TypeError(f"Message: role must be str, got {type(self.role).__name__}")
        if self.content is not None and not isinstance(self.content, str):
            raise TypeError(
                f"Message: content must be str or None, got {type(self.content).__name__}; only text has a template, "
                "so join the parts that are text"
            )
        for name in ("prompt_ids", "token_ids"):
            object.__setattr__(self, name, _ids("Message", name, getattr(self, name)))
        object.__setattr__(self, "tool_calls", tuple(self.tool_calls or ()))
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", tuple(numbers.real("Message", "logprobs", x) for x in self.logprobs))
        if self.provenance != "model":
            for name in ("prompt_ids", "token_ids", "logprobs"):
                if getattr(self, name) is not None:
                    raise ValueError(f"Message: {name} is recorded, but the provenance is {self.provenance!r}")
        given = (self.logprobs, self.token_ids)
        if None not in given and len(self.logprobs or ()) != len(self.token_ids or ()):
            counts = [len(x or ()) for x in given]
            raise ValueError(f"Message: {counts[0]} logprobs of {counts[1]} token_ids, expected one of each")
        if self.reward is not None:
            object.__setattr__(self, "reward", numbers.finite("Message", "reward", self.reward))

    def for_template(self) -> dict[str, Any]:
        """Returns the message as a chat template takes it.

        Arguments of tool calls that are JSON of an object become a dict, because templates print them as JSON.
        """
        found: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            found["tool_calls"] = [_parsed(call) for call in self.tool_calls]
        for key, x in (("tool_call_id", self.tool_call_id), ("name", self.name), ("reasoning_content", self.reasoning)):
            if x is not None:
                found[key] = x
        return found


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tool call whose arguments are a dict where their text is JSON of one."""
    found = dict(call)
    function = found.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return found
        if isinstance(arguments, dict):
            found["function"] = {**function, "arguments": arguments}
    return found


def _ids(caller: str, name: str, x: Iterable[int] | None) -> tuple[int, ...] | None:
    if x is None:
        return None
    ids = tuple(numbers.integer(caller, name, i) for i in x)
    if any(i < 0 for i in ids):  # because -100 would be a target that nobody scores
        raise ValueError(f"{caller}: {name} must not be negative, got {min(ids)}")
    return ids


@dataclass(frozen=True)
class Trajectory:
    """The messages that one agent of a rollout saw and wrote, in order.

    A rollout may have several trajectories, such as those of a supervisor and its workers. They share ``rollout_id``
    and ``reward``. Rollouts that answer the same prompt share ``group_id``. A ``reward`` of None or NaN could not be
    scored.

    Raises:
        TypeError: ``messages`` holds something else than ``Message``; an id is no integer.

    Example:
        >>> Trajectory([Message("user", "2 + 2?"), Message("assistant", "4", "model")], reward=1.0).messages[1].role
        'assistant'
    """

    messages: tuple[Message, ...]
    reward: float | None = None
    group_id: int = 0
    rollout_id: int = 0
    agent: str | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        for x in self.messages:
            if not isinstance(x, Message):
                raise TypeError(f"Trajectory: messages holds a {type(x).__name__}, expected Message")
        for name in ("group_id", "rollout_id"):
            object.__setattr__(self, name, numbers.integer("Trajectory", name, getattr(self, name)))
        if self.reward is not None:
            object.__setattr__(self, "reward", numbers.real("Trajectory", "reward", self.reward))
        if self.tools is not None:
            object.__setattr__(self, "tools", tuple(self.tools))


@dataclass(frozen=True)
class Span:
    """The tokens ``[start, end)`` of a row that the model wrote, or that stand between two such spans.

    ``message``: the index of the message that was sampled; of other spans, that of the message before which they end.

    Example:
        >>> Span(0, 4, 1, "environment").end
        4
    """

    start: int
    end: int
    message: int
    provenance: Provenance


@dataclass(frozen=True)
class Mismatch:
    """A place where text that was tokenised again has other ids than those recorded, which are the ones that count.

    ``part``: ``"prompt"`` or ``"answer"`` of the message; ``token``: the index of the first id that differs within it.
    An id of None lies behind the end.

    Example:
        >>> Mismatch(2, "answer", 1, 17, 4).token
        1
    """

    message: int
    part: str
    token: int
    recorded: int | None
    tokenised: int | None


@dataclass(frozen=True)
class TokenRow:
    """The tokens of a row, before the shift that turns them into targets.

    ``sampled``, ``logprobs`` and ``rewards`` have an entry per token: whether the model wrote it, its log-probability
    under the rollout engine (NaN where there is none), its reward.

    Example:
        >>> TokenRow((5, 6), (False, True), (math.nan, -0.5), (0.0, 0.0), ()).token_ids
        (5, 6)
    """

    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    rewards: tuple[float, ...]
    spans: tuple[Span, ...]
    mismatches: tuple[Mismatch, ...] = ()
    reward: float | None = None
    group_id: int = 0
    rollout_id: int = 0
    agent: str | None = None

    def __post_init__(self) -> None:
        count = len(self.token_ids)
        for name in ("sampled", "logprobs", "rewards"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"TokenRow: {name} has {len(getattr(self, name))} entries, expected {count}")


def is_scored(reward: float | None) -> bool:
    """Tells whether a reward is a number."""
    return reward is not None and not math.isnan(reward)
