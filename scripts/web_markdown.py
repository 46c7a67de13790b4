"""Change a model's Markdown so that Streamlit shows text, code, tables and maths as they were meant.

Safety is not this file's job: Streamlit shows HTML as text and refuses javascript: links, and the page's
Content-Security-Policy (web_demo.py) stops every script and every request to another host. Here images become text,
"<" never starts an HTML block that swallows the lines after it, Streamlit's own syntax (`:red[...]`,
`:material/...:`) stays text, and a dollar sign starts maths only where it looks like maths.
"""

import re

DIRECTIVE = r":(?=[a-z][a-z0-9-]*\[|material[/_]|streamlit:)"
PIECE = re.compile(
    # a fenced block, open to the end while it streams, or a code span
    r"(?P<code>^ *(?P<fence>`{3,}(?=[^`\n]*$)|~{3,}).*?(?:^ *(?P=fence)[`~]* *$|\Z)"
    r"|(?<!`)(?P<ticks>`+)(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`))"
    r"|\$\$(?P<display>(?:(?!\n\s*\n|\$\$).)+)\$\$"
    r"|\\\[(?P<bracketed>(?:(?!\n\s*\n|\\\]).)+)\\\]"
    r"|\\\((?P<inline>[^\n]+?)\\\)"
    r"|(?<!\$)\$(?P<dollars>(?![\s$])[^$\n]*?[^$\s\\])\$(?![\d$])"
    r"|(?P<escaped>\\[!-/:-@\[-`{-~])"
    rf"|{DIRECTIVE}|!(?=\[)|(?<=\S)\n(?=[^\n])|[$<]",
    re.DOTALL | re.MULTILINE,
)
JOINER = "\u2060"  # an invisible character that keeps two others apart
PLAIN = {"$": r"\$", "<": "&lt;", "\n": "  \n", ":": f":{JOINER}", "!": f"!{JOINER}"}


def safe_markdown(text: str) -> str:
    """Return Markdown for st.markdown from any text."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    return PIECE.sub(_piece, text)


def literal(text: str) -> str:
    """Return Markdown that shows the text as it is, each line on its own."""
    text = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", re.sub(DIRECTIVE, f":{JOINER}", text))
    return re.sub(r"\n(?=[^\n])", "  \n", text)


def _piece(match: re.Match) -> str:
    if match["code"] or match["escaped"]:
        return match[0]
    if maths := match["display"] or match["bracketed"]:
        inside_a_line = match.string[: match.start()].rpartition("\n")[2].strip() and "\n" not in maths
        return f"${maths.strip()}$" if inside_a_line else f"\n\n$$\n{maths.strip()}\n$$\n\n"
    if maths := match["inline"] or match["dollars"]:
        return f"${maths.strip()}$"
    return PLAIN[match[0]]
