"""The rules of `prepare_data.py clean`: which rows are unfit to learn from, and what is masked in the others."""

import functools
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dataset.lm_dataset import parse_turns
from scripts.prepare_pipeline import Dropped, Step, flag

REPEAT = 10  # characters of the n-grams whose repetition is measured
WEIGHTS = np.random.default_rng(0).integers(1, 1 << 30, 24).astype(np.float64)  # of the codes in a run, for its hash
HAN, LETTER, DIGIT, SPACE, MARK, BAD = range(6)  # classes of characters; MARK: punctuation and symbols

# UTF-8 read as Latin-1 or GBK, characters of lost bytes, memory that was never written
MOJIBAKE = re.compile(
    r"\ufffd|锟斤拷|烫烫烫|屯屯屯|ï»¿|â€[™œ\x9d“”¦]"
    r"|(?:[Ãäåæçèé][\x80-\xbf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]{1,2}){2}"
)
MISREAD = "锛銆鈥鐨鍦鏄鐢鍜涓浜鍙璁"  # what UTF-8 read as GBK is full of, and Chinese text hardly has
MASKS = {
    "url": re.compile(r"(?:https?://|www\.)[\w\-.~:/?#\[\]@!$&'*+,;=%]*[\w/#=&]", re.ASCII),
    "mail": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII),
    "id": re.compile(
        r"(?<![\w.])[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\w)", re.ASCII
    ),
    "phone": re.compile(
        r"(?<![\w.])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?![\w.]*\d)|(?<![\w.-])0\d{2,3}-\d{7,8}(?![\w-])",
        re.ASCII,
    ),
}
# what must be in a text before the slow patterns look for more
MOJIBAKE_SIGN = "\ufffd锟烫屯ïâÃäåæçèé"
NUMBER_SIGN = re.compile(r"[0-9]{3}(?:[0-9]{4}|[- ][0-9]{4})")
CLAIM_SIGN = re.compile(
    r"作为|抱歉|对不起|我[是叫由的]|\b(?:[Aa]s an? |I['’ ]|[Mm]y name)|(?:开发|训练|研发|创造|推出)的"
)
TAGS = re.compile(
    r"<(/?)(div|span|a|table|tr|td|ul|ol|font|center|b|i|strong|em|h[1-6]|script|style)(?:\s+[\w-]+\s*=[^<>]*)?>",
    re.IGNORECASE,
)
LEFTOVERS = re.compile(r"&(?:nbsp|amp|lt|gt|quot|#\d{2,5});|<!--(?!.*-->)", re.IGNORECASE)
CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
SENTENCE_END = re.compile(r"[。！？!?…；;]|\.\s")
ENDED = re.compile(r"[。！？!?…；;.”」』\"]$")
HANGING = re.compile(
    r"(?:[，、,（(\[{【《「『“‘：:]|但|但是|以及|因为|如果|由于|对于|关于|根据|并且|而且|虽然|例如|比如|或者|不仅"
    r"|(?<![\w$])(?:the|a|an|of|to|and|or|is|are|in|with|for|that|from|by|as|at|your|which))$"
)
LABEL = re.compile(r"^(?:[-*•·]|\(?\w{1,2}[.)、．）:：])\s*")  # of an item in a list
PAIRS = ("（）", "()", "[]", "{}", "【】", "《》", "「」", "『』", "“”")
FORMULA = re.compile(r"\\[A-Za-z]{2,}")
REFUSAL = re.compile(
    r"作为(?:一个|一名)?(?:人工智能|AI|大型?语言模型|语言模型)[^。！？\n]{0,30}(?:无法|不能|没有能力|不具备)"
    r"|(?:很抱歉|抱歉|对不起)[，,][^。！？\n]{0,12}(?:无法|不能)(?:回答|提供|满足|完成|协助|帮助)"
    r"|\b[Aa]s an? (?:AI|artificial intelligence|(?:large )?language model)\b"
    r"|\bI(?:'m| am) (?:sorry|afraid),? (?:but )?(?:I|that I) (?:can(?:'t|not)|am (?:not able|unable))",
)
OTHER_MODELS = (
    r"ChatGPT|GPT-?[345][\w.]*|Claude|Gemini|Bard|PaLM|LLaMA|Llama|Vicuna|Alpaca|Mistral|Grok|DeepSeek"
    r"|通义千问|千问|Qwen|文心一言|讯飞星火|ChatGLM|GLM-?\d|Kimi|豆包|混元|MOSS|书生[·・]?浦语|InternLM|Open ?Assistant"
)
MAKERS = r"OpenAI|Anthropic|深度求索|阿里云|阿里巴巴|百度|讯飞|智谱|月之暗面"
# who names a model after one of these speaks of a tool, or of a bun: 我是通过百度地图找到的, 我是吃豆包长大的
TOOL = r"通过|用(?![于来途户])|\b(?:with|using|about|at|by)\b"
NAMED = r"我是|我叫|我的名字是|我的名字叫|我由|作为|I am|I'm|[Mm]y name is|call me"
SELF = rf"(?:{NAMED})(?!在|从|吃|去|看|买)(?:(?!{TOOL})[^。！？.!?，,\n]){{0,20}}"
OTHER_NAME = re.compile(
    rf"{SELF}(?:{OTHER_MODELS})"
    rf"|{SELF}(?:{MAKERS})[^。！？.!?\n]{{0,6}}(?:开发|训练|研发|创造|推出|的 ?(?:人工智能|AI|助手|大|语言|模型))"
    r"|I(?: am|'m| was)[^.!?\n]{0,40} (?:created|developed|trained|made|built) by "
    rf"(?:{MAKERS}|{OTHER_MODELS}|Google|Meta)\b"
)


