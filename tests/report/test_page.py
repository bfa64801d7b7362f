"""The page as a browser meets it: read with the standard library's parser, which shares no code with jinja2."""

import base64
import dataclasses
import hashlib
import html.parser
import re

import pytest

from interp_jax.models.promoted_tokens import TokenLogit
from interp_jax.report import (
    DemoReport,
    DictionaryScore,
    LatentDashboard,
    Snippet,
    SteeringSample,
    write_page,
)
from interp_jax.report.page import SHADES, render_page

HOSTILE = "</script><img src=x onerror=alert(1)>\"'`&amp;<svg onload=alert(2)>{{ 7 * 7 }}{% raw %}-->]]>$\\frac$"


class Page(html.parser.HTMLParser):
    """Elements with their attributes in order, and the text of each element that is not markup."""

    VOID = frozenset({"meta", "input", "br", "img", "link"})

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.by_tag: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.by_tag.setdefault(tag, []).append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
        for tag in set(self.open):
            self.by_tag[tag][-1] += data


def asks_for(source: str) -> list[str]:
    """Everything in a page that would make a browser ask for something elsewhere."""
    page = Page(source)
    found = []
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "action", "formaction", "poster", "data", "background"):
                if not (value or "").startswith("#"):
                    found.append(f"{tag} {name}={value}")
            elif value and "url(" in value and not re.fullmatch(r"[^u]*url\(#[\w.-]+\)[^u]*", value):
                found.append(f"{tag} {name}={value}")
        if tag in ("iframe", "img", "link", "object", "embed", "base", "image", "video", "audio", "foreignobject"):
            found.append(tag)
    for css in page.by_tag.get("style", []):
        found += re.findall(r"@import[^;]*|url\([^)]*\)", css)
    # Nothing may look like an address at all, in scripts, styles or attributes.
    found += re.findall(r"(?:https?:)?//[\w.-]+\.\w+", source)
    return found


def test_asks_for_nothing(report):
    assert asks_for(render_page(report)) == []


def test_the_check_itself_finds_what_it_should():
    for source in (
        '<img src="x.png">',
        '<a href="https://example.org">x</a>',
        "<style>@import 'x.css';</style>",
        "<style>a { background: url(x.png) }</style>",
        '<p style="background: url(x.png)">x</p>',
        "<script>fetch('//example.org/x')</script>",
    ):
        assert asks_for(source), source


def test_is_well_formed_utf8_and_written_whole(report, tmp_path):
    path = write_page(tmp_path / "demo" / "index.html", report)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    assert source.startswith("<!doctype html>")
    assert ("meta", {"charset": "utf-8"}) in page.elements
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    links = {attributes["href"] for _, attributes in page.elements if "href" in attributes}
    assert {link[1:] for link in links} <= set(identifiers)


def test_shows_the_numbers_beside_each_other(report):
    page = Page(render_page(report))
    assert page.by_tag["th"][:3] == ["measured", "SAE encoder", "gradient pursuit"]
    rows = list(zip(page.by_tag["th"][3:12], page.by_tag["td"][0:18:2], page.by_tag["td"][1:18:2], strict=True))
    assert rows == [
        ("L0", "32.0", "31.9"),
        ("fraction of variance unexplained", "0.213", "0.172"),
        ("latents never active", "2.13 %", "1.13 %"),
        ("loss, clean", "3.110", "3.110"),
        ("loss, spliced", "3.610", "3.480"),
        ("loss, mean-ablated", "8.940", "8.940"),
        ("loss, zero-ablated", "9.810", "9.810"),
        ("loss recovered (zero)", "0.925", "0.945"),
        ("loss recovered (mean)", "0.914", "0.937"),
    ]
    for shown in ("262,144", "4,608 latents", "3.113 nats a token", "resid_post of layer 15 of 30, width 576"):
        assert shown in page.text


def test_shows_every_part(report):
    page = Page(render_page(report))
    assert sum(attributes.get("class") == "latent" for _, attributes in page.elements) == 20
    assert sum(attributes.get("class") == "picture" for tag, attributes in page.elements if tag == "svg") == 4
    assert all(attributes["aria-label"] for tag, attributes in page.elements if attributes.get("role") == "img")
    assert "".join(page.by_tag["code"]).count("for layer, name, value in (running := ij.iterate(model)") == 1
    assert page.by_tag["samp"] == [report.loop.output]
    for sample in report.steering:
        for text in (sample.prompt, sample.unsteered.strip(), *(s.text.strip() for s in sample.steered)):
            assert text in page.text
    sites = page.text[page.text.index("All 302 sites") :]
    assert sites.count("attn_heads") == 30
    assert "[1, 16, 49152]" in sites


