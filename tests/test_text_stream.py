"""Text of an answer as it streams: whole characters, stop strings, thoughts, tool calls, wherever the ids cut it."""

import json
import random
import time

import pytest

from dataset.text_stream import StopStrings, TextStream, ThoughtSplitter, ToolCall, ToolCallSplitter


def streamed(tokenizer, text: str, **options) -> tuple[str, str, bool]:
    """(thought, answer, stopped) of a text that arrives id by id."""
    stream, pieces = TextStream(tokenizer, **options), []
    for token_id in tokenizer.encode_contents([text])[0]:
        pieces += stream.push(token_id)
    pieces += stream.flush()
    assert all(piece.text for piece in pieces)
    thought, answer = ("".join(piece.text for piece in pieces if piece.is_thought == kind) for kind in (True, False))
    return thought, answer, stream.stopped


def pushed(splitter, text: str, cuts: list[int]) -> list:
    bounds = [0, *cuts, len(text)]
    return [part for a, b in zip(bounds, bounds[1:], strict=False) for part in splitter.push(text[a:b])]


def test_a_thought_that_the_prompt_opens_is_one(tokenizer):
    prompts = [tokenizer.encode_contents([text])[0] for text in ("assistant\n<think>\n", "assistant\n", "")]
    said = [streamed(tokenizer, "hm\n</think>\n\n42", split_thoughts=True, prompt_ids=ids) for ids in prompts]
    assert said[0] == ("hm", "42", False)
    assert said[1] == said[2] and said[1][0] == ""


@pytest.mark.parametrize(
    "text", ["你好，世界", "  two spaces, and a newline\n", "👶🏽 emoji ا é", "<think>no tag here"]
)
def test_text_arrives_unchanged_and_in_whole_characters(tokenizer, text):
    stream, shown = TextStream(tokenizer), ""
    for token_id in tokenizer.encode_contents([text])[0]:
        for piece in stream.push(token_id):
            assert "\ufffd" not in piece.text and not piece.is_thought
            shown += piece.text
        assert text.startswith(shown)
    assert shown + "".join(piece.text for piece in stream.flush()) == text


def test_a_character_that_is_never_completed_is_shown_as_such(tokenizer):
    stream = TextStream(tokenizer)
    half = tokenizer.encode_contents(["\U0001f9ff"])[0][:-1]  # an emoji takes several ids
    assert len(half) and [piece for token_id in half for piece in stream.push(token_id)] == []
    assert [piece.text for piece in stream.flush()] == ["\ufffd"]


@pytest.mark.parametrize(
    "stop, shown",
    [
        (["STOP"], "one ST two "),
        (["two"], "one ST "),
        (["three", "x S"], "one ST two STOP "),
        (["never"], "one ST two STOP three"),
        (["hree"], "one ST two STOP t"),
        (["one"], ""),
    ],
)
def test_a_stop_string_ends_the_text_and_is_not_shown(tokenizer, stop, shown):
    text = "one ST two STOP three"
    assert streamed(tokenizer, text, stop=stop) == ("", shown, shown != text)


def test_stop_strings_across_any_border_and_as_a_person_would_find_them():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=12))
        strings = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        # read character by character, the text ends as soon as it ends in one of them
        expected = text
        for end in range(1, len(text) + 1):
            if hits := [s for s in strings if text[:end].endswith(s)]:
                expected = text[: end - max(map(len, hits))]
                break
        for cuts in ([], list(range(len(text))), sorted(rng.sample(range(12), 3))):
            stop, shown = StopStrings(strings), ""
            for part in pushed(stop, text, cuts):
                shown += part
            assert shown + stop.flush() == expected
            assert stop.stopped == (expected != text)


