"""The scorer: log-likelihoods are those of one sequence after another, layouts are read as published, and it can tell a
model that knows from one that does not and from one that likes a letter."""

import json
import math
import random
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import sentence, sharp_model, write_conversations, write_jsonl, write_weights
from served import running_server, write_models

from dataset.lm_dataset import parse_record
from model.weights import load_model
from scripts import evaluate, evaluation_sets
from scripts.evaluate import Candidate, main, score_options, summary
from scripts.evaluation_sets import Question, read_set
from scripts.log_likelihoods import lay_out, log_likelihoods, log_likelihoods_of_server

ASKED = Namespace(shots=2, permutations=3, samples=3, match="auto", name="MiniMind")


def random_pairs(count: int = 24, vocab: int = 600) -> list[tuple[list[int], list[int]]]:
    """Contexts that share beginnings of different lengths, each with options of one to five tokens."""
    rng = random.Random(0)
    ids = [rng.randrange(3, vocab) for _ in range(40)]
    pairs = []
    for _ in range(count):
        context = ids[: rng.randint(1, 30)] + [rng.randrange(3, vocab) for _ in range(rng.randint(0, 6))]
        pairs += [(context, [rng.randrange(3, vocab) for _ in range(rng.randint(1, 5))]) for _ in range(3)]
    return pairs


@pytest.mark.parametrize("longest", [1, 64, 4096])
@pytest.mark.parametrize("use_moe", [False, True])
def test_log_likelihoods_are_those_of_one_sequence_after_another(use_moe, longest):
    model, pairs = sharp_model(use_moe).eval(), random_pairs()
    expected = []
    with torch.inference_mode():
        for context, continuation in pairs:
            log_probs = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(dim=-1)
            places = range(len(context) - 1, len(context) + len(continuation) - 1)
            expected.append(sum(float(log_probs[p, t]) for p, t in zip(places, continuation, strict=True)))
    assert log_likelihoods(model, pairs, longest) == pytest.approx(expected, rel=1e-4)


def test_a_model_of_transformers_gives_the_same():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    model, pairs = LlamaForCausalLM(config).eval(), random_pairs(8)
    alone = [log_likelihoods(model, [pair])[0] for pair in pairs]
    assert log_likelihoods(model, pairs) == pytest.approx(alone, rel=1e-4)


def test_a_shared_beginning_is_read_once():
    question = list(range(100, 150))
    rows = list(lay_out([(question, [letter]) for letter in (5, 6, 7)] + [(question, [8, 9])], longest=100))
    assert [row.ids for row in rows] == [[*question, 8]]
    assert [row.ends[0] for row in rows] == [51]


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path):
    """One set in each layout, all with the question of two apples."""
    folder = tmp_path / "eval"
    table = {
        "ceval/dev/logic_dev.csv": "id,question,A,B,C,D,answer,explanation\n0,一加零？,0,1,2,3,B,因为\n",
        "ceval/val/logic_val.csv": "id,question,A,B,C,D,answer\n0,一加一？,1,2,3,4,B\n1,二加一？,1,2,3,4,C\n",
        "ceval/val/art_val.csv": "id,question,A,B,C,D,answer\n0,红加黄？,橙,绿,紫,白,A\n",
        "ceval/test/logic_test.csv": "id,question,A,B,C,D\n0,三加一？,1,2,3,4\n",
        "cmmlu/dev/logic.csv": ",Question,A,B,C,D,Answer\n0,一加零？,0,1,2,3,B\n",
        "cmmlu/test/logic.csv": ",Question,A,B,C,D,Answer\n0,一加一？,1,2,3,4,B\n",
        "mmlu/test/logic_test.csv": '"One, and one?",1,2,3,4,B\nTwo and one?,1,2,3,4,C\n',
    }
    for name, text in table.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "core").mkdir()
    write_jsonl(folder / "core" / "easy.jsonl", [{"query": "Question: One and one?", "choices": ["1", "2"], "gold": 1}])
    write_jsonl(folder / "ours.jsonl", [{"question": "1+1", "A": "1", "B": "2", "C": "3", "answer": "B"}])
    hub = {"question": "One and one?", "choices": {"text": ["1", "2"], "label": ["1", "2"]}, "answerKey": "2"}
    write_jsonl(folder / "hub.jsonl", [hub])
    write_jsonl(folder / "gsm8k.jsonl", [{"question": "One and one?", "answer": "1 + 1 = 2\n#### 2"}] * 3)
    write_jsonl(
        folder / "sums.jsonl", [{"conversations": [{"role": "user", "content": "一加一？"}], "answer": "二个"}] * 2
    )
    return folder


