"""What a model wrote, as Markdown that shows text, code, tables and maths, and can do nothing else.

Streamlit shows HTML as text, refuses javascript: links, and would fetch images. What is added here: images are shown as
the text that they are, a "<" never opens an HTML block that swallows what follows, Streamlit's own syntax
(`:red[...]`, `:material/...:`) is text, and a dollar sign is maths only where it looks like maths.

It rests on one thing: outside of code blocks "![" never stands in the result, and code blocks are written anew so that
the page cannot read them otherwise than they were read here.
"""

import re

DIRECTIVE = r":(?=[a-z][a-z0-9-]*\[|material[/_]|streamlit:)"
FENCE = re.compile(r"( *)(?:(`{3,})([^`]*)|(~{3,})(.*))")
PROSE = re.compile(
    r"(?P<code>(?<!`)(?P<ticks>`+)(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`))"
    r"|\$\$(?P<display>(?:(?!\n\s*\n|\$\$).)+)\$\$"
    r"|\\\[(?P<bracketed>(?:(?!\n\s*\n|\\\]).)+)\\\]"
    r"|\\\((?P<inline>[^\n]+?)\\\)"
    r"|(?<!\$)\$(?P<dollars>(?![\s$])[^$\n]*?[^$\s\\])\$(?![\d$])"
    r"|(?P<escaped>\\[!-/:-@\[-`{-~])"
    rf"|(?P<directive>{DIRECTIVE})"
    r"|(?P<newline>(?<=\S)\n(?=[^\n]))"
    r"|(?P<plain>[$<])",
    re.DOTALL,
)
PLAIN = {"$": r"\$", "<": "&lt;"}
INVISIBLE = "\u2060"  # word joiner: parts characters, and is not seen


def safe_markdown(text: str) -> str:
    """Markdown for st.markdown, from text that nobody has checked."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    return "\n\n".join(
        _code_block(language, lines) if is_code else _prose("\n".join(lines))
        for is_code, language, lines in _blocks(text)
    )


def literal(text: str) -> str:
    """Markdown that shows the text as it is, each line on its own."""
    text = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", re.sub(DIRECTIVE, f":{INVISIBLE}", text))
    return re.sub(r"\n(?=[^\n])", "  \n", text).replace("![", "!\\[")


def _blocks(text: str) -> list[tuple[bool, str, list[str]]]:
    """(is code, language, lines) in order. A code block that is still open goes on to the end."""
    blocks, fence, indent = [(False, "", [])], "", 0
    for line in text.split("\n"):
        match = FENCE.fullmatch(line)
        marker, language = (match[2] or match[4], match[3] or match[5] or "") if match else ("", "")
        if match and not fence:
            fence, indent = marker, len(match[1])
            blocks.append((True, language.strip(), []))
        elif match and marker.startswith(fence) and not language.strip():
            fence = ""
            blocks.append((False, "", []))
        elif fence:
            blocks[-1][2].append(line[indent:] if line[:indent].isspace() else line)
        else:
            blocks[-1][2].append(line)
    return [block for block in blocks if block[0] or any(line.strip() for line in block[2])]


def _code_block(language: str, lines: list[str]) -> str:
    code = "\n".join(lines)
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{re.sub(r'[^A-Za-z0-9#+-].*', '', language)}\n{code}\n{fence}"


def _prose(text: str) -> str:
    return PROSE.sub(_part, text).replace("![", "!\\[")


def _part(match: re.Match) -> str:
    kind = match.lastgroup if match.lastgroup != "ticks" else "code"
    if kind == "code":
        return match["code"].replace("![", f"!{INVISIBLE}[")
    if kind in ("display", "bracketed"):
        line_before = match.string[: match.start()].rpartition("\n")[2]
        if line_before.strip() and "\n" not in match[kind]:
            return f"${_maths(match[kind].strip())}$"  # in the middle of a line
        return f"\n\n$$\n{_maths(match[kind].strip())}\n$$\n\n"
    if kind in ("inline", "dollars"):
        return f"${_maths(match[kind].strip())}$"
    if kind == "escaped":
        return match[0]
    if kind == "directive":
        return f":{INVISIBLE}"  # Streamlit looks for some of them after escapes and entities have been read
    return "  \n" if kind == "newline" else PLAIN[match[0]]


def _maths(text: str) -> str:
    return text.replace("![", "!{}[").replace("`", "")
