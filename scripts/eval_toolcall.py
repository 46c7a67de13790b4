"""Score tool use: held-out conversations, played through a server with the openai client and the tools of this machine.

    python scripts/eval_toolcall.py --out_dir out/quickstart                weights: it starts a server for them
    python scripts/eval_toolcall.py --base_url http://127.0.0.1:8998/v1     a server that runs

A record of --data_path is a conversation as in training: a system turn with tools of dataset/tools.py, a question,
calls and their results, the answer. The model gets the tools and the question; its own calls are carried out, and it
goes on until it calls no more. Prints how many conversations have the right calls (names, in order; none if none is
due), the right arguments too, and the right final answer (its last number, or its text if the gold one has no number);
over all, and by the number of calls that are due.
"""

import argparse
import contextlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import openai

from dataset.answers import exact_matches, number, number_matches
from dataset.data_file import data_identity
from dataset.lm_dataset import RecordError, parse_record
from dataset.tools import call_tool, offered_tools, unknown_tools
from model.flags import add_api_key, at_least, show_defaults
from model.loading import add_flags
from model.streams import entry_point
from scripts.openai_client import explain, new_client, own_server

MOST_TURNS, LONGEST_TURN = 8, 256  # of the model in one conversation; tokens
SCORES = ("calls", "arguments", "answer")
TOGETHER = 16  # conversations
SERVER_FLAGS = ("model_mode", "out_dir", "hidden_size", "use_moe", "tokenizer_path", "lora_name", "device")


def read_conversations(path: Path) -> list[list[dict]]:
    """Return the turns of each record. Raises ValueError that names the wrong file or line."""
    data_identity(path)  # there, and UTF-8
    conversations = []
    for at, line in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"), 1):
        try:
            turns = parse_record("conversation", line)
        except RecordError as error:
            raise ValueError(f"{path}:{at}: {error}") from error
        reason = unknown_tools(turns)
        if not reason and (turns[-1]["role"] != "assistant" or "tool_calls" in turns[-1]):
            reason = "it must end with the assistant's answer"
        if reason:
            raise ValueError(f"{path}:{at}: {reason}")
        conversations.append(turns)
    if not conversations:
        raise ValueError(f"--data_path {path} holds no conversation")
    return conversations


def calls_of(turns: list[dict]) -> list[tuple[str, dict]]:
    """Return (name, arguments) of every call, in order."""
    calls = [call["function"] for turn in turns for call in turn.get("tool_calls") or ()]
    return [(call["name"], as_object(call["arguments"])) for call in calls]


def as_object(arguments: str | dict) -> dict:
    with contextlib.suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return arguments if isinstance(arguments, dict) else {"": arguments}


def play(client: openai.OpenAI, turns: list[dict], model: str) -> list[dict]:
    """Return the turns that follow the question: calls, their results, and the model's last answer."""
    tools = offered_tools(turns)
    question = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    messages = [{key: turn[key] for key in ("role", "content")} for turn in turns[:question]]
    for _ in range(MOST_TURNS):
        try:
            completion = client.chat.completions.create(
                model=model, messages=messages, tools=list(tools.values()), temperature=0, max_tokens=LONGEST_TURN
            )
        except openai.BadRequestError as error:  # mostly no room for an answer, which every server says in its way
            messages.append({"role": "assistant", "content": "", "refused": error})
            break
        said = completion.choices[0].message
        messages.append(said.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
        for call in said.tool_calls or ():
            result = call_tool(call.function.name, as_object(call.function.arguments), tools)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not said.tool_calls:
            break
    return messages[question:]


def judge(played: list[dict], gold: list[dict]) -> dict[str, bool]:
    """Tell whether the calls, their arguments and the final answer are right."""
    calls, expected = calls_of(played), calls_of(gold)
    answer, wanted = played[-1].get("content") or "", gold[-1]["content"]
    if played[-1]["role"] != "assistant" or played[-1].get("tool_calls"):
        answer = ""  # it never stopped calling
    matches = exact_matches if number(wanted) is None else number_matches
    return {
        "calls": [name for name, _ in calls] == [name for name, _ in expected],
        "arguments": calls == expected,
        "answer": matches(answer, wanted),
    }


def percent(judged: list[dict[str, bool]], name: str) -> str:
    return f"{100 * sum(each[name] for each in judged) / len(judged):.1f} %"


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_path", type=Path, default=ROOT / "dataset" / "sample" / "tool_questions.jsonl", help="jsonl")
    add("--base_url", help="an OpenAI-compatible server (default: one is started for the weights that follow)")
    add_api_key(parser, "for --base_url")
    add("--model", default="minimind", help="name of the model there")
    add_flags(parser, *SERVER_FLAGS)
    add("--examples", type=at_least(0), default=5, help="wrong conversations to print")
    show_defaults(parser)
    args = parser.parse_args(argv)
    conversations = read_conversations(args.data_path)
    flags = {name: getattr(args, name) for name in SERVER_FLAGS}
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    with contextlib.nullcontext((args.base_url, 0)) if args.base_url else own_server(*words) as (base_url, _):
        client = new_client(openai.OpenAI, base_url, api_key=args.api_key)
        try:
            with ThreadPoolExecutor(TOGETHER) as pool:
                played = list(pool.map(lambda turns: play(client, turns, args.model), conversations))
            refused = [turns[-1]["refused"] for turns in played if "refused" in turns[-1]]
            if len(refused) == len(played):
                raise refused[0]
        except openai.OpenAIError as error:
            raise ValueError(explain(error, base_url)) from error
    judged = [judge(turns, gold) for turns, gold in zip(played, conversations, strict=True)]
    shown = 0
    for turns, gold, right in zip(played, conversations, judged, strict=True):
        if not all(right.values()) and shown < args.examples:
            shown += 1
            question = next(turn["content"] for turn in gold if turn["role"] == "user")
            said = [f"{name}({json.dumps(a, ensure_ascii=False)})" for name, a in calls_of(turns)]
            print(f"  {question}  ->  {', '.join([*said, repr(turns[-1].get('content'))])}")
    due = [len(calls_of(gold)) for gold in conversations]
    for count in sorted(set(due)) if len(set(due)) > 1 else ():
        part = [right for right, calls in zip(judged, due, strict=True) if calls == count]
        shares = ", ".join(f"{name} {percent(part, name)}" for name in SCORES)
        print(f"{count or 'no'} call{'s' * (count != 1)} due ({len(part)}): {shares}")
    if refused:
        print(f"{len(refused)} without an answer, the server refused: {explain(refused[0], base_url)}")
    print(f"{args.data_path}: {len(judged)} conversations")
    for name in SCORES:
        print(f"right {name}: {percent(judged, name)}")


if __name__ == "__main__":
    main()
