"""Logs of agents to rows and batches of tokens, with a tiny tokenizer of transformers; losses of the batches."""

import json
import math

import pytest
import torch

import rlkernels as rlk
from rlkernels.trajectories import (
    Message,
    Mismatch,
    TokenRow,
    Trajectory,
    from_agent_tree,
    from_autogen,
    from_autogpt,
    from_metagpt,
    from_openai,
    from_openmanus,
    from_steps,
    search_results,
    token_batch,
    token_rows,
)

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and (loop.last or not drop) %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    special = [START, END, "<think>", "</think>", "<call>"]
    characters = [chr(i) for i in range(32, 127)] + ["\n", "[?]"]
    model = tokenizers.models.WordLevel({x: i for i, x in enumerate([*special, *characters])}, unk_token="[?]")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    found.add_special_tokens({"additional_special_tokens": special})
    found.chat_template = CHATML
    return found


def text(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def written(tokenizer, row):
    """The text of each sampled span."""
    spans = [s for s in row.spans if s.provenance == "model"]
    assert [i for s in row.spans for i in range(s.start, s.end)] == list(range(len(row.token_ids)))
    assert [i for s in spans for i in range(s.start, s.end)] == [i for i, x in enumerate(row.sampled) if x]
    return [text(tokenizer, row.token_ids[s.start : s.end]) for s in spans]


CALL = {"id": "c1", "type": "function", "function": {"name": "ls", "arguments": '{"path": "."}'}}
OPENMANUS = [
    {"role": "system", "content": "You are"},
    {"role": "user", "content": "list"},
    {"role": "user", "content": "What next?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "a.txt", "tool_call_id": "c1", "name": "ls"},
    {"role": "assistant", "content": "Error encountered while processing: no network"},
    {"role": "assistant", "content": "done"},
]


def test_an_openmanus_log_trains_what_was_sampled_and_its_end_of_turn_alone(tokenizer):
    trajectory = from_openmanus(OPENMANUS, reward=1.0)
    (row,) = token_rows(trajectory, tokenizer)
    call = 'I look.<call>{"name": "ls", "arguments": {"path": "."}}'
    assert written(tokenizer, row) == [call + END, "done" + END]
    whole = tokenizer.apply_chat_template([m.for_template() for m in trajectory.messages], tokenize=False)
    assert text(tokenizer, row.token_ids) == whole.removesuffix("\n") and not row.mismatches
    # A mark in the log counts before the texts.
    marked = [{**OPENMANUS[5], "sampled": True}, {**OPENMANUS[6], "sampled": False}]
    assert [m.provenance for m in from_openmanus(marked).messages] == ["model", "framework"]


def test_a_log_without_marks_is_refused_and_one_with_marks_trains_those_alone():
    with pytest.raises(ValueError, match=r"from_openai: nothing says who wrote the messages \[3, 5, 6\]"):
        from_openai(OPENMANUS)
    assert [m.provenance for m in from_openai(OPENMANUS, sampled=[3]).messages].count("model") == 1
    log = [{"role": "assistant", "content": "placeholder"}, {"role": "assistant", "content": "x", "token_ids": [1, 2]}]
    assert [m.provenance for m in from_openai(log).messages] == ["framework", "model"]


ANSWER = {"role": "assistant", "content": "x", "token_ids": [7]}


@pytest.mark.parametrize("convert", (from_openai, from_openmanus))
@pytest.mark.parametrize(
    "word", ({"sampled": False}, {"provenance": "framework"}, {"provenance": "environment"}), ids=str
)
def test_the_word_of_a_log_counts_before_recorded_ids(convert, word):
    first, second = convert([{**ANSWER, **word}, ANSWER]).messages
    assert (first.provenance, first.token_ids) == ("framework", None)
    assert (second.provenance, second.token_ids) == ("model", (7,))


def test_recorded_numbers_of_another_agent_or_of_a_tool_are_not_those_of_the_agent():
    log = [{**ANSWER, "name": name} for name in ("ann", "bob")]
    for found in (from_openai(log, agent="bob"), from_autogen(log, agent="bob")):
        assert [(m.role, m.provenance) for m in found.messages] == [("user", "environment"), ("assistant", "model")]
    # A mark of another agent does not say who wrote the messages of this one.
    with pytest.raises(ValueError, match=r"nothing says who wrote the messages \[1\]"):
        from_openai([log[0], {**log[1], "token_ids": None}], agent="bob")
    for key, x in (("token_ids", [7]), ("logprobs", [-0.5])):
        for convert in (from_openai, from_openmanus):
            with pytest.raises(ValueError, match=f"message 1 has {key}, which mark .* the role 'tool'"):
                convert([ANSWER, {"role": "tool", "content": "r", key: x}])
    simulated = from_openai([{**ANSWER, "role": "user", "sampled": True}])
    assert simulated.messages[0].provenance == "model"


@pytest.mark.parametrize(
    ("sampled", "error", "words"),
    [
        ([1], ValueError, "the index 1, expected those of 1 messages"),
        ([-1], ValueError, "the index -1"),
        ([True], TypeError, "must be int, got bool"),
        ("0", TypeError, "got str"),
        (True, TypeError, "got bool"),
    ],
)
def test_what_says_nothing_of_a_message_is_refused(sampled, error, words):
    with pytest.raises(error, match=words):
        from_openai([{"role": "assistant", "content": "x"}], sampled=sampled)


def test_an_unknown_provenance_and_an_id_below_zero_are_refused():
    with pytest.raises(ValueError, match="provenance of message 0 must be one of"):
        from_openai([{**ANSWER, "provenance": "modle"}])
    for name in ("prompt_ids", "token_ids"):
        with pytest.raises(ValueError, match=f"{name} must not be negative, got -100"):
            Message("assistant", "x", "model", **{name: (3, -100)})


def test_recorded_ids_and_log_probabilities_win_and_a_mismatch_is_reported_with_its_place(tokenizer):
    ids = tokenizer.encode("ab" + END, add_special_tokens=False)
    recorded = [ids[0], 77, ids[2]]
    content = {"content": [{"token": "?", "logprob": x} for x in (-0.1, -0.2, -0.3)]}
    log = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "ab", "token_ids": recorded, "logprobs": content},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "ab", "token_ids": ids},
    ]
    (row,) = token_rows(from_openai(log), tokenizer)
    span = [s for s in row.spans if s.message == 1 and s.provenance == "model"][0]
    assert list(row.token_ids[span.start : span.end]) == recorded
    assert row.logprobs[span.start : span.end] == (-0.1, -0.2, -0.3)
    assert row.mismatches == (Mismatch(1, "answer", 1, 77, ids[1]),)
    batch = token_batch([row])
    assert batch.targets[0, span.start - 1 : span.end - 1].tolist() == recorded
    torch.testing.assert_close(
        batch.rollout_logprobs[0, span.start - 1 : span.end - 1], torch.tensor([-0.1, -0.2, -0.3])
    )
    # Nothing was recorded of the second answer.
    assert batch.rollout_logprobs[batch.mask].isnan().tolist() == [False] * 3 + [True] * 3
    assert (batch.targets[~batch.mask] == -100).all() and not batch.mask[0, -1]


