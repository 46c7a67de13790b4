"""The conversation of the web page: what can be done to it, what a model is told of it, how it is shown."""

import json

import pytest

from scripts.web_conversation import COMPLETE, FAILED, STOPPED, Answer, Conversation
from scripts.web_markdown import literal, safe_markdown


@pytest.fixture
def conversation() -> Conversation:
    """Three questions, each answered with its number."""
    conversation = Conversation()
    for number in range(3):
        answer = conversation.ask(f"question {number}")
        answer.text, answer.ending = f"answer {number}", COMPLETE
    return conversation


def said(conversation: Conversation) -> list[str]:
    return [text for turn in conversation.turns for text in (turn.question, turn.answer.text)]


# --- turns -----------------------------------------------------------------------------------------------------------


def test_another_answer_keeps_the_earlier_ones(conversation):
    answer = conversation.again(conversation.turns[1])
    assert said(conversation)[2:4] == ["question 1", ""] and len(conversation.turns) == 3
    assert conversation.turns[1].answer is answer and conversation.turns[1].answers[0].text == "answer 1"
    messages = conversation.messages(5, turn=conversation.turns[1])
    assert [message["content"] for message in messages] == ["question 0", "answer 0", "question 1"]


def test_an_edited_question_cuts_off_what_came_after(conversation):
    conversation.edit(conversation.turns[1], "another")
    assert said(conversation) == ["question 0", "answer 0", "another", ""]


def test_deleting_takes_out_one_turn(conversation):
    conversation.delete(conversation.turns[1])
    assert said(conversation) == ["question 0", "answer 0", "question 2", "answer 2"]


@pytest.mark.parametrize(
    "change", [lambda c: c.clear(), lambda c: c.delete(c.turns[0]), lambda c: c.edit(c.turns[0], "x")]
)
def test_what_takes_something_away_can_be_undone_once(conversation, change):
    before = said(conversation)
    change(conversation)
    assert said(conversation) != before and conversation.undo_label
    conversation.undo()
    assert said(conversation) == before and not conversation.undo_label
    conversation.undo()
    assert said(conversation) == before


def test_undo_ends_with_the_next_answer_or_question(conversation):
    conversation.delete(conversation.turns[1])
    conversation.again(conversation.turns[0])
    conversation.undo()
    assert len(conversation.turns) == 2 and len(conversation.turns[0].answers) == 2
    conversation.clear()
    conversation.ask("new")
    conversation.undo()
    assert said(conversation) == ["new", ""]


def test_an_answer_that_grows_on_does_not_change_what_undo_brings_back(conversation):
    answer = conversation.turns[0].answer
    conversation.clear()
    answer.text += " and more"
    conversation.undo()
    assert conversation.turns[0].answer.text == "answer 0"


# --- what a model is told --------------------------------------------------------------------------------------------


def test_messages_hold_the_wanted_number_of_earlier_turns(conversation):
    conversation.ask("now")
    contents = [message["content"] for message in conversation.messages(history_turns=2)]
    assert contents == ["question 1", "answer 1", "question 2", "answer 2", "now"]
    assert [message["role"] for message in conversation.messages(2)] == ["user", "assistant"] * 2 + ["user"]
    assert conversation.messages(0) == [{"role": "user", "content": "now"}]
    assert len(conversation.messages(20)) == 7


def test_messages_open_with_the_system_prompt_if_there_is_one(conversation):
    assert conversation.messages(0, " Be brief. ")[0] == {"role": "system", "content": "Be brief."}
    assert conversation.messages(0, "  ")[0]["role"] == "user"


def test_messages_leave_out_thoughts_and_turns_without_an_answer(conversation):
    conversation.turns[0].answer.thought = "a thought"
    conversation.turns[1].answer.text = ""
    conversation.ask("now")
    contents = [message["content"] for message in conversation.messages(5)]
    assert contents == ["question 0", "answer 0", "question 2", "answer 2", "now"]


def test_the_line_under_an_answer_says_how_many_and_how_fast():
    assert Answer(tokens=128, tokens_per_second=43.21).pace() == "128 tokens · 43.2 tokens/s"
    assert Answer(tokens=1).pace() == "1 token"


# --- export ----------------------------------------------------------------------------------------------------------


