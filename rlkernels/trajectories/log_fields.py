"""The fields of a message in a log: who wrote it, its text, its recorded numbers."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rlkernels.checks import names, numbers
from rlkernels.trajectories.model import PROVENANCES, Message

Log = Sequence[Mapping[str, Any]]
Sampled = Callable[[Mapping[str, Any], int], bool] | Collection[int] | None

MARKS = "provenance", "sampled", "token_ids", "logprobs"
"""The keys of a message that say who wrote it. The first two are explicit and count before the other two."""

NOT_OF_THE_MODEL = "system", "developer", "user", "tool", "function"
"""The roles in which a model writes only where an explicit mark says so."""


def checked_log(caller: str, messages: Log) -> Log:
    """Checks that a log is a list of dicts."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"{caller}: expected a list of dicts, got {type(messages).__name__}")
    for index, m in enumerate(messages):
        if not isinstance(m, Mapping):
            raise TypeError(f"{caller}: entry {index} must be a dict, got {type(m).__name__}; call to_dict() first")
    return messages


def is_marked(caller: str, m: Mapping[str, Any], index: int) -> bool:
    """Tells whether a message says that the model wrote it."""
    if m.get("provenance") is not None:
        names.choice(caller, f"provenance of message {index}", m["provenance"], PROVENANCES)
        return bool(m["provenance"] == "model")
    if m.get("sampled") is not None:
        return bool(m["sampled"])
    recorded = [key for key in ("token_ids", "logprobs") if m.get(key) is not None]
    if recorded and m.get("role") in NOT_OF_THE_MODEL:
        raise ValueError(
            f"{caller}: message {index} has {recorded[0]}, which mark a text of the model, but the role {m['role']!r}; "
            'take them out, or say who wrote it with "sampled"'
        )
    return bool(recorded)


def says_who(m: Mapping[str, Any]) -> bool:
    """Tells whether a message says who wrote it, the model or not."""
    return any(m.get(key) is not None for key in MARKS)


def choice_of(caller: str, log: Log, sampled: Sampled) -> Callable[[Mapping[str, Any], int], bool] | None:
    """Returns the function that tells whether a message was sampled, None where the caller does not say it."""
    if sampled is None or callable(sampled):
        return sampled
    if isinstance(sampled, (str, bytes, Mapping, bool)) or not hasattr(sampled, "__iter__"):
        raise TypeError(
            f"{caller}: sampled must be indices of messages, or a function of a message and its index, got "
            f"{type(sampled).__name__}"
        )
    indices = {numbers.integer(caller, "sampled", x) for x in sampled}
    for x in sorted(indices):
        if not 0 <= x < len(log):
            raise ValueError(f"{caller}: sampled holds the index {x}, expected those of {len(log)} messages, from 0 on")
    return lambda m, index: index in indices


def written_by_model(caller: str, log: Log, sampled: Sampled, own: Sequence[bool]) -> list[bool]:
    """Tells for each message whether the model wrote it; ``own``: whether it may be of the agent that is trained."""
    chosen = choice_of(caller, log, sampled)
    if chosen is not None:
        return [own[index] and bool(chosen(m, index)) for index, m in enumerate(log)]
    unmarked = [index for index, m in enumerate(log) if own[index] and m.get("role") == "assistant"]
    if unmarked and not any(says_who(m) for index, m in enumerate(log) if own[index]):
        raise ValueError(
            f"{caller}: nothing says who wrote the messages {unmarked} of the assistant, since a framework writes some "
            "in that role; pass sampled=, or record token_ids"
        )
    return [own[index] and is_marked(caller, m, index) for index, m in enumerate(log)]


def message_of(
    caller: str, m: Mapping[str, Any], index: int, role: str, provenance: Any, name: str | None = None
) -> Message:
    """Makes a message of a dict with the keys of OpenAI."""
    recorded = provenance == "model"
    return Message(
        role,
        text_of(caller, m.get("content"), index),
        provenance,
        tuple(m.get("tool_calls") or ()),
        m.get("tool_call_id"),
        name or m.get("name"),
        m.get("reasoning_content") or m.get("reasoning"),
        recorded_numbers(m.get("prompt_token_ids")) if recorded else None,
        recorded_numbers(m.get("token_ids")) if recorded else None,
        logprobs_of(m.get("logprobs")) if recorded else None,
        bool(m.get("ended", m.get("finish_reason") != "length")),
        m.get("reward"),
    )


def text_of(caller: str, content: Any, index: int) -> str | None:
    """Returns the text of a content that may be in parts."""
    if isinstance(content, Mapping):  # of a StructuredMessage
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, (list, tuple)):
        parts: list[str] = []
        for p in content:
            part = p.get("text") if isinstance(p, Mapping) else p
            if not isinstance(part, str):
                raise ValueError(
                    f"{caller}: message {index} holds a part that is not text; take it out, or put a text in its place"
                )
            parts.append(part)
        return "".join(parts)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{caller}: message {index} has a content of type {type(content).__name__}, expected text")
    return content


def recorded_numbers(x: Any) -> Any:
    """Returns recorded numbers, which metadata of text holds as JSON."""
    return json.loads(x) if isinstance(x, str) else x


def logprobs_of(x: Any) -> Any:
    """Returns log-probabilities per token: a list, or the form of OpenAI's choices."""
    x = recorded_numbers(x)
    if isinstance(x, Mapping):
        x = x.get("content")
    if x is None:
        return None
    found = [p.get("logprob") if isinstance(p, Mapping) else p for p in x]
    return [math.nan if p is None else p for p in found]


def metadata_of(m: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a message, {} where there are none."""
    data = m.get("metadata")
    return dict(data) if isinstance(data, Mapping) else {}