def test_an_answer_that_was_cut_has_no_end_of_turn_of_its_own(tokenizer):
    cut = tokenizer.encode("ab", add_special_tokens=False)
    for answer in ({"token_ids": cut}, {"sampled": True, "finish_reason": "length"}):
        log = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "ab", **answer},
            {"role": "user", "content": "go on"},
            {"role": "assistant", "content": "c", "sampled": True},
        ]
        (row,) = token_rows(from_openai(log), tokenizer)
        assert written(tokenizer, row) == ["ab", "c" + END] and not row.mismatches
        assert f"ab{END}\n{START}user" in text(tokenizer, row.token_ids)


def test_a_template_that_drops_earlier_reasoning_gives_a_row_per_call(tokenizer):
    messages = [
        Message("user", "q"),
        Message("assistant", "x", "model", reasoning="hm"),
        Message("tool", "t"),
        Message("assistant", "y", "model", reasoning="so"),
    ]
    rows = token_rows(Trajectory(messages), tokenizer, template_options={"drop": True})
    assert [written(tokenizer, row) for row in rows] == [[f"<think>hm</think>x{END}"], [f"<think>so</think>y{END}"]]
    (row,) = token_rows(Trajectory(messages), tokenizer)
    assert written(tokenizer, row) == [f"<think>hm</think>x{END}", f"<think>so</think>y{END}"]