def test_exported_json_is_a_training_record_with_everything_said(conversation):
    conversation.turns[1].answer.thought = "想一想"
    record = json.loads(conversation.to_json())
    assert [turn["content"] for turn in record["conversations"]] == said(conversation)
    assert [turn["role"] for turn in record["conversations"]] == ["user", "assistant"] * 3
    assert record["turns"][1]["answers"][0]["thought"] == "想一想"
    for turn, ending in zip(conversation.turns, (STOPPED, FAILED, ""), strict=True):
        turn.answer.ending = ending
    conversation.ask("three").ending = COMPLETE
    record = json.loads(conversation.to_json())
    assert record["conversations"] == [] and len(record["turns"]) == 4, "training learns only from complete answers"


def test_exported_markdown_holds_questions_thoughts_and_answers(conversation):
    conversation.turns[0].question = "two\nlines"
    conversation.turns[1].answer.thought = "hm"
    conversation.turns[2].answer.error = "it failed"
    text = conversation.to_markdown()
    assert "> two\n> lines" in text and "> hm" in text and "answer 2" in text and "it failed" in text


# --- showing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a < b <script>", "a &lt; b &lt;script>"),
        ("![x](http://e/i.png)", "!\u2060[x](http://e/i.png)"),
        ("`a < b`", "`a < b`"),
        ("costs $5 and $6", "costs \\$5 and \\$6"),
        ("so $x<y$ holds", "so $x<y$ holds"),
        ("so \\(x\\) holds", "so $x$ holds"),
        ("\\[x^2\\]", "\n\n$$\nx^2\n$$\n\n"),
        (":red[x] 12:30", ":\u2060red[x] 12:30"),
        ("one\ntwo", "one  \ntwo"),
        ("**bold**\n\n- a", "**bold**\n\n- a"),
        ("tab\x00\x1b[31m", "tab[31m"),
    ],
)
def test_markdown_is_shown_as_it_was_meant(text, shown):
    assert safe_markdown(text) == shown


def test_code_blocks_are_kept_to_the_letter():
    code = 'if (![1].x < 2) { // $5 :red[x] <b>\n\n    return "```";\n}'
    assert safe_markdown(f"before\n````js\n{code}\n````\nafter") == f"before  \n````js\n{code}\n````  \nafter"
    for kept in ("```python\nx < 1", "1. a\n\n   ```\n   x < 1\n   ```", "~~~ `\nx < 1\n~~~", "`` a ` <b> ``"):
        assert safe_markdown(kept) == kept, "closed, in a list, or still open while it streams"
    assert safe_markdown("```x```\n<b>") == "```x```  \n&lt;b>"


@pytest.mark.parametrize(
    "code",
    ["- ```\n  a < b\n  ```", "> ```c\n> a < b\n> ```", "12. ```\n    a < b\n    ```", "`a <\nb`",
     "text\n\n    if a < b:\n        $x$\n\n    ![1]\n"],
)  # fmt: skip
def test_code_in_lists_quotes_paragraphs_and_indented_is_kept_and_what_follows_is_text(code):
    assert safe_markdown(f"{code}\n\na < b") == f"{code}\n\na &lt; b"
    for text in ("1. a\n\n    b < c", "`a\n\nb < c`", "- `a\n- b < c`", "text <b\n\n    x\n\nb < c"):
        assert safe_markdown(text).endswith("b &lt; c" + "`" * text.endswith("`")) and "<" not in safe_markdown(text)


def test_tables_are_kept():
    table = "| a | b |\n|---|---|\n| 1 | `x` |"
    assert [line.strip() for line in safe_markdown(table).splitlines()] == table.splitlines()


def test_literal_text_has_no_markdown():
    from markdown_it import MarkdownIt

    text = "# *a* `b` [c](d) <e> & 1. _f_ $g$ :red[h] ![i](j) ~k~ | l |"
    inline = next(token for token in MarkdownIt().parse(literal(text)) if token.type == "inline")
    assert "".join(child.content for child in inline.children if child.type.startswith("text")) == text.replace(
        ":red", ":\u2060red"
    )
    assert {child.type for child in inline.children} <= {"text", "text_special", "softbreak"}


def test_literal_text_keeps_its_indentation():
    from markdown_it import MarkdownIt

    tokens = MarkdownIt().parse(literal("if x:\n    *y*\n\n\tz"))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"] * 2
    lines = ["".join(child.content or "\n" for child in token.children) for token in tokens if token.children]
    assert lines == ["if x:\n\u00a0\u00a0\u00a0\u00a0*y*", "\u00a0\u00a0\u00a0\u00a0z"]