@dataclass
class Clean(Step):
    """Leave out rows that are unfit to learn from, and mask personal data."""

    min_chars: int = flag(10, "drop shorter rows (default: %(default)s)")
    max_chars: int = flag(0, "drop rows of as many characters (default: 512; of preferences, sides of 3000)")
    min_chinese: float = flag(0.0, "least share of Han characters (default: %(default)s)")
    max_marks: float = flag(0.6, "largest share of punctuation and symbols (default: %(default)s)")
    max_repeated_lines: float = flag(0.3, "largest share of text in lines seen before (default: %(default)s)")
    max_repeated_ngrams: float = flag(0.5, "largest share of 10-grams seen before (default: %(default)s)")
    mojibake: bool = flag(True, "drop text that was decoded wrongly")
    markup: bool = flag(True, "drop HTML left over, tags and code fences without their other half")
    turns: bool = flag(True, "drop empty turns and one-sided conversations")
    cut: bool = flag(True, "drop answers cut in the middle")
    refusals: bool = flag(True, "drop refusals")
    other_names: bool = flag(True, "drop answers in another model's name")
    mask: tuple = flag(tuple(MASKS), "what to mask (default: all)", choices=tuple(MASKS))

    def __call__(self, row: dict, changes: list[str]) -> list[dict] | None:
        record = {key: turns_of(row[key], f'"{key}"') for key in ("conversations", "chosen", "rejected") if key in row}
        if not record and not isinstance(row.get("text"), str):
            raise Dropped("not a record", "convert makes records of other layouts")
        sides = list(record.values()) or [[{"role": "text", "content": row["text"]}]]
        text = "\n".join(said(turn) for side in sides for turn in side)
        lengths = [sum(len(holder[key]) for turn in side for holder, key in holders(turn)) for side in sides]
        bound = self.max_chars or (3000 if "chosen" in row else 512)
        if not self.min_chars <= min(lengths) <= max(lengths) < bound:
            reason = "too short" if min(lengths) < self.min_chars else "too long"
            raise Dropped(reason, f"{min(lengths)} to {max(lengths)} characters")
        for side in sides if record and self.turns else ():
            check_turns(side, changes, is_good=side is sides[0])
        # what is rejected may be as bad as it is: the chosen side must be good
        self.check_characters("\n".join(map(said, sides[0])))
        for turn in sides[0] if self.markup else ():
            check_markup(said(turn), is_chat=bool(record))
        for turn in (turn for turn in sides[0] if turn["role"] == "assistant"):
            answer = said(turn)
            if self.cut and is_cut(turn["content"]):
                raise Dropped("answer cut in the middle", "…" + answer[-40:])
            if CLAIM_SIGN.search(answer):
                if self.refusals and (match := REFUSAL.search(answer)):
                    raise Dropped("refusal", match[0])
                if self.other_names and (match := OTHER_NAME.search(answer)):
                    raise Dropped("another model's name", match[0])
        signs = {"url": "://" in text or "www." in text, "mail": "@" in text}
        signs["id"] = signs["phone"] = NUMBER_SIGN.search(text)
        masks = [name for name in self.mask if signs[name]]
        for holder, key in (place for side in sides for turn in side for place in holders(turn)) if masks else ():
            for name in masks:
                holder[key], count = MASKS[name].subn(f"[{name}]", holder[key])
                if count and f"{name} masked" not in changes:
                    changes.append(f"{name} masked")
        return [row | (record or {"text": sides[0][0]["content"]})] if changes else None

    def check_characters(self, text: str) -> None:
        codes = code_points(text)
        counts = np.bincount(character_classes()[codes], minlength=6)
        shown = max(len(codes) - counts[SPACE], 1)
        match = any(sign in text for sign in MOJIBAKE_SIGN) and MOJIBAKE.search(text)
        odd = counts[BAD] + sum(map(text.count, MISREAD)) - 2
        if self.mojibake and (match or odd > 0.02 * shown):
            raise Dropped("mojibake", match[0] if match else f"{odd} characters that texts hardly have")
        measures = (
            ("symbol noise", counts[MARK] / shown, self.max_marks),
            ("too little Chinese", self.min_chinese - counts[HAN] / shown, 0),
            ("repeated lines", repeated_lines(text), self.max_repeated_lines),
            ("repeated n-grams", repeated_ngrams(codes), self.max_repeated_ngrams),
        )
        for reason, measure, bound in measures:
            if measure > bound:
                raise Dropped(reason, f"by {measure - bound:.0%}")


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.cache
def character_classes() -> np.ndarray:
    """Return the class of each character; beyond U+FFFF only symbols and Han are told apart."""
    classes = np.full(sys.maxunicode + 1, MARK, np.uint8)
    names = {"L": LETTER, "N": DIGIT, "Z": SPACE, "P": MARK, "S": MARK, "M": LETTER, "C": BAD}
    classes[:0x10000] = [names[unicodedata.category(chr(code))[0]] for code in range(0x10000)]
    classes[0x3400:0x4DC0] = classes[0x4E00:0xA000] = classes[0xF900:0xFB00] = classes[0x20000:] = HAN
    classes[[*b"\t\n\r", *range(0x200B, 0x2010)]] = SPACE
    classes[list(b"{}\\^_")] = LETTER  # LaTeX is not noise
    classes[[0xFFFD, 0xFFFF]] = BAD, MARK
    return classes


