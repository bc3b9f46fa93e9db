"""The converters from logs of agent frameworks to trajectories.

A converter knows who wrote a message: from a mark in the log, or from the texts that a framework is known to write
itself. A converter never takes the role for the writer where neither is there; it asks the caller.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlkernels.trajectories.log_fields import (
    MARKS,
    Log,
    Sampled,
    checked_log,
    choice_of,
    is_marked,
    message_of,
    metadata_of,
    says_who,
    text_of,
    written_by_model,
)
from rlkernels.trajectories.model import Message, Trajectory

OPENMANUS_TEXTS = ("Error encountered while processing: ", "Maximum token limit reached, cannot continue execution: ")
"""The beginnings of the messages that OpenManus writes in the role of the assistant."""

AUTOGEN_CHAT = (
    "TextMessage",
    "MultiModalMessage",
    "StopMessage",
    "HandoffMessage",
    "StructuredMessage",
    "ToolCallSummaryMessage",
)
AUTOGEN_NOT_READ = (
    "UserInputRequestedEvent",
    "ModelClientStreamingChunkEvent",
    "MemoryQueryEvent",
    "SelectSpeakerEvent",
    "SelectorEvent",
    "CodeGenerationEvent",
    "CodeExecutionEvent",
)
"""Events of AutoGen that no model reads as a message."""


def from_openai(
    messages: Log,
    *,
    sampled: Sampled = None,
    agent: str | None = None,
    reward: float | None = None,
    group_id: int = 0,
    rollout_id: int = 0,
    tools: Log | None = None,
) -> Trajectory:
    """Converts messages in the form of OpenAI's chat completions, with tool calls.

    The model wrote a message that bears a mark: ``"token_ids"``, ``"logprobs"``, a true ``"sampled"`` or the
    ``"provenance"`` ``"model"``. Another ``"provenance"``, or a false ``"sampled"``, counts before recorded numbers. In
    a log with a mark somewhere, an assistant's message without one is the framework's. Further keys that are read:
    ``"prompt_token_ids"``, ``"reasoning_content"`` or ``"reasoning"``, ``"ended"`` or ``"finish_reason"``,
    ``"reward"``.

    Args:
        sampled: the messages that the model wrote, where the log bears no marks: their indices, or a function of a
            message and its index.
        agent: the agent of the trajectory. Messages with another ``"name"`` are not sampled, and an assistant's among
            them are read as those of a user.

    Raises:
        TypeError: a message is no dict, ``sampled`` neither indices nor a function. ValueError: nothing says who wrote
            the messages of the assistant; recorded numbers in the role of a user or a tool without an explicit mark; an
            index outside of the log; an unknown ``"provenance"``; content that is not text.

    Example:
        >>> log = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "token_ids": [7, 2]}]
        >>> from_openai(log).messages[1].token_ids
        (7, 2)
    """
    caller = "from_openai"
    log = checked_log(caller, messages)
    own = [agent is None or m.get("name", agent) == agent for m in log]
    written = written_by_model(caller, log, sampled, own)
    found = []
    for index, m in enumerate(log):
        role, provenance = m.get("role", "user"), "environment"
        if role == "assistant" and not own[index]:
            role = "user"
        elif written[index]:
            provenance = "model"
        elif role == "assistant":
            provenance = "framework"
        found.append(message_of(caller, m, index, role, provenance))
    return Trajectory(tuple(found), reward, group_id, rollout_id, agent, None if tools is None else tuple(tools))


def from_openmanus(
    messages: Log,
    *,
    framework_texts: Collection[str] = OPENMANUS_TEXTS,
    reward: float | None = None,
    group_id: int = 0,
    rollout_id: int = 0,
    tools: Log | None = None,
) -> Trajectory:
    """Converts the memory of an OpenManus agent.

    The model wrote the content and the tool calls of the assistant's messages, without those that begin with a text of
    the framework. The prompt that OpenManus injects before each step has the role of the user. Marks as
    ``from_openai`` reads them count before the texts.

    Args:
        framework_texts: the beginnings of messages that the framework writes as the assistant.

    Raises:
        TypeError: a message is no dict. ValueError: content that is not text, images included.

    Example:
        >>> log = [{"role": "assistant", "content": "Error encountered while processing: no network"}]
        >>> from_openmanus(log).messages[0].provenance
        'framework'
    """
    caller = "from_openmanus"
    log = checked_log(caller, messages)

    def by_the_model(m: Mapping[str, Any], index: int) -> bool:
        if m.get("base64_image") is not None:
            raise ValueError(
                f"{caller}: message {index} holds an image, and only text has a template; take base64_image out of the "
                "log to leave it out"
            )
        text = m.get("content") or ""
        if says_who(m):
            return is_marked(caller, m, index)
        by_the_framework = isinstance(text, str) and text.startswith(tuple(framework_texts))
        return m.get("role") == "assistant" and not by_the_framework

    return from_openai(log, sampled=by_the_model, reward=reward, group_id=group_id, rollout_id=rollout_id, tools=tools)


def from_autogen(
    messages: Log,
    *,
    agent: str,
    sampled: Sampled = None,
    reward: float | None = None,
    group_id: int = 0,
    rollout_id: int = 0,
    tools: Log | None = None,
) -> Trajectory:
    """Converts a transcript of AutoGen as one of its agents read and wrote it.

    Since 0.4 the mark of the model is ``"models_usage"``: summaries of tool calls have none and are not sampled.
    Messages of other agents are those of a user, and their tool calls were not read. A thought is the reasoning of the
    message behind it. Token ids and log-probabilities may stand in the message or, as JSON, in its ``"metadata"``. In
    transcripts of 0.2, whose messages have a ``"name"`` and no ``"type"``, ``sampled`` says what the model wrote.

    Args:
        agent: the source of the messages that are trained.
        sampled: indices, or a function of a message and its index, in place of the mark.

    Raises:
        TypeError: a message is no dict. ValueError: an unknown type of message; content that is not text; no message of
            the agent.

    Example:
        >>> log = [{"type": "TextMessage", "source": "user", "models_usage": None, "content": "hi"},
        ...        {"type": "TextMessage", "source": "bob", "models_usage": {"completion_tokens": 2}, "content": "yo"}]
        >>> [(m.role, m.provenance) for m in from_autogen(log, agent="bob").messages]
        [('user', 'environment'), ('assistant', 'model')]
    """
    caller = "from_autogen"
    log = checked_log(caller, messages)
    if not any(m.get("source", m.get("name")) == agent for m in log):
        raise ValueError(f"{caller}: agent {agent!r} wrote no message; the log has those of {_sources(log)}")
    if not any("type" in m for m in log):
        old = [
            {**m, "role": "assistant"}
            if m.get("name") == agent
            else {**{k: x for k, x in m.items() if k not in MARKS}, "role": _not_the_assistant(m)}
            for m in log
        ]
        return from_openai(
            old, sampled=sampled, reward=reward, group_id=group_id, rollout_id=rollout_id, tools=tools, agent=agent
        )
    chosen = choice_of(caller, log, sampled)
    found: list[Message] = []
    thought = None
    for index, m in enumerate(log):
        # The type of a structured message names its content in brackets.
        kind, own = str(m.get("type")).split("[")[0], m.get("source") == agent
        usage = m.get("models_usage") is not None if chosen is None else chosen(m, index)
        provenance = "environment" if not own else "model" if usage else "framework"
        known = {**metadata_of(m), **{k: x for k, x in m.items() if k not in ("content", "metadata")}}
        if kind in AUTOGEN_CHAT:
            given = {**known, "content": m.get("content"), "reasoning": thought}
            found.append(message_of(caller, given, index, "assistant" if own else "user", provenance, m.get("source")))
        elif kind == "ToolCallRequestEvent":
            if not own:
                continue
            calls = [
                {
                    "id": c.get("id"),
                    "type": "function",
                    "function": {"name": c.get("name"), "arguments": c.get("arguments")},
                }
                for c in m.get("content") or ()
            ]
            given = {**known, "content": None, "tool_calls": calls, "reasoning": thought}
            found.append(message_of(caller, given, index, "assistant", provenance, m.get("source")))
        elif kind == "ToolCallExecutionEvent":
            for r in (m.get("content") or ()) if own else ():
                text, call = r.get("content"), r.get("call_id")
                found.append(Message("tool", text_of(caller, text, index), tool_call_id=call, name=r.get("name")))
            continue
        elif kind == "ThoughtEvent":
            thought = m.get("content") if own else thought
            continue
        elif kind in AUTOGEN_NOT_READ:
            continue
        else:
            raise ValueError(f"{caller}: message {index} has the unknown type {kind!r}; take it out, or rename it")
        if own:
            thought = None
    return Trajectory(tuple(found), reward, group_id, rollout_id, agent, None if tools is None else tuple(tools))


def from_metagpt(
    messages: Log,
    *,
    agent: str | None = None,
    mark: str = "llm",
    reward: float | None = None,
    group_id: int = 0,
    rollout_id: int = 0,
) -> Trajectory:
    """Converts messages that MetaGPT dumped.

    Its ``AIMessage`` holds texts that no model wrote, such as the placeholder for no action. So only messages whose
    ``"metadata"`` bears the mark, or recorded ``"token_ids"``, are sampled. A ``"score"`` there, as reviewers give from
    1 to 10, is the reward of its message.

    Args:
        agent: the sender whose messages are the assistant's; else the role decides how they are read.
        mark: the key of the metadata that the recorder sets to true for what the model wrote.

    Raises:
        TypeError: a message is no dict. ValueError: no message bears the mark; content that is not text.

    Example:
        >>> log = [{"role": "assistant", "content": "plan", "metadata": {"llm": True, "score": 7}},
        ...        {"role": "assistant", "content": "No actions taken yet", "metadata": {}}]
        >>> [(m.provenance, m.reward) for m in from_metagpt(log).messages]
        [('model', 7.0), ('framework', None)]
    """
    caller = "from_metagpt"
    found = []
    for index, m in enumerate(checked_log(caller, messages)):
        data = metadata_of(m)
        own = m.get("role") == "assistant" if agent is None else agent in (m.get("sent_from"), data.get("agent"))
        written = own and bool(data.get(mark) or data.get("token_ids") is not None)
        given = {**data, "content": m.get("content"), "reward": data.get("score", data.get("reward"))}
        provenance = "environment" if not own else "model" if written else "framework"
        role = "assistant" if own else _not_the_assistant(m)
        found.append(message_of(caller, given, index, role, provenance))
    if not any(m.provenance == "model" for m in found):
        raise ValueError(
            f"{caller}: no message bears metadata[{mark!r}] or token_ids, so that nothing says what the model wrote; "
            "let the recorder set it where the model was called"
        )
    return Trajectory(tuple(found), reward, group_id, rollout_id, agent)


def from_steps(
    steps: Log, *, reward: float | None = None, group_id: int = 0, rollout_id: int = 0, tools: Log | None = None
) -> list[Trajectory]:
    """Converts a list of calls of the model, each with the whole prompt that it got: one trajectory per step.

    A step is ``{"prompt": messages, "response": message}``. Only the response is sampled, because the prompt's messages
    of the assistant are written again by the framework, and are sampled in the step that they come from. All steps
    share reward and rollout, as AutoGPT, agent-lightning and SkyRL's training by steps need it.

    Raises:
        TypeError: a step or message is no dict. ValueError: a step without prompt or response; content that is not
            text.

    Example:
        >>> step = {"prompt": [{"role": "user", "content": "hi"}], "response": {"content": "yo"}}
        >>> [len(t.messages) for t in from_steps([step, step], reward=1.0)]
        [2, 2]
    """
    caller = "from_steps"
    found = []
    for number, step in enumerate(checked_log(caller, steps)):
        if not isinstance(step.get("prompt"), Sequence) or not isinstance(step.get("response"), Mapping):
            raise ValueError(
                f"{caller}: step {number} has the keys {sorted(step)}, expected prompt, a list of messages, and "
                "response, a message"
            )
        messages = []
        for index, m in enumerate(checked_log(caller, step["prompt"])):
            role = m.get("role", "user")
            plain = {k: x for k, x in m.items() if k not in ("token_ids", "logprobs", "prompt_token_ids", "reward")}
            messages.append(
                message_of(caller, plain, index, role, "framework" if role == "assistant" else "environment")
            )
        response = {"prompt_token_ids": step.get("prompt_token_ids"), "reward": step.get("reward"), **step["response"]}
        messages.append(message_of(caller, response, len(messages), "assistant", "model"))
        found.append(
            Trajectory(tuple(messages), reward, group_id, rollout_id, None, None if tools is None else tuple(tools))
        )
    return found


def from_autogpt(
    episodes: Log,
    *,
    prompt: Log,
    full_steps: int = 4,
    reward: float | None = None,
    group_id: int = 0,
    rollout_id: int = 0,
    tools: Log | None = None,
) -> list[Trajectory]:
    """Converts the episodes of classic AutoGPT, whose history is written again for each step.

    A step reads ``prompt``, a summary of older episodes, and the latest ``full_steps`` episodes with their results.
    An episode is ``{"action": {"raw_message": message}, "result": ..., "summary": text or None}``. The text of the
    history is close to that of AutoGPT and not the same in every version, so ``"prompt_token_ids"`` of an episode count
    where they were recorded.

    Args:
        prompt: the messages before the history: directives and task.
        full_steps: the episodes that are not summarised.

    Raises:
        TypeError: a message is no dict. ValueError: an episode without the message that the model wrote.

    Example:
        >>> episode = {"action": {"raw_message": {"content": "ls"}}, "result": "a.txt", "summary": "listed"}
        >>> steps = from_autogpt([episode, episode], prompt=[{"role": "user", "content": "task"}], full_steps=0)
        >>> [m.content for m in steps[1].messages][1].splitlines()[-1]
        '* Step 1: listed'
    """
    caller = "from_autogpt"
    log = checked_log(caller, episodes)
    steps: list[dict[str, Any]] = []
    for number, episode in enumerate(log):
        history = list(prompt)
        cut = max(number - full_steps, 0)
        older = [
            f"* Step {i + 1}: {e.get('summary') or json.dumps(_action(caller, e, i).get('content'))}"
            for i, e in enumerate(log[:cut])
        ]
        if older:
            head = (
                "## Progress on your Task so far\nHere is a summary of the steps that you have executed so far, use "
                "this as your consideration for determining the next action!\n"
            )
            history.append({"role": "system", "content": head + "\n\n".join(older)})
        for i, e in enumerate(log[cut:number], cut):
            action = _action(caller, e, i)
            history.append({**action, "role": "assistant"})
            if e.get("result") is not None:
                history.append(_result(action, e["result"]))
        response = {"reward": episode.get("reward"), **_action(caller, episode, number)}
        steps.append({"prompt": history, "response": response, "prompt_token_ids": episode.get("prompt_token_ids")})
    return from_steps(steps, reward=reward, group_id=group_id, rollout_id=rollout_id, tools=tools)


def from_agent_tree(
    node: Mapping[str, Any], *, sampled: Sampled = None, group_id: int = 0, rollout_id: int = 0
) -> list[Trajectory]:
    """Converts a tree of agents, such as the supervisor and workers of a deep search, to trajectories of one rollout.

    A node is ``{"agent": name, "messages": messages, "children": nodes}``; that of the root holds ``"reward"``. Each
    worker begins with a context of its own. All share the reward and the rollout id, so that ``"rollout-mean"`` gives a
    tree of many rows the weight of one answer. The root comes last, because its last row is that of the rollout.

    Raises:
        TypeError: a node or message is no dict. ValueError: as ``from_openai``.

    Example:
        >>> answer = {"role": "assistant", "content": "x", "sampled": True}
        >>> worker = {"agent": "w", "messages": [answer]}
        >>> tree = {"agent": "boss", "messages": [answer], "children": [worker], "reward": 1}
        >>> [(t.agent, t.reward) for t in from_agent_tree(tree)]
        [('w', 1.0), ('boss', 1.0)]
    """
    caller = "from_agent_tree"
    if not isinstance(node, Mapping):
        raise TypeError(f"{caller}: node must be a dict, got {type(node).__name__}")
    reward, found = node.get("reward"), []

    def walk(one: Mapping[str, Any]) -> None:
        for child in one.get("children") or ():
            walk(child)
        found.append(
            from_openai(
                one.get("messages") or (),
                sampled=sampled,
                reward=reward,
                group_id=group_id,
                rollout_id=rollout_id,
                tools=one.get("tools"),
                agent=one.get("agent"),
            )
        )

    walk(node)
    return found


def search_results(results: Log, *, tool_call_id: str | None = None, name: str = "search") -> Message:
    """Makes the message of a tool of the results of a search backend.

    Args:
        results: one dict per page, such as ``{"title": ..., "url": ..., "content": ...}``; kept as JSON.

    Raises:
        TypeError: a result is no dict.

    Example:
        >>> search_results([{"title": "A", "url": "http://a", "content": "text"}], tool_call_id="c1").role
        'tool'
    """
    text = json.dumps([dict(r) for r in checked_log("search_results", results)], ensure_ascii=False)
    return Message("tool", text, tool_call_id=tool_call_id, name=name)


def _not_the_assistant(m: Mapping[str, Any]) -> str:
    role = m.get("role", "user")
    return "user" if role == "assistant" else role


def _sources(log: Log) -> str:
    return ", ".join(sorted({str(m.get("source", m.get("name"))) for m in log})) or "nobody"


def _action(caller: str, episode: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the message that the model wrote in an episode."""
    action = episode.get("action")
    raw = action.get("raw_message") if isinstance(action, Mapping) else None
    if not isinstance(raw, Mapping):
        raise ValueError(f"{caller}: episode {number} has no action.raw_message, the message that the model wrote")
    return dict(raw)


def _result(action: Mapping[str, Any], result: Any) -> dict[str, Any]:
    """Returns the message that brings the result of an action."""
    text = result.get("outputs", result) if isinstance(result, Mapping) else result
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
    calls = action.get("tool_calls") or ()
    return (
        {"role": "tool", "content": text, "tool_call_id": calls[0].get("id")}
        if calls
        else {"role": "user", "content": text}
    )
