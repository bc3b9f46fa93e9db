"""The way from the messages of a trajectory to rows of tokens, through a tokenizer with a chat template."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from rlkernels.trajectories.model import Mismatch, Span, TokenRow, Trajectory


class ChatTokenizer(Protocol):
    """The part of a tokenizer of transformers that rows are made with."""

    eos_token: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, **options: Any) -> Any: ...


def token_rows(
    trajectory: Trajectory,
    tokenizer: ChatTokenizer,
    *,
    end_of_turn: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[TokenRow]:
    r"""Tokenises a trajectory, and marks the tokens that the model wrote.

    A row grows from call to call of the model, as long as the prompt of the next call continues it. Where the prompt
    was rewritten (a summary, a template that drops earlier reasoning), the row ends and the prompt begins the next one,
    in which the earlier answers are text of the framework. So each answer is sampled in one row.

    The text of a prompt and that of an answer are tokenised apart, because the model samples behind whole tokens.
    Recorded ids count instead of the text; a difference between the two is reported in ``TokenRow.mismatches``. The
    sampled tokens are those of an answer and its end of turn, and not what a template writes behind it.

    Args:
        tokenizer: ``apply_chat_template`` and ``encode`` of a tokenizer of transformers.
        end_of_turn: the text that ends an answer; else ``tokenizer.eos_token``. A template without it ends an answer
            where it ends the message.
        template_options: further arguments of ``apply_chat_template``.

    Returns:
        rows, in order; none of a trajectory without messages. A trajectory in which the model wrote nothing has one row
            without sampled tokens.

    Raises:
        TypeError: ``trajectory`` is no ``Trajectory``.
        ValueError: the template writes a message of the model otherwise than behind its own prompt for one, and no ids
            were recorded; an answer without a token, or with another number of log-probabilities; a reward before the
            first sampled token.

    Example:
        >>> class Words:  # stands for a tokenizer of transformers
        ...     eos_token = ";"
        ...     def apply_chat_template(self, messages, add_generation_prompt, **options):
        ...         turns = "".join(f"{m['role']}:{m['content']};" for m in messages)
        ...         return turns + "assistant:" * add_generation_prompt
        ...     def encode(self, text, **options):
        ...         return list(text.encode())
        >>> from rlkernels.trajectories import Message, Trajectory
        >>> (row,) = token_rows(Trajectory([Message("user", "hi"), Message("assistant", "yo", "model")]), Words())
        >>> bytes(i for i, sampled in zip(row.token_ids, row.sampled) if sampled)
        b'yo;'
    """
    caller = "token_rows"
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"{caller}: trajectory must be a Trajectory, got {type(trajectory).__name__}")
    eos = tokenizer.eos_token if end_of_turn is None else end_of_turn
    builder = _Builder(caller, trajectory, tokenizer, eos or "", dict(template_options or {}))
    for index, message in enumerate(trajectory.messages):
        if message.provenance == "model":
            builder.answer(index)
        if message.reward is not None:
            builder.reward(index, message.reward)
    return builder.finished()


class _Builder:
    """The rows of a trajectory as they grow."""

    def __init__(
        self, caller: str, trajectory: Trajectory, tokenizer: ChatTokenizer, eos: str, options: dict[str, Any]
    ) -> None:
        self.caller, self.trajectory, self.tokenizer, self.eos, self.options = (
            caller,
            trajectory,
            tokenizer,
            eos,
            options,
        )
        self.messages = [m.for_template() for m in trajectory.messages]
        self.eos_ids = self.encoded(eos) if eos else []
        self.rows: list[TokenRow] = []
        self.begin()

    def begin(self) -> None:
        self.ids: list[int] = []
        self.sampled: list[bool] = []
        self.logprobs: list[float] = []
        self.rewards: list[float] = []
        self.spans: list[Span] = []
        self.mismatches: list[Mismatch] = []
        self.text = ""  # of the template, as far as the row goes

    def rendered(self, count: int, prompt: bool) -> str:
        """Returns the text of the first messages, with the template's prompt for an answer."""
        if count == 0:  # because transformers refuses to apply a template to nothing
            turn, after = self.rendered(1, False), self.rendered(1, True)
            return after[len(turn) :] if prompt and after.startswith(turn) else ""
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt, **self.options}
        if self.trajectory.tools is not None:
            options["tools"] = list(self.trajectory.tools)
        return self.tokenizer.apply_chat_template(self.messages[:count], **options)

    def encoded(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def answer(self, index: int) -> None:
        """Appends the prompt of a call of the model, and its answer."""
        message = self.trajectory.messages[index]
        prompt = self.rendered(index, True)
        turn = self.rendered(index + 1, False)
        follows = turn.startswith(prompt)
        if not follows and message.token_ids is None:
            raise ValueError(
                f"{self.caller}: the template does not write message {index} behind its prompt for an answer; record "
                "its token_ids"
            )
        self.context(index, prompt)
        answer, ended = turn[len(prompt) :] if follows else "", message.ended
        at = answer.rfind(self.eos) if self.eos else -1
        body, closing = (answer[:at], self.eos) if at >= 0 else (answer, "")
        recorded = message.token_ids
        if recorded is not None and self.eos_ids:
            ended = list(recorded[-len(self.eos_ids) :]) == self.eos_ids
        text = body + closing if ended else body
        tokenised = self.encoded(text)
        if recorded is not None:
            self.compare(index, "answer", list(recorded), tokenised)
        ids = tokenised if recorded is None else list(recorded)
        if not ids:
            raise ValueError(f"{self.caller}: message {index} of the model has no token, expected its end of turn")
        if message.logprobs is not None and len(message.logprobs) != len(ids):
            raise ValueError(
                f"{self.caller}: message {index} has {len(message.logprobs)} logprobs, but its text has {len(ids)} "
                "tokens with the end of turn; record token_ids"
            )
        logprobs = [math.nan] * len(ids) if message.logprobs is None else list(message.logprobs)
        self.append(ids, logprobs, Span(len(self.ids), len(self.ids) + len(ids), index, "model"))
        self.text = prompt + text

    def context(self, index: int, prompt: str) -> None:
        """Appends what the model read since its last answer, or begins a row where it read something else."""
        recorded = self.trajectory.messages[index].prompt_ids
        continues = prompt.startswith(self.text)
        tokenised = [*self.ids, *self.encoded(prompt[len(self.text) :])] if continues else self.encoded(prompt)
        ids = tokenised if recorded is None else list(recorded)
        if ids[: len(self.ids)] != self.ids:
            self.end()
        if recorded is not None:
            self.compare(index, "prompt", ids, tokenised)
        self.unsampled(ids[len(self.ids) :], index)

    def unsampled(self, ids: list[int], index: int) -> None:
        if ids:
            span = Span(len(self.ids), len(self.ids) + len(ids), index, "environment")
            self.append(ids, [math.nan] * len(ids), span)

    def append(self, ids: list[int], logprobs: list[float], span: Span) -> None:
        self.ids += ids
        self.sampled += [span.provenance == "model"] * len(ids)
        self.logprobs += logprobs
        self.rewards += [0.0] * len(ids)
        self.spans.append(span)

    def compare(self, index: int, part: str, recorded: list[int], tokenised: list[int]) -> None:
        """Reports the first id that differs."""
        for token in range(max(len(recorded), len(tokenised))):
            a, b = (ids[token] if token < len(ids) else None for ids in (recorded, tokenised))
            if a != b:
                self.mismatches.append(Mismatch(index, part, token, a, b))
                return

    def reward(self, index: int, reward: float) -> None:
        """Adds the reward of a message to the last sampled token."""
        if not any(self.sampled):
            raise ValueError(f"{self.caller}: message {index} has a reward, but no token was sampled before its end")
        last = max(i for i, sampled in enumerate(self.sampled) if sampled)
        self.rewards[last] += reward

    def end(self) -> None:
        """Ends the row, if it has tokens, and begins another one."""
        if self.ids:
            t = self.trajectory
            row = TokenRow(
                tuple(self.ids),
                tuple(self.sampled),
                tuple(self.logprobs),
                tuple(self.rewards),
                tuple(self.spans),
                tuple(self.mismatches),
                reward=t.reward,
                group_id=t.group_id,
                rollout_id=t.rollout_id,
                agent=t.agent,
            )
            self.rows.append(row)
        self.begin()

    def finished(self) -> list[TokenRow]:
        """Appends what follows the last answer, and returns the rows."""
        messages = self.trajectory.messages
        if messages and messages[-1].provenance != "model":
            text = self.rendered(len(messages), False)
            if text.startswith(self.text):
                self.unsampled(self.encoded(text[len(self.text) :]), len(messages))
        self.end()
        return self.rows