def repeated_lines(text: str) -> float:
    """Return the share of characters that are in lines seen before."""
    lines = [line.strip() for line in text.split("\n")]
    total = sum(map(len, lines))
    return (total - sum(map(len, set(lines)))) / max(total, 1)


def repeated_ngrams(codes: np.ndarray) -> float:
    """Return the share of n-grams that were seen before."""
    if len(codes) < 4 * REPEAT:
        return 0.0
    hashes = np.sort(rolling_hashes(codes, REPEAT))
    return np.count_nonzero(hashes[1:] == hashes[:-1]) / len(hashes)


def rolling_hashes(codes: np.ndarray, size: int) -> np.ndarray:
    """Hash each run of so many codes (below 2^18, at most 24): float64 (runs,), whole numbers below 2^53."""
    return np.correlate(codes.astype(np.float64), WEIGHTS[:size], "valid") if len(codes) >= size else np.empty(0)


def turns_of(value: object, name: str) -> list[dict]:
    """Return validated turns with what else the given ones hold, arguments of calls as objects. Raises RecordError."""
    turns = parse_turns(value, name, may_be_empty=True)
    for call in (call["function"] for turn in turns for call in turn.get("tool_calls", ())):
        call["arguments"] = json.loads(call["arguments"]) if isinstance(call["arguments"], str) else call["arguments"]
    for given in value:
        given.pop("function_call", None)  # it is one of the calls now
    return [given | turn for given, turn in zip(value, turns, strict=True)]


