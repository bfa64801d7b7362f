"""Wikitext to prose: what a reader sees of each construct, and what the whole excerpt looks like afterwards."""

import bz2
import re
import time

import pytest

from interp_jax.activations.wikipedia import articles, clean_wikitext, read_dump

A, B = "The first sentence is plain prose.", "The second sentence is plain prose."


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''Bold''' and ''italic'' words stay here.", "Bold and italic words stay here."),
        ("A [[bus]] and two [[bus]]es and [[coach (bus)|coaches]] go.", "A bus and two buses and coaches go."),
        ('One sentence<ref name=x>A {{cite|note}}</ref> has<ref name="y" /> notes.', "One sentence has notes."),
        ("A hidden <!-- comment\nover lines --> remark is gone.", "A hidden remark is gone."),
        ("It is {{convert|5|km|mi|0}} or {{convert|5|-|7|km}} away.", "It is 5 km or 5–7 km away."),
        ("The word {{lang|fr|mot}} and {{lang-de|Wort}} remain here.", "The word mot and Wort remain here."),
        ("Nothing {{a|{{b|{{c}}}}|d=[[e]]}} of this box shows.", "Nothing of this box shows."),
        ("A name ({{IPAc-en|n|eɪ|m}}) is said aloud.", "A name is said aloud."),
        ("A name ({{IPAc-en|n}}; born 1900) is said.", "A name (born 1900) is said."),
        ("Tea&nbsp;&amp; cake &ndash; for 1&nbsp;&lt;&nbsp;2 people.", "Tea & cake – for 1 < 2 people."),
        ("Water is H<sub>2</sub>O or {{chem|H|2|O}} to all.", "Water is H2O or H2O to all."),
        ("See [http://a.b/c the page] and [http://a.b] now.", "See the page and now."),
        ("[[File:A.jpg|thumb|A [[caption]] with [http://x y].]]" + A, A),
        ("[[Category:Things]]\n[[fr:Chose]]\n" + A, A),
        ("{| class=x\n! head\n|-\n| cell {{!}} cell\n{|\n| inner cell of a table.\n|}\n|}\n" + A, A),
        ("== Heading ==\n" + A + "\n=== Sub ===\n" + B, A + "\n" + B),
        (A + "\n\n== References ==\nGone is all of this text.\n=== Sub ===\nAnd this.\n== Next ==\n" + B, A + "\n" + B),
        (
            "* A list item that reads as a sentence.\n* Just a name\n# 12\n" + A,
            "A list item that reads as a sentence.\n" + A,
        ),
        ("* Smith, John (1999). ''A long book title.'' Press. ISBN 1234567890.\n" + A, A),
        ("These lines\nare one\nparagraph of prose.\n\n" + A, "These lines are one paragraph of prose.\n" + A),
        ("The value <math>x^{2}_{a}</math> is large here.", "The value x^{2}_{a} is large here."),
        (A + "\n\n:<math>\\frac{a}{{b}}</math>\n\n" + B, A + "\n" + B),
        ("{{quote|These are the words of another.|An author}}\n" + A, "These are the words of another.\n" + A),
        ("__NOTOC__\n" + A, A),
        ("", ""),
        ("{{Infobox|a=b}}\n", ""),
    ],
)
def test_what_a_reader_sees(wikitext, prose):
    assert clean_wikitext(wikitext) == prose


@pytest.mark.parametrize(
    "mark", ["{{", "}}", "[[", "]]", "<ref>", "</ref>", "<!--", "{{{", "<math>", "''", "[http://a"]
)
def test_a_mark_that_is_never_closed_does_not_swallow_the_article(mark):
    prose = clean_wikitext(f"{A}\n\nHere stands {mark} a mark in prose.\n\n{B}")
    assert prose.startswith(A)
    assert prose.endswith(B)
    assert "{{" not in prose
    assert "[[" not in prose


@pytest.mark.parametrize(
    "bomb", ["{{" * 50_000, "[[a|" * 30_000, "<ref>" * 30_000, "{{" * 5000 + "}}" * 5000, "'" * 10**5]
)
def test_hostile_wikitext_takes_no_long_time(bomb):
    start = time.perf_counter()
    clean_wikitext(bomb)
    assert time.perf_counter() - start < 5.0


def _dump(tmp_path, xml: str, name="dump.bz2"):
    path = tmp_path / name
    path.write_bytes(bz2.compress(xml.encode()))
    return path


PAGES = """<mediawiki><siteinfo><sitename>x</sitename></siteinfo>
<page><title>A &amp; B</title><ns>0</ns><revision><text>Text of &lt;b&gt;A&lt;/b&gt;</text></revision></page>
<page><title>Old</title><ns>0</ns><redirect title="A" /><revision><text>#REDIRECT [[A]]</text></revision></page>
<page><title>Talk:A</title><ns>1</ns><revision><text>talk</text></revision></page>
<page><title>C</title><ns>0</ns><revision><text>C may refer to: {{disambiguation}}</text></revision></page>
</mediawiki>"""


def test_redirects_and_other_namespaces_are_left_out(tmp_path):
    pages = read_dump(_dump(tmp_path, PAGES))
    assert [(page.title, page.text) for page in pages] == [("A & B", "Text of <b>A</b>")]


def test_a_dump_that_is_not_whole_is_refused(tmp_path):
    whole = bz2.compress(PAGES.encode())
    path = tmp_path / "cut.bz2"
    for damaged in (whole[: len(whole) // 2], whole[:-8], b"", b"plain text", bz2.compress(PAGES.encode()[:-20])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cut\.bz2 is no whole MediaWiki export"):
            read_dump(path)
    with pytest.raises(FileNotFoundError):
        read_dump(tmp_path / "missing.bz2")


def test_entities_that_grow_are_refused(tmp_path):
    bomb = (
        '<!DOCTYPE m [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><mediawiki><page><text>&b;</text></page></mediawiki>'
    )
    with pytest.raises(ValueError, match="document type"):
        read_dump(_dump(tmp_path, bomb))


@pytest.fixture(scope="module")
def excerpt():
    return articles()


def test_the_excerpt_is_prose(excerpt):
    assert 90 <= len(excerpt) <= 100
    assert len({article.title for article in excerpt}) == len(excerpt)
    text = "\n".join(article.text for article in excerpt)
    assert 2.3e6 <= len(text) <= 3.0e6
    for residue in (
        r"\[\[",
        r"\]\]",
        r"\{\{",
        r"\{\|",
        "''",
        "https?://",
        r"</?\w+>",
        r"&\w+;",
        r"^[*#:|!=]",
        "\ue000",
    ):
        found = re.findall(f"(?m){residue}.{{0,40}}", text)
        # TeX has double braces, and a few articles speak of markup characters.
        assert len(found) <= (5 if residue == r"\{\{" else 0), (residue, found[:3])
    sentences = sum(line.rstrip("\"”')]").endswith((".", "!", "?", ":", "...")) for line in text.splitlines())
    assert sentences / len(text.splitlines()) > 0.97


def test_the_excerpt_reads_as_it_should(excerpt):
    by_title = {article.title: article.text for article in excerpt}
    assert by_title["Anarchism"].startswith(
        "Anarchism is a political philosophy that advocates self-governed societies"
    )
    assert "Lincoln was born February 12, 1809" in by_title["Abraham Lincoln"]
    assert "References" not in by_title["Autism"].splitlines()


def test_a_second_call_costs_nothing(excerpt):
    start = time.perf_counter()
    assert articles() == excerpt
    assert time.perf_counter() - start < 0.05