def test_a_recorded_prompt_continues_its_row_or_begins_another_one(tokenizer):
    def log(second):
        return [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "token_ids": [50, 1], "prompt_token_ids": [10, 11]},
            {"role": "tool", "content": "t"},
            {"role": "assistant", "content": "b", "token_ids": [51, 1], "prompt_token_ids": second},
        ]

    (row,) = token_rows(from_openai(log([10, 11, 50, 1, 12])), tokenizer)
    assert row.token_ids == (10, 11, 50, 1, 12, 51, 1) and row.sampled == (False, False, True, True, False, True, True)
    assert [(m.message, m.part) for m in row.mismatches] == [(1, "prompt"), (1, "answer"), (3, "prompt"), (3, "answer")]
    assert row.mismatches[2].token == 4  # behind the recorded ids, which are not reported again
    rows = token_rows(from_openai(log([13, 50, 1, 12])), tokenizer)
    assert [row.token_ids for row in rows] == [(10, 11, 50, 1), (13, 50, 1, 12, 51, 1)]
    assert rows[1].sampled == (False,) * 4 + (True, True)


USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
AUTOGEN = [
    {"type": "TextMessage", "source": "user", "models_usage": None, "content": "task"},
    {"type": "ThoughtEvent", "source": "ann", "models_usage": None, "content": "hm"},
    {
        "type": "ToolCallRequestEvent",
        "source": "ann",
        "models_usage": USAGE,
        "content": [{"id": "c1", "name": "ls", "arguments": "{}"}],
    },
    {
        "type": "ToolCallExecutionEvent",
        "source": "ann",
        "models_usage": None,
        "content": [{"call_id": "c1", "name": "ls", "content": "a.txt", "is_error": False}],
    },
    {"type": "ToolCallSummaryMessage", "source": "ann", "models_usage": None, "content": "a.txt"},
    {
        "type": "TextMessage",
        "source": "bob",
        "models_usage": USAGE,
        "content": "ok",
        "metadata": {"token_ids": "[84, 80, 1]", "logprobs": "[-1.0, -2.0, -3.0]"},
    },
    {"type": "UserInputRequestedEvent", "source": "user", "content": "", "models_usage": None},
    {"type": "TextMessage", "source": "ann", "models_usage": USAGE, "content": "TERMINATE"},
]


def test_two_agents_of_an_autogen_transcript_have_masks_that_do_not_meet(tokenizer):
    texts = {}
    for agent in ("ann", "bob"):
        trajectory = from_autogen(AUTOGEN, agent=agent)
        (row,) = token_rows(trajectory, tokenizer)
        texts[agent] = written(tokenizer, row)
        assert trajectory.agent == row.agent == agent
    call = '<think>hm</think><call>{"name": "ls", "arguments": {}}'
    assert texts == {"ann": [call + END, "TERMINATE" + END], "bob": [text(tokenizer, [84, 80, 1])]}
    ann, bob = (from_autogen(AUTOGEN, agent=agent).messages for agent in ("ann", "bob"))
    assert [(m.role, m.provenance) for m in ann] == [
        ("user", "environment"),
        ("assistant", "model"),
        ("tool", "environment"),
        ("assistant", "framework"),  # a summary of tool calls, which no model sampled
        ("user", "environment"),
        ("assistant", "model"),
    ]
    assert [m.role for m in bob] == ["user", "user", "assistant", "user"]
    assert bob[2].token_ids == (84, 80, 1) and bob[2].logprobs == (-1.0, -2.0, -3.0)
    old = [{"name": "ann", "role": "user", "content": "x"}, {"name": "bob", "role": "assistant", "content": "y"}]
    with pytest.raises(ValueError, match="nothing says who wrote"):
        from_autogen(old, agent="ann")
    assert [m.provenance for m in from_autogen(old, agent="ann", sampled=[0]).messages] == ["model", "environment"]
    with pytest.raises(ValueError, match="agent 'eve' wrote no message; the log has those of ann, bob, user"):
        from_autogen(AUTOGEN, agent="eve")
    with pytest.raises(ValueError, match="message 0 has the unknown type 'Dance'"):
        from_autogen([{"type": "Dance", "source": "ann"}], agent="ann")