def holders(turn: dict) -> Iterator[tuple]:
    """Yield (dict or list, key) of each text that a turn says: thought, strings in calls, content."""
    if turn.get("reasoning_content"):
        yield turn, "reasoning_content"
    if calls := turn.get("tool_calls"):
        yield from strings_in([call["function"]["arguments"] for call in calls])
    yield turn, "content"


def strings_in(value: dict | list, but: tuple = ()) -> Iterator[tuple]:
    """Yield (dict or list, key) of each string, at any depth, but not under these keys."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, str) and key not in but:
            yield value, key
        elif isinstance(inner, dict | list) and key not in but:
            yield from strings_in(inner, but)


def said(turn: dict) -> str:
    return turn["content"] if len(turn) == 2 else "\n".join(holder[key] for holder, key in holders(turn))


def check_turns(turns: list[dict], changes: list[str], is_good: bool) -> None:
    """Remove unanswered questions from the end. Raises Dropped if a turn is empty, or one side never speaks.

    is_good: not the rejected side of a preference, whose answers may repeat the question.
    """
    while turns and turns[-1]["role"] in ("user", "system"):
        turns.pop()
        changes.append("question without answer at the end")
    if not {"user", "assistant"} <= {turn["role"] for turn in turns}:
        raise Dropped("one-sided conversation")
    before = None
    for turn in turns:
        content = turn["content"].strip()
        if not content and not turn.get("tool_calls") and turn["role"] in ("user", "assistant"):
            raise Dropped("empty turn")
        if is_good and turn["role"] == "assistant" and content and content == before:
            raise Dropped("answer repeats the question")
        before = content


def check_markup(text: str, is_chat: bool) -> None:
    wrong = []
    if "&" in text or "<" in text:
        halves = Counter()
        for match in TAGS.finditer(text):
            halves[match[2].lower()] += -1 if match[1] else 1
        halves |= {tag: text.count(f"<{tag}>") - text.count(f"</{tag}>") for tag in ("think", "answer")}
        wrong = [match[0] for match in LEFTOVERS.finditer(text)] + [f"<{tag}>" for tag in halves if halves[tag]]
        wrong += CONTROL.findall(text) if is_chat else []
    if wrong or text.count("```") % 2:
        raise Dropped("broken markup", ", ".join(wrong[:3]) or "``` without its other half")


def is_cut(answer: str) -> bool:
    """Return whether an answer stops in the middle, as far as its end shows.

    It ends with a mark or word that leaves something open, has an opening mark without its other half, or its last
    sentence has no end although those before have one.
    """
    answer = answer.rstrip()
    if len(answer) < 15:
        return False
    if HANGING.search(answer[-12:]):
        return True
    *before, last = [LABEL.sub("", line.strip()) for line in answer.split("\n") if line.strip()]
    if last.count("$") % 2 and FORMULA.search(last):
        return True
    opened = last if FORMULA.search(answer) else answer  # formulas of several lines may have half a pair
    if not ENDED.search(answer) and any(opened.count(left) > opened.count(right) for left, right in PAIRS):
        return True
    if len(answer) < 30 or not answer[-1].isalpha():
        return False
    if before:
        return bool(SENTENCE_END.search(last)) or len(last) >= 12 and all(map(ENDED.search, before))
    return bool(SENTENCE_END.search(last)) or len(last) >= 60 and len(re.findall("[，,]", last)) >= 2