@pytest.mark.parametrize(
    ("name", "subjects", "first"),
    [
        ("ceval", ["art", "logic", "logic"], Question("art", "红加黄？", ["橙", "绿", "紫", "白"], 0)),
        ("cmmlu", ["logic"], Question("logic", "一加一？", ["1", "2", "3", "4"], 1)),
        ("mmlu", ["logic", "logic"], Question("logic", "One, and one?", ["1", "2", "3", "4"], 1)),
        ("easy", ["easy"], Question("easy", "Question: One and one?", ["1", "2"], 1)),
        ("ours", ["ours"], Question("ours", "1+1", ["1", "2", "3"], 1)),
        ("hub", ["hub"], Question("hub", "Question: One and one?", ["1", "2"], 1)),
        ("sums", ["sums"] * 2, Question("sums", [{"role": "user", "content": "一加一？"}], [], "二个")),
    ],
)
def test_a_set_is_read_in_its_published_layout(sets, name, subjects, first):
    found = read_set(name, sets)
    assert [question.subject for question in found.questions] == subjects
    assert found.questions[0] == first
    if name in ("ceval", "cmmlu"):
        assert found.examples["logic"] == [Question("logic", "一加零？", ["0", "1", "2", "3"], 1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "q", "choices": ["a", "b"], "gold": 2}], "none of 2 options"),
        ([{"question": "q", "A": "a", "B": "b", "answer": "E"}], "row 1: the answer 'E' is none of 2 options"),
        ([{"prompt": "q"}], "missing among the columns prompt"),
        ([{"question": "q", "A": "a", "answer": "A"}], "none of 1 options"),
        ([{"question": "q", "answer": "####"}], "the answer is empty"),
        ([{"conversations": [{"role": "user"}], "answer": "a"}], 'row 1: "content" in turn 1 of "conversations"'),
        ([{"query": "q", "choices": ["a"] * 27, "gold": 2}], "27 choices are more than there are letters"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, rows, message):
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        read_set(str(path), tmp_path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "A": "a", "B": "b", "C": "", "D": "d", "E": "e", "answer": "D"}, (["a", "b", "d", "e"], 2)),
        ({"question": "q", "A": "aa", "B": "bb", "C": "", "D": "dd", "answer": 3}, (["aa", "bb", "dd"], 2)),
        ({"question": "q", "choices": [*map(str, range(12))], "answer": "L"}, ([*map(str, range(12))], 11)),
        ({"question": 7, "A": 1, "B": 0, "answer": "B"}, (["1", "0"], 1)),
        ({"question": "q", "A": "a", "B": "b", "answer": "A", "subject": 3}, (["a", "b"], 0)),
    ],
    ids=["empty option", "counted from 0", "twelve choices", "numbers", "numbered subject"],
)  # fmt: skip
def test_the_gold_option_is_the_one_that_is_named(tmp_path, row, expected):
    rows = [row, {"question": "q", "A": "a", "B": "b", "answer": "A"}]
    found = read_set(str(write_jsonl(tmp_path / "set.jsonl", rows)), tmp_path).questions
    assert expected in [(question.options, question.gold) for question in found]
    assert all(isinstance(text, str) for question in found for text in (question.subject, question.text))