def test_a_metagpt_log_trains_messages_with_a_mark_of_the_model_alone(tokenizer):
    log = [
        {"role": "user", "content": "write", "metadata": {}},
        {"role": "assistant", "content": "plan", "metadata": {"agent": "Ann", "llm": True, "score": 8}},
        {"role": "assistant", "content": "No actions taken yet", "metadata": {"agent": "Ann"}},
        {"role": "assistant", "content": "code", "metadata": {"agent": "Bob", "llm": True}},
    ]
    (row,) = token_rows(from_metagpt(log, agent="Ann"), tokenizer)
    assert written(tokenizer, row) == ["plan" + END]
    assert [x for x in row.rewards if x] == [8.0]
    last = max(i for i, s in enumerate(row.sampled) if s)
    assert token_batch([row]).rewards[0, last - 1] == 8.0  # at the position that scores the end of turn
    with pytest.raises(ValueError, match=r"from_metagpt: no message bears metadata\['llm'\]"):
        from_metagpt([log[2]])


def test_autogpt_steps_are_rows_that_share_the_advantage_of_the_last_one(tokenizer):
    def raw(i):
        return {"raw_message": {"role": "assistant", "content": f"act {i}", "tool_calls": [{**CALL, "id": f"c{i}"}]}}

    episodes = [
        {"action": raw(i), "result": {"status": "success", "outputs": f"out {i}"}, "summary": f"did {i}"}
        for i in range(3)
    ]
    steps = from_autogpt(
        episodes, prompt=[{"role": "system", "content": "be"}], full_steps=1, reward=2.0, rollout_id=5, group_id=1
    )
    assert [[m.role for m in t.messages] for t in steps] == [
        ["system", "assistant"],
        ["system", "assistant", "tool", "assistant"],
        ["system", "system", "assistant", "tool", "assistant"],
    ]
    assert steps[2].messages[1].content.endswith("* Step 1: did 0") and steps[2].messages[3].content == "out 1"
    other = from_steps([{"prompt": [], "response": {"content": "x"}}], reward=0.0, rollout_id=6, group_id=1)
    rows = [row for t in [*steps, *other] for row in token_rows(t, tokenizer)]
    # Each step is sampled once, though later prompts hold it again.
    assert [len(written(tokenizer, row)) for row in rows] == [1] * 4
    batch = token_batch(rows)
    assert batch.is_last_row.tolist() == [False, False, True, True]
    advantages = rlk.group_advantages(batch.row_rewards, batch.group_ids, scale=None)
    assert batch.of_rollouts(advantages).tolist() == [1.0, 1.0, 1.0, -1.0]


def test_a_tree_of_agents_is_one_rollout_whose_tokens_share_its_weight(tokenizer):
    def turn(content):
        return {"role": "assistant", "content": content, "sampled": True}

    page = search_results([{"title": "A", "url": "u", "content": "é"}], tool_call_id="c1")
    assert json.loads(page.content)[0]["content"] == "é" and page.provenance == "environment"
    found = {"role": "tool", "content": page.content, "tool_call_id": "c1"}
    worker = {"agent": "worker", "messages": [{"role": "user", "content": "find"}, turn("s"), found, turn("f")]}
    tree = {
        "agent": "boss",
        "messages": [{"role": "user", "content": "q"}, turn("b")],
        "children": [worker],
        "reward": 0.5,
    }
    trajectories = from_agent_tree(tree, rollout_id=3)
    assert [(t.agent, t.reward, t.rollout_id) for t in trajectories] == [("worker", 0.5, 3), ("boss", 0.5, 3)]
    single = [TokenRow((1, 2), (False, True), (math.nan,) * 2, (0.0,) * 2, (), rollout_id=8)]
    batch = token_batch([*(row for t in trajectories for row in token_rows(t, tokenizer)), *single])
    weights = rlk.token_weights(batch.mask, "rollout-mean", rollout_ids=batch.rollout_ids)
    # Six tokens of three answers, each with its end of turn; one token of the other rollout.
    assert batch.mask.sum(1).tolist() == [4, 2, 1]
    torch.testing.assert_close(weights[batch.mask], torch.tensor([1 / 18] * 6 + [1 / 3]))


