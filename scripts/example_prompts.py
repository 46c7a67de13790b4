"""Prompts to try a model with: from what it was trained on if its sidecar knows, else general ones."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONVERSATIONS = "sft_and_tools.jsonl"  # what the quickstart makes of two files of dataset/sample/
QUESTIONS = [
    "你好，你是谁？",
    "用两三句话说明什么是光合作用。",
    "小明有5个苹果，吃了2个，又买了4个，现在有几个？",
    "推荐三种适合初学者的运动，并说明理由。",
    "写一首关于秋天的短诗。",
    "Who are you, and what can you do?",
    "Why is the sky blue?",
    "Give me three tips for learning a new language.",
]
BEGINNINGS = [
    "世界上最高的山峰是",
    "万有引力是指",
    "人工智能的发展",
    "学习一门新语言的时候，",
    "The capital of France is",
    "Once upon a time, there was a little girl who",
]


def example_prompts(sidecar: dict, continues: bool, count: int = 8) -> list[str]:
    """Return up to `count` questions, or beginnings of texts for weights that continue them."""
    known = sample_questions(sidecar)
    first = list({question["category"]: question for question in reversed(known)}.values())[::-1][:count]
    if continues:  # the texts of pretraining state what the answers state
        return [question["answer"][: len(question["answer"]) * 2 // 3] for question in first] or BEGINNINGS[:count]
    return [question["question"] for question in first] or QUESTIONS[:count]


def sample_questions(sidecar: dict) -> list[dict]:
    """Return the questions of dataset/sample/ if the weights were trained on its data."""
    data = Path(str(sidecar.get("flags", {}).get("data_path", "")))
    if data.parts[-3:-1] != ("dataset", "sample") and data.name != CONVERSATIONS:
        return []
    lines = (ROOT / "dataset" / "sample" / "questions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