def test_a_set_that_is_not_there_is_named_with_its_download(sets):
    with pytest.raises(ValueError, match="--tasks arc_easy: .*--download. There is: .*ceval"):
        read_set("arc_easy", sets)
    (sets / "wrong.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="wrong.csv: columns a, b; expected question"):
        read_set("wrong", sets)


def test_a_download_is_unpacked_or_sorted_by_split(tmp_path, monkeypatch, sets):
    import zipfile

    archive = tmp_path / "ceval-exam.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((sets / "ceval").rglob("*.csv")):
            file.write(path, path.relative_to(sets / "ceval"))
    fetched = []
    monkeypatch.setattr(evaluation_sets, "hf_hub_download", lambda *a, **o: fetched.append((a, o)) or str(archive))
    evaluation_sets.download("ceval", tmp_path / "new")
    evaluation_sets.download("ceval", tmp_path / "new")
    assert len(fetched) == 1 and re.fullmatch("[0-9a-f]{40}", fetched[0][1]["revision"])
    assert read_set("ceval", tmp_path / "new").questions == read_set("ceval", sets).questions


# --- what it can tell ------------------------------------------------------------------------------------------------


def quiz(count: int = 200) -> list[Question]:
    """Questions about one-token words whose answer is the question's own word."""
    rng, words = random.Random(0), ["red", "blue", "green", "white", "black", "river", "house", "stone"]
    questions = []
    for _ in range(count):
        options = rng.sample(words, 4)
        gold = rng.randrange(4)
        questions.append(Question("words", f"Question: Which is {options[gold]}?", options, gold))
    return questions


def scored(tokenizer, likes, questions, chat=False) -> dict:
    """The summary of a model that gives likes(text of the context, text of the option)."""

    def score(pairs):
        return [likes(tokenizer.decode(context), tokenizer.decode(option).strip()) for context, option in pairs]

    candidate = Candidate("fake", tokenizer, 512, chat, {}, score, None)
    return summary(questions, score_options(candidate, questions, {"words": questions[:3]}, ASKED))


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_that_knows_scores_all_and_one_that_guesses_sits_at_chance(tokenizer, chat):
    questions, rng = quiz(), random.Random(1)

    def knows(context: str, option: str) -> float:
        asked = context[context.rfind("Which is") :]
        word = re.match(r"Which is (\w+)\?", asked)
        return (
            0.0
            if word is None
            else float(f". {word[1]}" in asked and f"{option}. {word[1]}" in asked) + float(option == word[1])
        )

    result = scored(tokenizer, knows, questions, chat)
    assert all(result[way]["accuracy"] == 1 for way in evaluate.WAYS)
    assert result["letters"]["permuted"] == 1 and result["letters"]["same_option"] == 1
    assert result["letters"]["explained"] < 0.4  # four letters, each a quarter of the answers
    assert result["mean_shots"] == 2 and result["cut"] == 0
    guess = scored(tokenizer, lambda *_: rng.random(), questions, chat)
    for way in evaluate.WAYS:
        assert abs(guess[way]["accuracy"] - 0.25) < 3 * guess[way]["stderr"]
    assert abs(guess["letters"]["permuted"] - guess["letters"]["accuracy"]) < 3 * guess["letters"]["stderr"]


def test_a_model_that_likes_a_letter_is_explained_by_it(tokenizer):
    result = scored(tokenizer, lambda _, option: float(option == "C"), quiz())
    letters = result["letters"]
    assert letters["picked"] == {"C": 1.0} and letters["explained"] == pytest.approx(1)
    assert letters["same_option"] == 0
    assert letters["accuracy"] == letters["without_question"]
    # four orders bring each option to C once, so all of them together are right exactly a quarter of the time
    assert letters["permuted"] * 3 + letters["accuracy"] == pytest.approx(1)


def test_scores_without_the_question_are_taken_off(tokenizer):
    likes_first = {"red": 5.0}
    result = scored(tokenizer, lambda context, option: likes_first.get(option, 0.0) + (option in context), quiz())
    assert result["sum"]["accuracy"] < 0.9 and result["sum"]["calibrated"] > result["sum"]["accuracy"]


def test_written_answers_are_counted_by_number_and_by_majority(tokenizer):
    questions = [Question("sums", [{"role": "user", "content": "1+1?"}], [], "#### 2")] * 2
    answers = iter(["It is 2.", "3", "two times one = 2", "3", "3", "2"])
    candidate = Candidate("fake", tokenizer, 512, True, {}, None, lambda prompts: [next(answers) for _ in prompts])
    result = summary(questions, evaluate.write_answers(candidate, questions, ASKED))
    assert (result["questions"], result["samples"]) == (2, 3)
    assert result["pass@1"] == pytest.approx(0.5) and result["majority"] == 0.5


@pytest.mark.parametrize(
    ("match", "gold", "said"),
    [
        ("exact", "巴黎", ["巴黎。", "巴黎", " 巴黎！", "伦敦", "伦敦"]),
        ("choice", "B", ["B", "答案：B", "(B) it", "A", "A"]),
        ("choice", "F", ["F", "F", "(F) it", "E", "E"]),
        ("number", "2", ["2", "2.0", "is 2", "3", "3"]),
    ],
)
def test_answers_that_mean_the_same_vote_together(tokenizer, match, gold, said):
    question = Question("s", [{"role": "user", "content": "?"}], [], gold)
    candidate = Candidate("fake", tokenizer, 512, True, {}, None, lambda prompts: said)
    asked = Namespace(**vars(ASKED) | {"samples": 5, "match": match})
    [record] = evaluate.write_answers(candidate, [question], asked)
    assert record["right"] == [True, True, True, False, False] and record["majority"]


@pytest.mark.parametrize(
    ("shares", "error"),
    [
        ([1] * 25 + [0] * 75, 0.04352),  # sqrt(0.25 * 0.75 / 99)
        ([0.5, 1, 0, 0.5], 0.20412),  # sqrt((0 + 0.25 + 0.25 + 0) / 3 / 4)
        ([1] * 382, 0.00365),  # 384 of 386: sqrt(384 * 2 / 386^3)
        ([0, 0], 0.19245),  # 2 of 6: sqrt(1/3 * 2/3 / 6)
        ([1], None),
    ],
)
def test_a_standard_error_by_hand(shares, error):
    assert evaluate.standard_error(shares) == (error and pytest.approx(error, abs=5e-6))
    found = evaluate.figures(
        {"questions": len(shares)} | evaluate.passed([{"right": [s], "majority": s} for s in shares])
    )
    mean = 100 * sum(shares) / len(shares)
    assert found["pass@1"][2] == f"{mean:.1f} ± " + ("–" if error is None else f"{100 * error:.1f}")


def test_shares_of_permuted_options_have_an_error_too(tokenizer):
    result = scored(tokenizer, lambda _, option: float(option in ("C", "red")), quiz())
    shown = {title: figure for title, (*_, figure) in evaluate.figures(result).items()}
    for title in ("calibrated", "without_question", "permuted", "same_option"):
        share = result["letters"][title]
        assert 0 < result["letters"][f"{title}_stderr"] < 0.04 and shown[f"letters: {title}"].startswith(
            f"{100 * share:.1f} ± "
        )
    assert "±" not in shown["letters: explained"] and shown["worked examples, mean"] == "2"


def test_a_prompt_that_leaves_no_room_is_a_wrong_answer_and_counted(tokenizer):
    questions = [Question("s", [{"role": "user", "content": text}], [], "yes") for text in ("a?", "b? " * 50)]
    asked = []
    candidate = Candidate(
        "m", tokenizer, 32, True, {}, None, lambda prompts: asked.extend(prompts) or ["yes"] * len(prompts)
    )
    records = evaluate.write_answers(candidate, questions, Namespace(**vars(ASKED) | {"match": "name"}))
    result = summary(questions, records)
    assert len(asked) == ASKED.samples and (result["pass@1"], result["cut"]) == (0.5, 1)
    assert evaluate.figures(result)["cut to the context"][2] == "1"


def test_examples_and_then_the_beginning_give_way_in_a_short_context(tokenizer):
    question = Question("s", "Question: " + "word " * 30 + "?", ["a", "b"], 0)
    worked = [Question("s", "Question: one?", ["a", "b"], 0)] * 5
    roomy, short, tight = (
        evaluate.ask(Candidate("m", tokenizer, room, False, {}, None, None), question, worked, True)
        for room in (512, 80, 16)
    )
    assert roomy.shots == 5 and 0 < short.shots < 5 and tight.shots == 0
    assert (roomy.cut, short.cut, tight.cut) == (False, False, True)
    context, option = tight.pairs[0]
    assert len(context) + len(option) <= 16
    assert roomy.pairs[0][0][-len(context) :] == context


def test_ids_that_join_context_and_option_are_kept(tokenizer):
    """No text is lost if the tokenizer merges the end of the context with the beginning of an option."""
    question = Question("s", "哪一个？", ["：甲", "乙"], 0)
    for letters in (False, True):
        asked = evaluate.ask(Candidate("m", tokenizer, 512, False, {}, None, None), question, [], letters)
        options = ["A", "B"] if letters else question.options
        for (context, option), text in zip(asked.pairs, options, strict=True):
            assert option and tokenizer.decode([*context, *option]).endswith(f"答案：{text}")


# --- held-out data ---------------------------------------------------------------------------------------------------


def one_by_one(model, tokenizer, turns: list[dict]) -> tuple[float, int]:
    """Log-prob of the last answer and its tokens, eos included: no shared beginnings, no pieces."""
    prompt = tokenizer.encode_prompt(turns[:-1])
    ids, _ = tokenizer.encode_conversation(turns)
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    ids = ids[:-1]  # without the newline after eos
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))), len(ids) - len(prompt)