def test_the_golden_spans_are_those_of_a_row():
    sampled = tuple(3 <= i < 5 or 7 <= i < 10 for i in range(10))
    row = TokenRow(tuple(range(10)), sampled, (math.nan,) * 10, (0.0,) * 10, ())
    assert torch.equal(token_batch([row]).mask[0, :-1], rlk.spans_to_mask([[3, 5], [7, 10]], 10))


ROW = TokenRow((1, 2), (False, True), (math.nan, -1.0), (0.0, 0.0), ())
REFUSED = {
    "Message: provenance must be one of model, framework, environment; got 'llm'": lambda t: Message(
        "user", "x", "llm"
    ),
    "Message: token_ids is recorded, but the provenance is 'framework'": lambda t: Message(
        "assistant", "x", "framework", token_ids=[1]
    ),
    "Message: 1 logprobs of 2 token_ids": lambda t: Message("a", "x", "model", token_ids=[1, 2], logprobs=[-1.0]),
    "Message: content must be str or None, got list": lambda t: Message("user", ["x"]),
    "Message: reward must be finite": lambda t: Message("user", "x", reward=math.nan),
    "Trajectory: messages holds a dict": lambda t: Trajectory([{"role": "user"}]),
    "from_openai: entry 0 must be a dict, got str": lambda t: from_openai(["x"]),
    "from_openai: expected a list of dicts, got dict": lambda t: from_openai({"role": "user"}),
    "from_openai: message 0 holds a part that is not text": lambda t: from_openai(
        [{"role": "user", "content": [{"type": "image_url"}]}]
    ),
    "from_openmanus: message 0 holds an image": lambda t: from_openmanus([{"role": "tool", "base64_image": "x"}]),
    "from_steps: step 0 has the keys": lambda t: from_steps([{"prompt": []}]),
    "from_autogpt: episode 0 has no action.raw_message": lambda t: from_autogpt([{}], prompt=[]),
    "token_rows: trajectory must be a Trajectory, got list": lambda t: token_rows([], t),
    "token_rows: the template does not write message 0 behind its prompt": lambda t: token_rows(
        Trajectory([Message("user", "x", "model")]), t
    ),
    "token_rows: message 0 has a reward, but no token was sampled": lambda t: token_rows(
        Trajectory([Message("user", "x", reward=1.0)]), t
    ),
    "token_rows: message 0 has 1 logprobs, but its text has 2 tokens": lambda t: token_rows(
        Trajectory([Message("assistant", "x", "model", logprobs=[-1.0])]), t
    ),
    "token_batch: rows holds a int": lambda t: token_batch([3]),
    "token_batch: layout must be one of padded, packed": lambda t: token_batch([ROW], layout="flat"),
    "token_batch: padding is 'left', but a packed batch": lambda t: token_batch([ROW], layout="packed", padding="left"),
    "token_batch: row 1 has group_id 1, expected 0": lambda t: token_batch(
        [ROW, TokenRow((1,), (True,), (0.0,), (0.0,), (), group_id=1)]
    ),
    "token_batch: row 1 has reward 2.0, expected None": lambda t: token_batch(
        [ROW, TokenRow((1,), (True,), (0.0,), (0.0,), (), reward=2.0)]
    ),
    "token_batch: row 0 has a reward at its first token": lambda t: token_batch(
        [TokenRow((1,), (True,), (0.0,), (1.0,), ())]
    ),
    "TokenRow: sampled has 2 entries, expected 1": lambda t: TokenRow((1,), (True, True), (0.0,), (0.0,), ()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_logs_and_rows_are_named(message, tokenizer):
    with pytest.raises((TypeError, ValueError), match=message.replace("(", r"\(")):
        REFUSED[message](tokenizer)
