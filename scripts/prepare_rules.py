"""The rules of `prepare_data.py clean`: what makes a row unfit to learn from, and what is masked in the others."""

import functools
import re
import unicodedata
from dataclasses import asdict, dataclass

import numpy as np

from scripts.prepare_pipeline import Dropped

REPEAT = 10  # characters of the n-grams whose repetition is measured
WEIGHTS = np.random.default_rng(0).integers(1, 1 << 30, 24).astype(np.float64)  # of the codes in a run, for its hash
HAN, LETTER, DIGIT, SPACE, MARK, BAD = range(6)  # classes of characters; MARK: punctuation and symbols

# UTF-8 read as Latin-1 or GBK, characters of lost bytes, memory that was never written
MOJIBAKE = re.compile(
    r"\ufffd|锟斤拷|烫烫烫|屯屯屯|ï»¿|â€[™œ\x9d“”¦]|(?:[Ãäåæçèé][\x80-\xbf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]{1,2}){2}"
    r"|(?:[\u4e00-\u9fff]?[锛銆鈥鐨鍦鏄]){2}"
)
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
MOJIBAKE_SIGN = re.compile(r"[\ufffd锟烫屯ïâÃäåæçèé锛銆鈥鐨鍦鏄]")
NUMBER_SIGN = re.compile(r"\d{7}|\d{3}[- ]\d{4}", re.ASCII)
MASK_SIGN = {"url": re.compile(r"://|www\."), "mail": re.compile("@"), "id": NUMBER_SIGN, "phone": NUMBER_SIGN}
CLAIM_SIGN = re.compile(
    r"作为|抱歉|对不起|我[是叫由的]|\b(?:[Aa]s an? |I['’ ]|[Mm]y name)|(?:开发|训练|研发|创造|推出)的"
)
TAGS = re.compile(
    r"<(/?)(div|span|a|table|tr|td|ul|ol|font|center|b|i|strong|em|h[1-6]|script|style)(?:\s+[\w-]+\s*=[^<>]*)?>",
    re.IGNORECASE,
)
LEFTOVERS = re.compile(r"&(?:nbsp|amp|lt|gt|quot|#\d{2,5});|<!--(?!.*-->)", re.IGNORECASE)
CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
SENTENCE_END = re.compile(r"[。！？!?…]|\.\s")
REFUSAL = re.compile(
    r"作为(?:一个|一名)?(?:人工智能|AI|大型?语言模型|语言模型)[^。！？\n]{0,30}(?:无法|不能|没有能力|不具备)"
    r"|(?:很抱歉|抱歉|对不起)[，,][^。！？\n]{0,12}(?:无法|不能)(?:回答|提供|满足|完成|协助|帮助)"
    r"|\b[Aa]s an? (?:AI|artificial intelligence|(?:large )?language model)\b"
    r"|\bI(?:'m| am) (?:sorry|afraid),? (?:but )?(?:I|that I) (?:can(?:'t|not)|am (?:not able|unable))",
)
OTHER_MODELS = (
    r"ChatGPT|GPT-?[345][\w.]*|OpenAI|Claude|Anthropic|Gemini|Bard|PaLM|LLaMA|Llama|Vicuna|Alpaca|Mistral|Grok"
    r"|DeepSeek|深度求索|通义千问|千问|Qwen|阿里云|文心一言|百度|讯飞星火|智谱|ChatGLM|GLM-?\d|Kimi|月之暗面|豆包|混元"
    r"|MOSS|书生|Open ?Assistant"
)
SELF = r"我是|我叫|我的名字是|我的名字叫|我由|我是由|作为|I am|I'm|I was|[Mm]y name is|call me"
OTHER_NAME = re.compile(
    rf"(?:{SELF})[^。！？.!?，,\n]{{0,20}}(?:{OTHER_MODELS})"
    rf"|(?:{OTHER_MODELS})[^。！？.!?\n]{{0,6}}(?:开发|训练|研发|创造|推出)的(?:人工智能|AI|大?语言模型|聊天|助手|模型)"
)