def evaluated(out: Path, data: Path, *flags) -> dict[str, dict]:
    """What evaluate.py writes about a file, for each of the weights."""
    flags = ["--device", "cpu", "--out_dir", out, "--output", out / "scores", "--tasks", data, *flags]
    main([str(flag) for flag in flags])
    written = [json.loads(path.read_text("utf-8")) for path in (out / "scores").glob("*.json")]
    return {result["weights"]: result["tasks"][data.stem] for result in written}


@pytest.fixture
def pairs(tmp_path):
    rng = random.Random(3)
    records = []
    for number in range(7):
        question = {"role": "user", "content": sentence(rng, 6)}
        lengths = (40, 4) if number % 3 else (4, 40)
        answers = [{"role": "assistant", "content": f"{number} " + sentence(rng, longest)} for longest in lengths]
        records.append({"chosen": [question, answers[0]], "rejected": [question, answers[1]]})
    return write_jsonl(tmp_path / "pairs.jsonl", records)


def test_the_loss_is_that_of_the_answers_one_by_one_and_positions_add_up(tmp_path, tokenizer):
    data = write_conversations(tmp_path / "data.jsonl", 6, exchanges=1)
    long = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "one two three four " * 90}]
    with data.open("a") as file:
        file.write(json.dumps({"conversations": long}) + "\n")
    path = write_weights(tmp_path / "full_sft_32.pth", tokenizer, scale=3.0)
    found = evaluated(tmp_path, data, "--max_seq_len", 1024)["full_sft_32"]
    model = load_model(path)[0].float()
    talks = [parse_record("conversation", line) for line in data.read_text("utf-8").splitlines()]
    sums = [one_by_one(model, tokenizer, turns) for turns in talks]
    nats, tokens = -sum(s for s, _ in sums), sum(n for _, n in sums)
    size = sum(len(turns[-1]["content"].encode()) for turns in talks)
    assert (found["questions"], found["tokens"]) == (7, tokens)
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    ranges = found["subjects"]
    assert list(ranges)[:2] == ["0-256", "256-512"]
    assert sum(part["tokens"] * part["loss"] for part in ranges.values()) == pytest.approx(nats, rel=1e-5)


