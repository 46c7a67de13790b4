"""Records: what is accepted, what the refusal says, and the ids and masks that come of them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dataset.lm_dataset import RecordError, count_target_bytes, parse_record, tokenize_records
from dataset.tokenization import ChatTokenizer

MODEL = Path(__file__).resolve().parents[1] / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(MODEL)


def turn(role, content):
    return {"role": role, "content": content}


def line(**record):
    return json.dumps(record, ensure_ascii=False)


def conversation(*turns):
    return parse_record("conversation", line(conversations=list(turns)))


GOOD = [turn("user", "你好"), turn("assistant", "hello")]
BAD_LINES = [
    ("pretrain", '{"text": "cut of', "broken JSON: Unterminated string starting at column 10"),
    ("pretrain", "[" * 100_000, "broken JSON"),
    ("pretrain", '{"text": ' + "9" * 5000 + "}", "broken JSON"),
    ("pretrain", '["text"]', "a JSON object was expected, not a list"),
    ("pretrain", "3.5", "a JSON object was expected, not a number"),
    ("pretrain", line(content="x"), r'key "text" is missing \(keys here: "content"\)'),
    ("pretrain", "{}", r'key "text" is missing \(keys here: none\)'),
    ("pretrain", line(text=None), '"text" must be a string, not null'),
    ("pretrain", line(text=["x"]), '"text" must be a string, not a list'),
    ("pretrain", line(text=""), '"text" is empty'),
    ("pretrain", line(text=" \n\t　"), '"text" is empty'),
    ("pretrain", '{"text": "half \\ud83d"}', r"half a surrogate pair, \\ud83d"),
    ("conversation", line(text="x"), r'key "conversations" is missing \(keys here: "text"\)'),
    ("conversation", line(conversations="x"), '"conversations" must be a list of turns, not a string'),
    ("conversation", line(conversations=[]), '"conversations" is empty'),
    ("conversation", line(conversations=["x"]), 'turn 1 of "conversations" must be an object .* not a string'),
    ("conversation", line(conversations=[GOOD[0], {"role": "assistant"}]), '"content" in turn 2 .* is missing'),
    ("conversation", line(conversations=[turn("user", 1), GOOD[1]]), '"content" in turn 1 .* a string, not a number'),
    (
        "conversation",
        line(conversations=[turn("user", ""), GOOD[1]]),
        '"content" in turn 1 of "conversations" is empty',
    ),
    ("conversation", line(conversations=[turn(True, "x"), GOOD[1]]), '"role" in turn 1 .* a string, not a boolean'),
    ("conversation", line(conversations=[GOOD[0]]), '"conversations" has no assistant turn'),
    ("preference", line(chosen=GOOD), 'key "rejected" is missing'),
    ("preference", line(chosen=GOOD, rejected={}), '"rejected" must be a list of turns, not an object'),
    ("preference", line(chosen=GOOD, rejected=GOOD[:1]), '"rejected" has no assistant turn'),
    ("preference", line(chosen=GOOD, rejected=GOOD), "hold the same answers"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), BAD_LINES)
def test_bad_lines_say_what_is_wrong(kind, text, reason):
    with pytest.raises(RecordError, match=reason):
        parse_record(kind, text)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="pretrain, conversation, preference"):
        parse_record("sft", "{}")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["user", "assistant"], ["user", "assistant"]),
        ([None, None, None, None], ["user", "assistant", "user", "assistant"]),
        (["human", "gpt", "human", "gpt"], ["user", "assistant", "user", "assistant"]),
        (["human", "human", "gpt"], ["user", "user", "assistant"]),
        (["prompter", "model", "user", "chatbot"], ["user", "assistant", "user", "assistant"]),
        (["developer", "user", "bot"], ["system", "user", "assistant"]),
        (["user", "bot", "system", "user", "bot"], ["user", "assistant", "system", "user", "assistant"]),
        (["system", None, None], ["system", "user", "assistant"]),
        (["user", "bot", None, None], ["user", "assistant", "user", "assistant"]),
        (["user", "assistant", "tool", None], ["user", "assistant", "tool", "assistant"]),
        (["user", "assistant", "observation", "assistant"], ["user", "assistant", "tool", "assistant"]),
        (["user", "assistant", "ipython", None], ["user", "assistant", "tool", "assistant"]),
        ([" User", "ASSISTANT"], ["user", "assistant"]),
    ],
)
def test_roles_mean_what_they_say_and_missing_ones_alternate(given, expected):
    turns = [{"content": "x"} if role is None else turn(role, "x") for role in given]
    assert [t["role"] for t in conversation(*turns)] == expected


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
ARGUMENTS = {"city": "杭州"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}


@pytest.mark.parametrize(
    "spelled",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": CALL["function"]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [json.dumps(CALL)]},
        {"tool_calls": [CALL | {"id": "call_1", "index": 0}]},
        {"function_call": CALL["function"]},
        {"role": "function_call", "content": json.dumps(CALL["function"])},
        {"role": "function_call", "content": CALL},
    ],
)
def test_calls_in_every_spelling_are_calls(spelled):
    """Null, empty and missing contents are fine where a call stands in for them."""
    for content in ({"content": None}, {"content": ""}, {}):
        given = {"role": "assistant"} | content | spelled
        expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert conversation(GOOD[0], given, turn("tool", ""))[1:] == [expected, turn("tool", "")]


def test_arguments_stay_as_they_are_spelled():
    spelled = '{"city":"杭州"}'
    given = {"role": "assistant", "content": "I look.", "tool_calls": [{"name": "weather", "arguments": spelled}]}
    assert conversation(GOOD[0], given)[1]["tool_calls"][0]["function"]["arguments"] == spelled


def test_tools_stand_on_the_system_turn_or_beside_the_conversation():
    for tools in ([WEATHER], json.dumps([WEATHER]), WEATHER, [json.dumps(WEATHER)]):
        assert conversation({"role": "system", "content": "", "tools": tools}, *GOOD)[0] == {
            "role": "system", "content": "", "tools": [WEATHER],
        }  # fmt: skip
        parsed = parse_record("conversation", line(conversations=GOOD, tools=tools))
        assert parsed == [GOOD[0] | {"tools": [WEATHER]}, GOOD[1]]


def test_text_parts_are_lines_and_thoughts_are_kept():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = turn("assistant", parts) | {"reasoning_content": ""}
    assert conversation(turn("user", parts), given) == [
        turn("user", "a\nb"),
        turn("assistant", "a\nb") | {"reasoning_content": ""},
    ]


ASKED, ANSWERED = GOOD
BAD_TURNS = [
    (turn("judge", "x"), r"\"role\" in turn 2 of .* is 'judge'; known are system, user, .*human"),
    (turn(None, "x"), '"role" in turn 2 .* a string, not null'),
    (turn("assistant", None), '"content" in turn 2 of "conversations" must be a string, not null'),
    (turn("assistant", "") | {"reasoning_content": "x"}, '"content" in turn 2 .* is empty'),
    (turn("assistant", "x") | {"reasoning_content": ["x"]}, '"reasoning_content" in turn 2 .* a text, not a list'),
    (turn("assistant", "x") | {"reasoning_content": "\ud83d"}, '"reasoning_content" in turn 2'),
    ({"from": "gpt", "value": "x"}, r'"content" in turn 2 .* is missing \(keys here: "from", "value"\)'),
    (turn("tool", None), '"content" in turn 2 .* a string, not null'),
    (turn("user", [{"type": "image_url", "image_url": {}}]), "part 1 is not text but 'image_url'; .* text only"),
    (turn("user", ["x"]), "part 1 is not text but 'a string'"),
    (turn("user", []), '"content" in turn 2 .* is empty'),
    (turn("assistant", None) | {"tool_calls": []}, '"content" in turn 2 .* must be a string, not null'),
    (turn("assistant", None) | {"tool_calls": "{"}, '"tool_calls" in turn 2 .* is not valid JSON'),
    (turn("assistant", None) | {"tool_calls": [3]}, '"tool_calls" in turn 2 .* it holds a number'),
    (turn("assistant", None) | {"tool_calls": [{}]}, 'call 1 in turn 2 .* has no "name"'),
    (turn("assistant", None) | {"tool_calls": [{"name": "f"}]}, '"arguments" of call 1 in turn 2 .*, not null'),
    (turn("assistant", None) | {"tool_calls": [{"name": "f", "arguments": "x"}]}, '"arguments" of .* not valid JSON'),
    (turn("assistant", None) | {"tool_calls": [{"name": "\udc80", "arguments": {}}]}, "half a surrogate"),
    (turn("function_call", "no JSON"), '"content" in turn 2 .* is not valid JSON'),
    (turn("system", "x") | {"tools": "weather"}, '"tools" in turn 2 .* is not valid JSON'),
    (turn("system", "x") | {"tools": ["[]"]}, '"tools" in turn 2 .* it holds a list'),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_TURNS)
def test_turns_that_are_no_turns_are_named(bad, reason):
    with pytest.raises(RecordError, match=reason):
        parse_record("conversation", json.dumps({"conversations": [ASKED, bad, ANSWERED]}))


def test_what_is_not_used_is_counted():
    unused = Counter()
    turns = [
        turn("user", "a") | {"weight": 0, "reasoning_content": "x", "name": None},
        turn("assistant", "b") | {"weight": 1, "tools": [], "tool_calls": None},
    ]
    for _ in range(2):
        parse_record("conversation", line(conversations=turns, tools=None, id=7), unused)
    assert unused == {
        '"weight" of turns': 4, '"reasoning_content" of turns': 2, '"tools" of turns': 2, '"id" of records': 2,
    }  # fmt: skip
    for number in range(100):
        parse_record("pretrain", line(text="x", **{f"key {number}": 1}), unused)
    assert len(unused) == 20


def test_other_keys_of_a_record_are_ignored():
    assert parse_record("pretrain", line(text=" 天 ", source="web")) == " 天 "
    assert conversation(turn("user", "a") | {"id": 7}, turn("assistant", "b")) == [
        turn("user", "a"),
        GOOD[1] | {"content": "b"},
    ]


def test_pretrain_ids_have_one_bos_and_one_eos(tokenizer):
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    texts = ["天空", "<|im_start|>天空<|im_end|>", "<|im_start|>天空", "天空<|im_end|>", "<|im_start|>", "<|im_end|>"]
    inner = tokenizer.encode_documents(["天空"])[0]
    documents = tokenize_records("pretrain", texts, tokenizer)
    assert [ids for ids, _ in documents] == [[bos, *inner, eos]] * 4 + [[bos, eos]] * 2
    assert {mask for _, mask in documents} == {None}


def test_conversations_are_what_the_tokenizer_makes_of_them(tokenizer):
    records = [GOOD, [turn("system", "brief"), *GOOD, *GOOD]]
    assert tokenize_records("conversation", records, tokenizer) == [tokenizer.encode_conversation(r) for r in records]


@pytest.mark.parametrize("system", [[], [turn("system", "简短")]])
def test_preference_masks_the_answers_that_differ(tokenizer, system):
    history = [*system, turn("user", "1+1"), turn("assistant", "2"), turn("user", "<|im_end|>更多")]
    chosen = [*history, turn("assistant", "四")]
    rejected = [*history, turn("assistant", "五六"), turn("user", "不"), turn("assistant", "七")]
    record = parse_record("preference", line(chosen=chosen, rejected=rejected))
    documents = tokenize_records("preference", [record, record], tokenizer)
    assert documents[:2] == documents[2:]
    for (ids, mask), turns, answer in zip(documents, (chosen, rejected), ("四", "五六 七"), strict=False):
        assert ids == tokenizer.encode_conversation(turns)[0]
        answers = [[*content, tokenizer.eos_id] for content in tokenizer.encode_contents(answer.split())]
        assert [i for i, m in zip(ids, mask, strict=True) if m] == sum(answers, [])


def test_preference_prompt_may_end_with_an_answer(tokenizer):
    chosen, rejected = ([*GOOD, turn("user", text), turn("assistant", "same")] for text in ("a", "b"))
    for ids, mask in tokenize_records("preference", [(chosen, rejected)], tokenizer):
        learned = [i for i, m in zip(ids, mask, strict=True) if m]
        assert learned == [*tokenizer.encode_contents(["same"])[0], tokenizer.eos_id]


def test_preference_without_a_shared_prompt_masks_all_answers(tokenizer):
    chosen, rejected = [turn("user", "a"), turn("assistant", "b")], [turn("user", "c"), turn("assistant", "d")]
    documents = tokenize_records("preference", [(chosen, rejected)], tokenizer)
    assert documents == [tokenizer.encode_conversation(chosen), tokenizer.encode_conversation(rejected)]


def test_target_bytes_are_those_of_the_text_that_is_learned():
    assert count_target_bytes("pretrain", "天a") == 4
    assert (
        count_target_bytes("conversation", [turn("user", "xyz"), turn("assistant", "天"), turn("assistant", "a")]) == 4
    )
    calling = {"role": "assistant", "content": "天", "reasoning_content": "ab", "tool_calls": [CALL]}
    assert count_target_bytes("conversation", [GOOD[0], calling]) == 5 + len(
        json.dumps([CALL], ensure_ascii=False).encode()
    )
    assert count_target_bytes("preference", ([turn("assistant", "ab")], [turn("assistant", "c")])) == 3
    prompt = [turn("user", "a"), turn("assistant", "not learned"), turn("user", "b")]
    sides = [*prompt, turn("assistant", "ab")], [*prompt, turn("assistant", "c")]
    assert count_target_bytes("preference", sides) == 3
