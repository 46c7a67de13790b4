"""The chat template of a tokenizer folder: how it writes a conversation as text, tools, calls and thoughts included."""

import hashlib
import json
import re
import secrets
from datetime import datetime
from functools import cached_property
from pathlib import Path

DEFAULT_SYSTEM = "You are a helpful assistant"  # as in the template

# ChatML. Tools and tool calls are written as the Hermes parsers of vLLM, llama.cpp and others read them back. What
# training learns is between `generation` marks, for transformers' assistant mask. Reasoning is spelled as in our data.
CHAT_TEMPLATE = Path(__file__).with_suffix(".jinja").read_text("utf-8")


class ChatTemplate:
    """A template in Jinja, and the control strings that open and end a turn in it."""

    def __init__(self, folder: Path, config: dict, bos: str, eos: str):
        """config: of tokenizer_config.json. A folder without a template gets the one of this repository."""
        self.file, self.bos, self.eos = folder / "chat_template.jinja", bos, eos
        if self.file.is_file():
            text = self.file.read_text("utf-8")
        else:
            self.file, text = folder / "tokenizer_config.json", config.get("chat_template")
        self._found = text
        if isinstance(text, list):  # several, by name
            text = {each["name"]: each["template"] for each in text}.get("default")
        self.given = bool(text)
        self.is_ours = text in (None, CHAT_TEMPLATE)
        self.text = text or CHAT_TEMPLATE.replace("<|im_start|>", bos).replace("<|im_end|>", eos)
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()

    def without_marks(self) -> str | list[dict] | None:
        """Return the folder's template, or its named ones, for runtimes that do not know the generation marks."""
        if isinstance(self._found, list):
            return [{**each, "template": without_marks(each["template"])} for each in self._found]
        return without_marks(self._found or "") or None

    @cached_property
    def _compiled(self):
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
            return json.dumps(
                value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )

        # Templates come with tokenizers of others: sandboxed, with the names that transformers gives them.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = tojson
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
        return environment.from_string(without_marks(self.text))

    def split(self, turns: list[dict], tools: list[dict], prompt: bool, options: dict) -> list[str]:
        """Return what the template writes, divided at control strings: text, control, text, …, text.

        prompt: with the opening of the assistant's next turn. options: further variables of the template.
        A control string inside a content is text: it is replaced while the template runs and put back here.
        Raises ValueError if the template fails.
        """
        spelled = {control: f"({secrets.token_hex(8)})" for control in (self.bos, self.eos)}
        try:
            given = json.dumps([turns, tools], ensure_ascii=False)
            if self.bos in given or self.eos in given:
                for control, spelling in spelled.items():
                    given = given.replace(control, spelling)
                turns, tools = json.loads(given)
            text = self._compiled.render(
                messages=turns,
                tools=tools or None,
                add_generation_prompt=prompt,
                bos_token=self.bos,
                eos_token=self.eos,
                **options,
            )
        except RecursionError as error:
            raise ValueError("the conversation is nested too deeply") from error
        except Exception as error:  # a template can fail in any way
            raise ValueError(f"the chat template of {self.file} cannot write this conversation: {error}") from error
        parts = re.split(f"({re.escape(self.bos)}|{re.escape(self.eos)})", text)
        for control, spelling in spelled.items():
            parts = [part.replace(spelling, control) for part in parts]
        return parts


def without_marks(template: str) -> str:
    """Return a template without the marks from which transformers reads which text is learned.

    A block that is always taken replaces them, so that spaces around them are trimmed as before.
    """
    opened = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", opened)