def test_losses_by_position_are_cross_entropy_by_hand_and_feel_yarn(tmp_path, tokenizer):
    path = write_weights(tmp_path / "pretrain_32.pth", tokenizer, scale=3.0)
    text = " ".join(f"word {n}" for n in range(150))
    data = write_jsonl(tmp_path / "long.jsonl", [{"text": text}])
    flags = ["--weight", "pretrain", "--max_seq_len", 512]
    plain = evaluated(tmp_path, data, *flags)["pretrain_32"]["subjects"]["256-512"]
    stretched = evaluated(tmp_path, data, *flags, "--rope_scaling", 4, "--trained_length", 64)["pretrain_32"]
    ids = [tokenizer.bos_id, *tokenizer.encode_documents([text])[0], tokenizer.eos_id][:512]
    with torch.inference_mode():
        log_probs = load_model(path)[0].float()(torch.tensor([ids])).logits[0].log_softmax(-1)
    nats = [-float(log_probs[i - 1, ids[i]]) for i in range(256, len(ids))]
    assert plain["tokens"] == len(nats) > 50
    assert plain["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    octets = sum(len(tokenizer.token_bytes(i)) for i in ids[256:])
    assert plain["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / octets, rel=1e-4)
    assert stretched["subjects"]["256-512"]["loss"] != pytest.approx(plain["loss"], rel=1e-5)


def test_preferences_are_those_of_the_answers_one_by_one(tmp_path, tokenizer, pairs):
    paths = {name: write_weights(tmp_path / f"{name}_32.pth", tokenizer, seed=seed, scale=3.0)
             for seed, name in enumerate(("full_sft", "rlhf"))}  # fmt: skip
    found = evaluated(tmp_path, pairs, "--weight", "rlhf", "--reference", "full_sft", "--max_seq_len", 256)
    records = [parse_record("preference", line) for line in pairs.read_text("utf-8").splitlines()]
    models = {name: load_model(path)[0].float() for name, path in paths.items()}
    sums, lengths = {}, None
    for name, model in models.items():
        both = torch.tensor([[one_by_one(model, tokenizer, turns) for turns in pair] for pair in records])
        sums[name], lengths = both[..., 0], both[..., 1]
    policy = found["rlhf_32"]
    scores = {"sum": sums["rlhf"], "per_token": sums["rlhf"] / lengths, "reward": sums["rlhf"] - sums["full_sft"]}
    for way, score in scores.items():
        assert policy[way]["accuracy"] == pytest.approx(float((score[:, 0] > score[:, 1]).double().mean())), way
    assert policy["questions"] == 7
    assert {name: part["questions"] for name, part in policy["subjects"].items()} == {
        "chosen longer": 4, "chosen shorter": 3,
    }  # fmt: skip
    assert "reward" not in found["full_sft_32"] and found["full_sft_32"]["sum"]["accuracy"] != 0.5


def test_a_reward_compares_sums_over_the_same_tokens(tmp_path, tokenizer, pairs):
    """Weights that were trained on shorter rows than their reference, with the same numbers: no pair is preferred."""
    for name, length in (("full_sft", 16), ("rlhf", 256)):
        path = write_weights(tmp_path / f"{name}_32.pth", tokenizer, scale=3.0)
        sidecar = json.loads(path.with_suffix(".json").read_text()) | {"flags": {"max_seq_len": length}}
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    found = evaluated(tmp_path, pairs, "--weight", "rlhf", "--reference", "full_sft")["rlhf_32"]
    assert found["reward"]["accuracy"] == 0 and found["sum"]["accuracy"] > 0


def test_pairs_without_answers_to_compare_are_left_out_and_tokens_beyond_the_context_told(tmp_path, tokenizer, capsys):
    long = "one two three four five six seven eight nine ten " * 4
    talks = [("?", "yes", "no"), ("?", "no", "yes"), ("?", long + "yes", long + "no"), (long, "yes", "no")]
    records = []
    for asked, *answers in talks:
        sides = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for answer in answers]
        records.append(dict(zip(("chosen", "rejected"), sides, strict=True)))
    data = write_jsonl(tmp_path / "pairs.jsonl", records)
    write_weights(tmp_path / "full_sft_32.pth", tokenizer, scale=3.0)
    found = evaluated(tmp_path, data, "--max_seq_len", 40)["full_sft_32"]
    assert (found["questions"], found["left_out"]) == (2, 2)
    ids = [[tokenizer.encode_conversation(turns) for turns in record.values()] for record in records]
    learned = [sum(mask) for pair in ids for _, mask in pair]
    beyond = [sum(mask[40:]) for pair in ids for _, mask in pair]
    assert found["beyond_context"] == pytest.approx(sum(beyond) / sum(learned)) and found["beyond_context"] > 0.5
    assert re.search(r"pairs left out +\| +\| +\| 2 ", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="no pair has two answers that differ within the context"):
        evaluated(tmp_path, data, "--max_seq_len", 4)


def test_held_out_data_is_read_to_one_length_by_all_weights(tmp_path, tokenizer, capsys):
    for name, length in (("full_sft", 16), ("reason", 64)):
        path = write_weights(tmp_path / f"{name}_32.pth", tokenizer, scale=3.0)
        sidecar = json.loads(path.with_suffix(".json").read_text()) | {"flags": {"max_seq_len": length}}
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    text = " ".join(f"word {n}" for n in range(50))
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text}])
    alone = evaluated(tmp_path, data, "--weight", "full_sft")["full_sft_32"]
    both = evaluated(tmp_path, data, "--weight", "full_sft", "reason")
    assert both["full_sft_32"]["tokens"] == both["reason_32"]["tokens"] == 63 and alone["tokens"] == 15
    learned = len(tokenizer.encode_documents([text])[0]) + 1  # and eos
    assert [each["beyond_context"] for each in (alone, both["reason_32"])] == [1 - 15 / learned, 1 - 63 / learned]
    assert "beyond the context, %" in capsys.readouterr().out