@dataclass
class Clean:
    """A step: drop rows that break a rule, mask personal data in the others."""

    min_chars: int = 10
    max_chars: int | None = None  # 512 for texts and conversations, 3000 for a preference's sides
    min_chinese: float = 0.0
    max_marks: float = 0.6
    max_repeated_lines: float = 0.3
    max_repeated_ngrams: float = 0.5
    mojibake: bool = True
    markup: bool = True
    turns: bool = True
    cut: bool = True
    refusals: bool = True
    other_names: bool = True
    mask: tuple[str, ...] = tuple(MASKS)

    def settings(self) -> dict:
        return asdict(self)

    def __call__(self, row: dict, changes: list[str]) -> list[dict] | None:
        sides = [row[key] for key in ("conversations", "chosen", "rejected") if key in row]
        if not sides and not isinstance(row.get("text"), str):
            raise Dropped("not a record", f"keys: {', '.join(row)[:80]}; convert makes records of other layouts")
        try:
            texts = [[turn["content"] or "" for turn in side] for side in sides] or [[row["text"]]]
            text = "\n".join(text for side in texts for text in side)
            answers = [turn["content"] or "" for side in sides for turn in side if turn.get("role") == "assistant"]
        except (TypeError, KeyError, AttributeError):
            raise Dropped("not a record", "a turn is not an object with role and content") from None
        self._check_lengths(texts, "chosen" in row)
        if self.turns:
            for side in sides:
                self._check_turns(side, changes)
        self._check_characters(text)
        if self.markup:
            check_markup(text, is_chat=bool(sides))
        if self.cut and any(is_cut(answer) for answer in answers):
            raise Dropped("answer cut in the middle", "…" + answers[-1][-40:])
        claims = [answer for answer in answers if CLAIM_SIGN.search(answer)]
        for on, rule, pattern in (
            (self.refusals, "refusal", REFUSAL),
            (self.other_names, "another model's name", OTHER_NAME),
        ):
            for answer in claims if on else ():
                if match := pattern.search(answer):
                    raise Dropped(rule, match[0])
        masks = [name for name in self.mask if MASK_SIGN[name].search(text)]
        for holder, key in [(turn, "content") for side in sides for turn in side] or [(row, "text")] if masks else ():
            for name in masks if holder[key] else ():
                holder[key], count = MASKS[name].subn(f"[{name}]", holder[key])
                if count and f"{name} masked" not in changes:
                    changes.append(f"{name} masked")
        return [row] if changes else None

    def _check_lengths(self, texts: list[list[str]], preference: bool) -> None:
        lengths = [sum(map(len, side)) for side in texts]
        bound = self.max_chars or (3000 if preference else 512)
        if max(lengths) >= bound:
            raise Dropped("too long", f"{max(lengths)} characters, bound {bound}")
        if min(lengths) < self.min_chars:
            raise Dropped("too short", f"{min(lengths)} characters")

    def _check_turns(self, turns: list[dict], changes: list[str]) -> None:
        while turns and turns[-1]["role"] in ("user", "system"):
            turns.pop()
            changes.append("question without answer at the end")
        roles = {turn["role"] for turn in turns}
        if not {"user", "assistant"} <= roles:
            raise Dropped("one-sided conversation")
        for turn, before in zip(turns, [{}, *turns], strict=False):
            content = (turn["content"] or "").strip()
            if not content and not turn.get("tool_calls") and turn["role"] != "system":
                raise Dropped("empty turn")
            if turn["role"] == "assistant" and content == before.get("content"):
                raise Dropped("answer repeats the question")

    def _check_characters(self, text: str) -> None:
        codes = code_points(text)
        counts = np.bincount(character_classes()[np.minimum(codes, 0xFFFF + (codes >= 0x20000))], minlength=6)
        shown = max(len(codes) - counts[SPACE], 1)
        if self.mojibake:
            match = MOJIBAKE_SIGN.search(text) and MOJIBAKE.search(text)
            if match or counts[BAD] > 0.01 * shown:
                raise Dropped("mojibake", match[0] if match else f"{counts[BAD]} control or unassigned characters")
        if counts[MARK] > self.max_marks * shown:
            raise Dropped("symbol noise", f"{counts[MARK] / shown:.0%} are marks")
        if counts[HAN] < self.min_chinese * shown:
            raise Dropped("too little Chinese", f"{counts[HAN] / shown:.0%}")
        if self.max_repeated_lines < 1 and (share := repeated_lines(text)) > self.max_repeated_lines:
            raise Dropped("repeated lines", f"{share:.0%} of the characters")
        if self.max_repeated_ngrams < 1 and (share := repeated_ngrams(codes)) > self.max_repeated_ngrams:
            raise Dropped("repeated n-grams", f"{share:.0%}")


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.cache
def character_classes() -> np.ndarray:
    """The class of each character up to U+FFFF; one more entry stands for all Han beyond, U+FFFF for symbols beyond."""
    classes = np.empty(0x10001, np.uint8)
    names = {"L": LETTER, "N": DIGIT, "Z": SPACE, "P": MARK, "S": MARK, "M": LETTER, "C": BAD}
    for code in range(0x10000):
        classes[code] = names[unicodedata.category(chr(code))[0]]
    for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)):
        classes[first : last + 1] = HAN
    classes[[0x09, 0x0A, 0x0D]] = SPACE
    classes[[ord(sign) for sign in "{}\\^_"]] = LETTER  # LaTeX is no noise
    classes[0x200B:0x2010] = SPACE
    classes[0xFFFF], classes[0x10000] = MARK, HAN
    classes[0xFFFD] = BAD
    return classes