def test_only_what_may_become_a_stop_string_is_held_back():
    stop = StopStrings(["\nUser:"])
    assert stop.push("answer\nUs") == "answer"
    assert stop.push("ual") == "\nUsual"
    assert stop.push("\nUser: more") == "" and stop.stopped and stop.push("x") == "" and stop.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_thoughts_and_stop_strings_together(tokenizer):
    text = "<think>\nlet me see\n</think>\n<answer>\n42. END and more\n</answer>"
    assert streamed(tokenizer, text, split_thoughts=True) == ("let me see", "42. END and more", False)
    assert streamed(tokenizer, text, split_thoughts=True, stop=["END"]) == ("let me see", "42.", True)
    assert streamed(tokenizer, text, split_thoughts=True, stop=["me"]) == ("let", "", True)
    assert streamed(tokenizer, text) == ("", text, False)


def test_an_answer_without_tags_keeps_its_white_space(tokenizer):
    assert streamed(tokenizer, "  indented\n", split_thoughts=True) == ("", "  indented\n", False)


@pytest.mark.parametrize(
    "make, piece",
    [
        (ThoughtSplitter, " " * 11),
        (ThoughtSplitter, "<think>"),
        (ToolCallSplitter, " " * 11),
        (ToolCallSplitter, "<tool_call>"),
        (lambda: StopStrings(["x" + " " * 90_000, " " * 90_000 + "x"]), " " * 11),
        (lambda: StopStrings(["ab" * 40_000 + "c", "c" + "ab" * 40_000]), "ab" * 5 + "a"),
    ],
)
def test_a_model_that_repeats_itself_costs_no_more_than_any_other(make, piece):
    splitter, start = make(), time.process_time()
    for _ in range(8000):
        splitter.push(piece)
    splitter.flush()
    assert time.process_time() - start < 2  # about 0.1 s; minutes where all that is held back is read each time


def test_white_space_is_held_back_until_a_tag_or_a_word_follows():
    def pieces(splitter, *texts):
        return [[part if isinstance(part, str) else tuple(part) for part in splitter.push(text)] for text in texts]

    splitter = ThoughtSplitter()
    assert pieces(splitter, "a", "\n", " ", "\n", "b", " ", "<thi", "nk>", "\n", "c ", " </think>", " ") == [
        [(False, "a")], [], [], [], [(False, "\n \nb")], [], [], [], [], [(True, "c")], [], [],
    ]  # fmt: skip
    assert splitter.flush() == []
    splitter = ToolCallSplitter()
    assert pieces(splitter, "a", " ", "\n", "b", " ", "<tool", " ", "_call>") == [
        ["a"], [], [], [" \nb"], [], [], [" <tool"], [" _call>"],
    ]  # fmt: skip


# --- tool calls ------------------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
WEATHER = ToolCall("weather", '{"city": "北京"}')


def calls_of(text: str, cuts: list[int]) -> list:
    splitter = ToolCallSplitter()
    parts, joined = pushed(splitter, text, cuts) + splitter.flush(), []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize(
    "text, parts",
    [
        (CALL, [WEATHER]),
        ("Let me look.\n" + CALL, ["Let me look.", WEATHER]),
        (CALL + "\n" + CALL + "\n", [WEATHER, WEATHER]),
        ("a" + CALL + " b ", ["a", WEATHER, "b "]),
        ("no call <tool> at all ", ["no call <tool> at all "]),
        ("<tool_call>not JSON</tool_call> b", ["<tool_call>not JSON</tool_call> b"]),
        ("a <tool_call>[1]</tool_call>" + CALL, ["a <tool_call>[1]</tool_call>", WEATHER]),
        ('<tool_call>{"name": 1}</tool_call>', ['<tool_call>{"name": 1}</tool_call>']),
        ('x <tool_call>{"name": "cut', ['x <tool_call>{"name": "cut']),
        ('<tool_call>{"name": "now"}</tool_call>', [ToolCall("now", "{}")]),
        ("", []),
    ],
)
def test_tool_calls_are_taken_out_wherever_the_text_is_cut(text, parts):
    assert calls_of(text, []) == parts
    assert calls_of(text, list(range(len(text)))) == parts
    for cut in range(len(text)):
        assert calls_of(text, [cut]) == parts


def test_arguments_are_json(tokenizer):
    assert json.loads(calls_of(CALL, [])[0].arguments) == {"city": "北京"}