def test_accuracies_of_pairs_by_hand():
    def record(*sides: tuple[float, int]) -> dict:  # nats and tokens, in two pieces
        return {"documents": [[["0-256", nats - 1, tokens - 1, 0], ["256-512", 1, 1, 0]] for nats, tokens in sides]}

    policy = [record((10, 10), (12, 4)), record((9, 9), (3, 3)), record((5, 5), (5, 5)), record((8, 2), (20, 4))]
    reference = [record((11, 10), (12, 4)), record((9, 9), (2, 3)), record((6, 5), (6, 5)), record((8, 2), (23, 4))]
    found = evaluate.preferred(policy, range(4), reference)
    # margins of the rewards: 1, 1, 0 (a tie is a miss), -3; of log-probs per token: 2, 0, 0, 1
    assert found["reward"]["accuracy"] == 0.5
    assert found["sum"]["accuracy"] == 0.5
    assert found["per_token"]["accuracy"] == 0.5
    assert evaluate.preferred(policy, [0, 3], None)["per_token"]["accuracy"] == 1


def test_answers_are_judged_by_their_form_or_by_the_name_in_them(tokenizer):
    said = ["<think>a</think><answer>b</answer>", "<think>a</think><answer>b", "I am minimind.", "no"]
    questions = [Question("s", [{"role": "user", "content": "who?"}], [], gold) for gold in ("MiniMind", "x")]

    def rights(match: str) -> list[bool]:
        answers = iter(said)
        candidate = Candidate("fake", tokenizer, 512, True, {}, None, lambda prompts: [next(answers) for _ in prompts])
        args = Namespace(**vars(ASKED) | {"match": match, "samples": 2})
        return [right for record in evaluate.write_answers(candidate, questions, args) for right in record["right"]]

    assert rights("form") == [True, False, False, False]
    assert rights("name") == [False, False, False, True]  # the second is not asked for its name, and names itself once


def test_held_out_conversations_are_answered_with_match_and_wrong_answers_shown(tmp_path, tokenizer, capsys):
    data = write_conversations(tmp_path / "data.jsonl", 3)
    write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    found = evaluated(tmp_path, data, "--match", "form", "--max_new_tokens", 4, "--examples", 2)["full_sft_32"]
    assert (found["questions"], found["pass@1"]) == (3, 0)
    printed = capsys.readouterr().out
    assert "2 of 3 wrong answers:" in printed and printed.count("(expected ") == 2
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "one two"}])
    with pytest.raises(SystemExit, match="--match form is for conversations"):
        evaluated(tmp_path, texts, "--match", "form")