def repeated_lines(text: str) -> float:
    """The share of characters that are in lines seen before."""
    lines = [line.strip() for line in text.split("\n")]
    if len(lines) < 2:
        return 0.0
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / max(total, 1)


def repeated_ngrams(codes: np.ndarray) -> float:
    """The share of n-grams that were seen before."""
    if len(codes) < 4 * REPEAT:
        return 0.0
    hashes = np.sort(rolling_hashes(codes, REPEAT))
    return np.count_nonzero(hashes[1:] == hashes[:-1]) / len(hashes)


def rolling_hashes(codes: np.ndarray, size: int) -> np.ndarray:
    """A hash of each run of so many codes (below 2^18, 24 at most), float64 (runs,): whole numbers below 2^53."""
    return np.correlate(codes.astype(np.float64), WEIGHTS[:size], "valid") if len(codes) >= size else np.empty(0)


def check_markup(text: str, is_chat: bool) -> None:
    if match := LEFTOVERS.search(text) if "<" in text or "&" in text else None:
        raise Dropped("broken markup", match[0])
    if "<" in text:
        open_tags = {}
        for match in TAGS.finditer(text):
            name = match[2].lower()
            open_tags[name] = open_tags.get(name, 0) + (-1 if match[1] else 1)
        wrong = [name for name, count in open_tags.items() if count]
        if wrong:
            raise Dropped("broken markup", f"<{wrong[0]}> without its other half")
        for tag in ("think", "answer"):
            if text.count(f"<{tag}>") != text.count(f"</{tag}>"):
                raise Dropped("broken markup", f"<{tag}> without its other half")
        if is_chat and (match := CONTROL.search(text)):
            raise Dropped("broken markup", match[0])
    if text.count("```") % 2:
        raise Dropped("broken markup", "``` without its other half")


def is_cut(answer: str) -> bool:
    """Whether an answer stops in the middle: after a comma or an opening mark, or in a sentence that follows others."""
    answer = answer.rstrip()
    if len(answer) < 40:
        return False
    if answer[-1] in "，、（(“‘《[{,":
        return True
    last = answer[answer.rfind("\n") + 1 :]
    return answer[-1].isalpha() and bool(SENTENCE_END.search(last))