def test_snippets_read_as_the_text_they_are_from(report):
    page = Page(render_page(report))
    for latent in report.latents[:3]:
        for snippet in latent.snippets:
            assert "".join(snippet.tokens) in page.text


def test_tokens_are_shaded_by_activation_and_the_peak_is_marked(report):
    tokens = ("The", " mill", " race", " ran", " dry")
    snippet = Snippet(tokens, (0.0, 1.0, 10.0, 0.001, 5.0), peak=2)
    latent = LatentDashboard(7, 0.01, 10.0, (snippet,), (), ())
    source = render_page(dataclasses.replace(report, latents=(latent,)))
    line = re.search(r'<span class="text">(.*?)</span></li>', source, re.DOTALL)
    assert line is not None
    assert line.group(1) == (
        'The<span class="s1" title="1.00"> mill</span><span class="s10 peak" title="10.00"> race</span>'
        '<span class="s1" title="0.00"> ran</span><span class="s5" title="5.00"> dry</span>'
    )


def hostile(value):
    """A report with every string in it replaced by the hostile one, keeping what must differ different."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, tuple):
        return tuple(hostile(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: hostile(item) for name, item in fields.items()})
    return value


def test_hostile_text_stays_text(report):
    tame, source = render_page(report), render_page(hostile(report))
    page = Page(source)
    assert page.open == []
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in Page(tame).elements]
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert page.by_tag["title"] == [HOSTILE]
    assert page.by_tag["script"] == Page(tame).by_tag["script"]
    assert asks_for(source) == []
    assert page.text.count(HOSTILE) > 1000
    assert "49" not in page.by_tag["h1"][0]


def test_the_policy_allows_the_one_script_and_no_other(report):
    page = Page(render_page(report))
    (script,) = page.by_tag["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy


def luminance(color) -> float:
    """Relative luminance as WCAG 2.2 defines it, of sRGB components from 0 to 255."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (component / 255 for component in color)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_is_readable_on_every_ground_in_light_dark_and_print(report):
    css = Page(render_page(report)).by_tag["style"][0]
    palettes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(palettes) == 3

    def rgb(text):
        text = text if len(text) == 7 else "#" + "".join(2 * c for c in text[1:])
        return [int(text[i : i + 2], 16) for i in (1, 3, 5)]

    for palette in palettes:
        colors = {name: rgb(value) for name, value in re.findall(r"--(\w+): (#\w+);", palette)}
        shade = [int(c) for c in re.findall(r"--shade: (\d+) (\d+) (\d+);", palette)[0]]
        for text in ("ink", "muted", "first", "second"):
            assert contrast(colors[text], colors["ground"]) >= 4.5, (text, palette)
        for text in ("ink", "muted"):
            assert contrast(colors[text], colors["panel"]) >= 4.5, (text, palette)
        for step in range(1, SHADES + 1):
            alpha = step / SHADES
            ground = [alpha * s + (1 - alpha) * g for s, g in zip(shade, colors["ground"], strict=True)]
            assert contrast(colors["ink"], ground) >= 4.5, (step, palette)


def test_what_was_not_measured_is_a_dash_and_nothing_breaks(report):
    nan = float("nan")
    score = DictionaryScore("SAE encoder", 32.0, nan, None, 3.0, nan, nan, nan, nan, nan)
    empty = dataclasses.replace(
        report,
        scores=(score,),
        steering=(),
        latents=(LatentDashboard(0, 0.0, 0.0, (), (), ()),),
        sites=(),
        densities=(0.0, 0.0),
        training_curve=dataclasses.replace(report.training_curve, steps=(), values=()),
        setting=dataclasses.replace(report.setting, seconds=None, versions=()),
    )
    text = Page(render_page(empty)).text
    assert "nan" not in text.lower().replace("finance", "")
    assert "–" in text
    assert "Not active on this text." in text
    assert "Nothing was steered" in text
    assert "2 of 2 never are" in text


def test_an_interrupted_write_leaves_the_old_page(report, tmp_path, monkeypatch):
    path = write_page(tmp_path / "index.html", report)
    before = path.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_page(path, dataclasses.replace(report, title="another"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_the_same_report_gives_the_same_page(report):
    assert render_page(report) == render_page(report)


def test_types_are_exported(report):
    assert isinstance(report, DemoReport)
    assert isinstance(report.steering[0], SteeringSample)
    assert isinstance(report.latents[0].promoted[0], TokenLogit)
