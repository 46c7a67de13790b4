"""Text to token ids and back: raw documents, chat turns in ChatML, and text that arrives one token at a time.

It needs only `tokenizers`, so worker processes start without importing torch.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from dataset.chat_template import DEFAULT_SYSTEM, ChatTemplate

ROLES = ("system", "user", "assistant", "tool")
# The ids that structure a conversation: what tokenizer_config.json calls them, and their names if it says nothing.
CONTROL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


class Segment(NamedTuple):
    """A turn of a rendered conversation: ids of control tokens and headers, and the text between them.

    An assistant's text is encoded apart from its header. Together, the header's "\\n" and a text that begins with a
    newline would merge, and its ids would not be those that a model can produce when it continues the header.
    """

    opening: list[int]
    text: str
    closing: list[int]  # empty if the turn is still open
    learned: bool


class ChatTokenizer:
    """A tokenizer.json and the chat format around it.

    path: a folder with tokenizer.json (and tokenizer_config.json), or a tokenizer.json itself.
    Attributes: path (the folder), json (the text of tokenizer.json), sha256 (its hex digest, which is what weights and
    caches record), vocab_size (the highest id plus one), longest_token (characters), bos_id, eos_id, pad_id, tag_ids
    (tokens that are never split and shown when decoding), template.
    Pickles as its path. Raises ValueError if a file is missing or broken, or if a chat's control tokens are missing.
    """

    def __init__(self, path: str | Path):
        path = Path(path).absolute()
        self._file = path / "tokenizer.json" if path.is_dir() else path
        self.path = self._file.parent
        if not self._file.is_file():
            raise ValueError(
                f"{self._file} not found; --tokenizer_path takes a folder that holds tokenizer.json "
                "(the one of this repository is model/)"
            )
        raw = self._file.read_bytes()
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self._documents = self._read_tokenizer(raw)
        self.json = raw.decode()
        self._contents = self._read_tokenizer(raw)
        self._contents.encode_special_tokens = True  # the only difference: control strings are encoded as text
        vocabulary = self._documents.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.longest_token = max(map(len, vocabulary))
        added_tokens = self._documents.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in added_tokens.items() if token.special}
        self.tag_ids = sorted(added_tokens.keys() - self._special_ids)
        config = self._read_config()
        names, (self.bos_id, self.eos_id, self.pad_id) = self._control_ids(config)
        self.template = ChatTemplate(self.path, config, names["bos_token"], names["eos_token"])
        decoder = json.loads(raw).get("decoder") or {}
        self.is_byte_level = decoder.get("type") == "ByteLevel"
        self._newline = self.encode_contents(["\n"])[0]
        headers = self.encode_contents([f"{role}\n" for role in ROLES])
        self._openings = {role: [self.bos_id, *header] for role, header in zip(ROLES, headers, strict=True)}
        self._closing = [self.eos_id, *self._newline]
        self._default_system = self._openings["system"] + self.encode_contents([DEFAULT_SYSTEM])[0] + self._closing

    def __reduce__(self):
        return ChatTokenizer, (self._file,)

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of raw documents. Control strings in them become control ids; nothing is added."""
        return [e.ids for e in self._documents.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_contents(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of what people and models say. Control strings are text, so no content can forge a turn."""
        return [e.ids for e in self._contents.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_conversation(self, turns: list[dict]) -> tuple[list[int], list[int]]:
        """Return (ids, mask) of a conversation, as the chat template writes it.

        A turn is {"role", "content"} and, if it has them, "tools" (system), "tool_calls" and "reasoning_content"
        (assistant). The mask is 1 on what an assistant says and the eos that ends it, 0 elsewhere.
        """
        return self.encode_rendered([self.render(turns)])[0]

    def encode_prompt(self, turns: list[dict], tools: list[dict] | None = None, **options) -> list[int]:
        """Return the ids of the conversation so far and the opening of the assistant's next turn.

        tools: besides those of the turns. options: variables of the chat template, such as open_thinking.
        """
        return self.encode_rendered([self.render(turns, tools, prompt=True, **options)])[0][0]

    def encode_fitting(
        self, turns: list[dict], context_length: int, max_new_tokens: int, **options
    ) -> tuple[list[int], int]:
        """Return encode_prompt without the oldest exchanges that leave an answer no room, and how many turns those are.

        An answer gets max_new_tokens, or a quarter of the context if that is less. A system turn and the last question
        stay; an exchange is everything from one question to the next.
        """
        longest = context_length - min(max_new_tokens, context_length // 4)
        system = turns[:1] if turns[0]["role"] == "system" else []
        turns = turns[len(system) :]
        questions = [number for number, turn in enumerate(turns) if number and turn["role"] == "user"]
        for left_out in (0, *questions):
            ids = self.encode_prompt(system + turns[left_out:], **options)
            if len(ids) <= longest:
                break
        return ids, left_out

    def encode_beginning(self, text: str) -> list[int]:
        """Return the ids of a text for a model to continue: one bos, as documents have in training, then the text."""
        ids = self.encode_documents([text])[0]
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD. skip_control: leave out control ids."""
        return self._documents.decode([int(i) for i in ids], skip_special_tokens=skip_control)

    def token_bytes(self, token_id: int, skip_control: bool = True) -> bytes:
        """Return the bytes of one id, exact in a byte-level tokenizer; b"" for unknown and for skipped control ids."""
        token = self._documents.id_to_token(token_id)
        if token is None or (skip_control and token_id in self._special_ids):
            return b""
        try:
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token outside the byte alphabet is its own text
            return token.encode()

    def render(
        self, turns: list[dict], tools: list[dict] | None = None, prompt: bool = False, **options
    ) -> list["Segment"]:
        """Return a conversation as the chat template writes it, cut into segments; arguments as encode_prompt.

        Raises ValueError if the template cannot write it.
        """
        tools = [*(tools or ()), *(tool for turn in turns for tool in turn.get("tools", ()))]
        if not self.template.is_ours or tools or any(len(turn) != 2 for turn in turns):
            return self._segments(self.template.split(turns, tools, prompt, options))
        # What our own template does with plain turns, without running it.
        segments = [] if turns and turns[0]["role"] == "system" else [Segment(self._default_system, "", [], False)]
        for turn in turns:
            role = turn["role"]
            if role not in ROLES:
                raise ValueError(f"unknown role {role!r}; a turn's role is one of {', '.join(ROLES)}")
            segments.append(Segment(self._openings[role], turn["content"], self._closing, role == "assistant"))
        return [*segments, Segment(self._openings["assistant"], "", [], False)] if prompt else segments

    def encode_rendered(self, rendered: list[list["Segment"]]) -> list[tuple[list[int], list[int]]]:
        """Return (ids, mask) of each rendered conversation. All texts go through one batch."""
        texts = iter(self.encode_contents([segment.text for segments in rendered for segment in segments]))
        documents = []
        for segments in rendered:
            ids, mask = [], []
            for (opening, _, closing, learned), content in zip(segments, texts, strict=False):
                ids += opening
                ids += content
                ids += closing
                if learned:
                    mask += [0] * len(opening)
                    mask += [1] * (len(content) + bool(closing))  # the text and its eos
                mask += [0] * (len(ids) - len(mask))
            assert len(mask) == len(ids)
            documents.append((ids, mask))
        return documents

    def _segments(self, parts: list[str]) -> list["Segment"]:
        """Return the segments of a text that was divided at control strings (see ChatTemplate.split)."""
        segments = [Segment([], parts[0], [], False)] if parts[0] else []
        for control, text in zip(parts[1::2], parts[2::2], strict=True):
            if control == self.template.bos:
                opening, learned = [self.bos_id], text.startswith("assistant\n")
                if learned:
                    opening, text = self._openings["assistant"], text.removeprefix("assistant\n")
                segments.append(Segment(opening, text, [], learned))
            else:
                closing = self._closing if text == "\n" else [self.eos_id, *self.encode_contents([text])[0]]
                last = segments.pop() if segments and not segments[-1].closing else Segment([], "", [], False)
                segments.append(last._replace(closing=closing))
        return segments

    def _read_tokenizer(self, raw: bytes) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{self._file} is not a readable tokenizer ({error}); see --tokenizer_path") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _read_config(self) -> dict:
        file = self.path / "tokenizer_config.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error

    def _control_ids(self, config: dict) -> tuple[dict[str, str], list[int]]:
        """Return names and ids of bos, eos, pad. Raises ValueError if one is missing, or if a content could hold it."""
        names = {}
        for key, default in CONTROL_TOKENS.items():
            value = config.get(key) or default
            names[key] = value["content"] if isinstance(value, dict) else value
        ids = {key: self._documents.token_to_id(name) for key, name in names.items()}
        missing = [f"{key} {names[key]}" for key, token_id in ids.items() if token_id is None]
        if missing:
            raise ValueError(
                f"{self._file} has no token for {', '.join(missing)}; a chat needs these. "
                "Choose a ChatML tokenizer with --tokenizer_path, or name its tokens in tokenizer_config.json"
            )
        if ids["bos_token"] == ids["eos_token"]:
            raise ValueError(
                f"{self.path / 'tokenizer_config.json'}: bos_token and eos_token are both {names['bos_token']}; a chat "
                "needs one to open a turn and another to end it. Choose a ChatML tokenizer with --tokenizer_path"
            )
        plain = [name for key, name in names.items() if ids[key] not in self._special_ids]
        if plain:
            raise ValueError(
                f'{self._file}: {", ".join(plain)} must be listed in "added_tokens" with "special": true, '
                "or what people type could forge the end of a turn"
            )
        return names, list(ids.values())


class StreamDecoder:
    """Decodes ids that arrive one at a time. The pieces of push and the final flush add up to decode of all ids.

    With a byte-level tokenizer a step costs the bytes of one token, whatever came before. Other tokenizers decode a
    window of a few ids again, and may turn invalid UTF-8 into more or fewer U+FFFD than decode does.
    """

    def __init__(self, tokenizer: ChatTokenizer, skip_control: bool = True):
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window = []  # other tokenizers: the last ids shown, which decide spacing, and those not shown yet
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Return the text that this id completes: whole characters only, "" while one is incomplete."""
        token = self._tokenizer.token_bytes(int(token_id), self._skip_control)
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(token)
        if not token:  # an id that is not shown must not push out the ids that decide spacing
            return ""
        self._window.append(int(token_id))
        return self._release(final=False)

    def flush(self) -> str:
        """Return what is left at the end of a text: U+FFFD for a character that was never completed, or ""."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        before = self._tokenizer.decode(self._window[: self._shown], self._skip_control)
        text = self._tokenizer.decode(self._window, self._skip_control)
        # A character has at most four bytes: if it is incomplete for longer, it is invalid and must not block the rest.
        if text.endswith("\ufffd") and len(self._window) - self._shown < 4 and not final:
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text[len(before) :]


def _byte_alphabet() -> dict[str, int]:
    """Return character -> byte in the alphabet of byte-level BPE: printable Latin-1 as it is, the rest from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