def test_the_identity_questions_are_not_in_the_sample():
    def core(question: str) -> str:
        return re.sub(r"[\W_]", "", question).lower()

    root = Path(evaluate.__file__).parents[1]
    asked = {core(q.text[0]["content"]) for q in read_set(str(root / "scripts" / "identity_questions.jsonl"), root)[1]}
    lines = (root / "dataset" / "sample" / "sft.jsonl").read_text("utf-8").splitlines()
    trained = {core(turn["content"]) for line in lines for turn in parse_record("conversation", line)}
    assert len(asked) == 40 and not asked & trained


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_scores_and_goes_on_after_a_kill(sets, tmp_path, tokenizer, capsys, monkeypatch):
    out = tmp_path / "out"
    write_weights(out / "full_sft_32.pth", tokenizer)
    write_weights(out / "pretrain_32.pth", tokenizer, seed=1)
    tasks = ["--tasks", "ceval", "easy", "gsm8k", "--eval_dir", str(sets), "--out_dir", str(out), "--device", "cpu"]
    common = [*tasks, "--max_new_tokens", "4", "--max_seq_len", "256"]
    main([*common, "--weight", "full_sft", "pretrain"])
    assert re.search(r"\| full_sft_32 +\| pretrain_32 +\|\n.*\n\| ceval, letters ", capsys.readouterr().out)
    whole = json.loads((out / "scores" / "full_sft_32.json").read_text())
    assert (whole["format"], whole["weights"]) == ("chat", "full_sft_32")
    assert json.loads((out / "scores" / "pretrain_32.json").read_text())["format"] == "plain"
    assert set(whole["tasks"]) == {"ceval", "easy", "gsm8k"}
    assert set(whole["tasks"]["ceval"]["subjects"]) == {"art", "logic"}
    assert "ceval, letters" in (out / "scores" / "full_sft_32.md").read_text()
    assert not list((out / "scores").glob("*.part"))

    class Killed(Exception):
        pass

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:  # before gsm8k
        patch.setattr(evaluate, "write_answers", dies)
        with pytest.raises(Killed):
            main([*common, "--weight", "full_sft", "--output", str(tmp_path / "again.json")])
    (part,) = tmp_path.glob("again.*.part")
    with part.open("a") as file:
        file.write('{"unit": ["gsm8k", 0')  # half a line
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score_options", dies)  # not asked again
        main([*common, "--weight", "full_sft", "--output", str(tmp_path / "again.json"), "--resume"])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["tasks"] == whole["tasks"] and again["seconds"] is None


def test_sets_scored_one_after_another_stay_until_the_weights_change(sets, tmp_path, tokenizer, capsys, monkeypatch):
    def score(*flags, weights="full_sft"):
        main([*"--device cpu --max_new_tokens 4 --max_seq_len 256 --eval_dir".split(), str(sets),
              "--out_dir", str(tmp_path), "--weight", weights, "--tasks", *flags])  # fmt: skip
        shown = capsys.readouterr().out
        return json.loads((tmp_path / "scores" / "full_sft_32.json").read_text()), shown

    def scored_again(*_):
        raise AssertionError

    write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    first, _ = score("easy")
    second, shown = score("sums", "--match", "exact")
    assert second["tasks"].keys() == {"easy", "sums"} and second["tasks"]["easy"] == first["tasks"]["easy"]
    assert [second["settings"][name]["match"] for name in ("easy", "sums")] == ["auto", "exact"]
    assert "sums, pass@1" in shown and "easy, letters" not in shown
    assert "easy, letters" in (tmp_path / "scores" / "full_sft_32.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "run", scored_again)
        again, shown = score("easy", "--resume")
        assert again == second and "easy, letters" in shown
    write_jsonl(sets / "core" / "easy.jsonl", [{"query": "Question: Two?", "choices": ["2", "1", "0"], "gold": 1}])
    changed, _ = score("easy", "--resume")
    assert changed["tasks"]["easy"]["chance"] == pytest.approx(1 / 3) and "sums" in changed["tasks"]
    write_weights(tmp_path / "full_sft_32.pth", tokenizer, seed=1)
    assert score("sums")[0]["tasks"].keys() == {"sums"}


def test_weights_scored_at_once_leave_each_other_their_work(sets, tmp_path, tokenizer, monkeypatch):
    write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    common = ["--eval_dir", str(sets), "--out_dir", str(tmp_path), "--device", "cpu", "--max_seq_len", "256", "--tasks"]
    score_options, others = evaluate.score_options, [["ceval"], ["easy"]]

    def meanwhile(*asked):
        if others:
            main([*common, *others.pop(0)])
        return score_options(*asked)

    monkeypatch.setattr(evaluate, "score_options", meanwhile)
    main([*common, "easy", "ceval"])  # others score ceval, and easy, from within
    written = json.loads((tmp_path / "scores" / "full_sft_32.json").read_text())
    assert written["tasks"].keys() == {"easy", "ceval"} and not list((tmp_path / "scores").glob("*.part"))
    others.append(["easy", "ceval"])
    with pytest.raises(SystemExit, match="parts of the work are gone.*--resume"):
        main([*common, "easy", "ceval"])


def test_weights_that_are_done_are_not_scored_again_where_another_stopped(tmp_path, tokenizer, pairs, monkeypatch):
    for seed, name in enumerate(("full_sft", "rlhf")):
        write_weights(tmp_path / f"{name}_32.pth", tokenizer, seed=seed, scale=3.0)
    asked, read_records = [], evaluate.read_records

    def counted(candidate, questions):
        asked.append(candidate.name)
        if asked.count("rlhf_32") == 1:
            raise KeyboardInterrupt
        return read_records(candidate, questions)

    monkeypatch.setattr(evaluate, "read_records", counted)
    for more in (["--reference", "full_sft"], ["--weight", "full_sft", "rlhf"]):
        flags = ["--weight", "rlhf", *more, "--max_seq_len", 256]
        with pytest.raises(SystemExit, match="--resume"):
            evaluated(tmp_path, pairs, *flags)
        assert evaluated(tmp_path, pairs, *flags, "--resume")["rlhf_32"]["questions"] == 7
        assert asked.count("full_sft_32") == 1 and not list((tmp_path / "scores").glob("*.part"))
        asked.clear()


def test_an_answer_with_an_odd_line_separator_is_not_lost(sets, tmp_path, tokenizer, monkeypatch):
    write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    monkeypatch.setattr(evaluate, "generate_batch", lambda model, prompts, params, **_: [[0]] * len(prompts))
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **_: "一\u2028二\x85\u2029")
    main(["--tasks", "sums", "--eval_dir", str(sets), "--out_dir", str(tmp_path), "--device", "cpu"])
    assert json.loads((tmp_path / "scores" / "full_sft_32.json").read_text())["tasks"]["sums"]["questions"] == 2


