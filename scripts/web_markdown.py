"""Change a model's Markdown so that Streamlit shows text, code, tables and maths as they were meant.

Safety is not this file's job: Streamlit shows HTML as text and refuses javascript: links, and the page's
Content-Security-Policy (web_demo.py) stops every script and every request to another host. Here images become text,
"<" never starts an HTML block that swallows the lines after it, Streamlit's own syntax (`:red[...]`,
`:material/...:`) stays text, and a dollar sign starts maths only where it looks like maths.
"""

import re

DIRECTIVE = r":(?=[a-z][a-z0-9-]*\[|material[/_]|streamlit:)"
PIECE = re.compile(
    # a fenced block, maybe in a list or a quote, open to the end while it streams
    r"(?P<code>^(?:[ >]|[-*+] |\d+[.)] )*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,}).*?(?:^[ >]*(?P=fence)[`~]* *$|\Z)"
    # a code span, over lines that go on with a paragraph
    r"|(?<!`)(?P<ticks>`+)(?!`)(?:[^\n]|\n(?!\s*(?:\n|[-*+>#|]|\d+[.)]|```|~~~)))+?(?<!`)(?P=ticks)(?!`))"
    # an indented block after a paragraph; in a list it would be text
    r"|(?P<before>^(?![ \t]|[-*+] |\d+[.)] )[^\n]+\n\n+)(?P<block>(?:(?: {4}|\t)[^\n]*(?:\n+|\Z))+)"
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
    text = re.sub(r"^[ \t]+", lambda indent: "&nbsp;" * len(indent[0].expandtabs(4)), text, flags=re.MULTILINE)
    return re.sub(r"\n(?=[^\n])", "  \n", text)


def _piece(match: re.Match) -> str:
    if match["code"] or match["escaped"]:
        return match[0]
    if match["block"]:
        return PIECE.sub(_piece, match["before"]) + match["block"]
    if maths := match["display"] or match["bracketed"]:
        inside_a_line = match.string[: match.start()].rpartition("\n")[2].strip() and "\n" not in maths
        return f"${maths.strip()}$" if inside_a_line else f"\n\n$$\n{maths.strip()}\n$$\n\n"
    if maths := match["inline"] or match["dollars"]:
        return f"${maths.strip()}$"
    return PLAIN[match[0]]