def test_weights_of_one_name_in_two_folders_keep_their_scores_apart(sets, tmp_path, tokenizer):
    paths = [write_weights(tmp_path / name / "pretrain_32.pth", tokenizer) for name in ("slow", "fast")]
    common = ["--tasks", "easy", "--eval_dir", str(sets), "--device", "cpu", "--output", str(tmp_path / "scores")]
    main([*common, "--weight", *map(str, paths)])
    for name in ("slow_pretrain_32", "fast_pretrain_32"):
        assert json.loads((tmp_path / "scores" / f"{name}.json").read_text())["format"] == "plain"
    with pytest.raises(SystemExit, match="score them one by one"):
        main([*common, "--weight", str(paths[0]), str(paths[0].parent / ".." / "slow" / "pretrain_32.pth")])


def test_another_stretching_is_not_resumed(sets, tmp_path, tokenizer, monkeypatch):
    write_weights(tmp_path / "pretrain_32.pth", tokenizer)
    common = ["--tasks", "easy", "--eval_dir", str(sets), "--out_dir", str(tmp_path), "--device", "cpu"]
    common += ["--weight", "pretrain", "--max_seq_len", "64"]
    monkeypatch.setattr(evaluate, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="--resume"):
        main(common)
    asked, score_options = [], evaluate.score_options
    monkeypatch.setattr(evaluate, "score_options", lambda *args: asked.append(1) or score_options(*args))
    for flags, times in ((["--rope_scaling", "4", "--trained_length", "16"], 1), ([], 1)):
        with pytest.raises(SystemExit, match="--resume"):
            main([*common, *flags, "--resume"])
        assert len(asked) == times


def test_a_server_gives_the_same_scores(tmp_path, tokenizer, sets):
    out = write_models(tmp_path / "out", tokenizer)
    common = ["--tasks", "ceval", "easy", "--eval_dir", str(sets), "--shots", "1", "--device", "cpu"]
    main([*common, "--out_dir", str(out), "--output", str(tmp_path / "here.json"), "--max_seq_len", "512"])
    with running_server(out) as server:
        flags = ["--base_url", server.url, "--weight", "full_sft_32", "--max_seq_len", "512", "--format", "chat"]
        main([*common, *flags, "--output", str(tmp_path / "there.json")])
        pairs = random_pairs(4)
        model = server.engine.model
        assert log_likelihoods_of_server(server.client, "full_sft_32", pairs) == pytest.approx(
            log_likelihoods(model, pairs), rel=1e-4
        )
        assert evaluate.context_of_server(server.client, "full_sft_32") == server.engine.context_length - 1
    here, there = (json.loads((tmp_path / f"{name}.json").read_text())["tasks"] for name in ("here", "there"))
    assert here == there


def test_training_rows_that_hold_a_question_are_counted(tmp_path, tokenizer, capsys):
    text = "小明有三个苹果又买了五个苹果然后吃掉两个苹果请问小明现在一共还有几个苹果"
    data = write_jsonl(tmp_path / "train.jsonl", [{"text": "别的内容"}, {"text": f"题目：{text}。"}])
    write_jsonl(tmp_path / "quiz.jsonl", [{"question": text, "A": "6", "B": "7", "answer": "A"}])
    path = write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    sidecar = json.loads(path.with_suffix(".json").read_text()) | {"flags": {"data_path": str(data)}}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    main(["--weight", str(path), "--tasks", str(tmp_path / "quiz.jsonl"), "--output", str(tmp_path), "--device", "cpu"])
    assert f"1 of 2 rows of {data} share text" in capsys.readouterr().out


def test_weights_of_another_tokenizer_are_refused(tmp_path, tokenizer, other_tokenizer, sets):
    path = write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    with pytest.raises(SystemExit, match="tokenizer"):
        main(
            [
                "--weight",
                str(path),
                "--tasks",
                "easy",
                "--eval_dir",
                str(sets),
                "--tokenizer_path",
                str(other_tokenizer),
            ]
        )


def test_help_does_not_show_the_key(monkeypatch, capsys):
    monkeypatch.setenv("MINIMIND_API_KEY", "a-secret-key")
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "MINIMIND_API_KEY" in printed and "a-secret-key" not in printed
