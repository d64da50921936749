"""HTML for the page of a run: elements, tables and figures, and the frame around them.

Text becomes markup in `tag` and `joined` alone, which escape every string that is not `Markup` itself. The frame
forbids the page to fetch anything, and to run any script but its own, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.figure import Figure

from cacp.figures import COLOURS, FAINT, INK, WHOLE, svg


class Markup(str):
    """HTML as it stands; any other string is text."""


VOID = ("meta", "br")
_COLOURS = {colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)}
_COLOURS |= {INK: "var(--ink)", FAINT: "var(--faint)", WHOLE: "var(--whole)"}

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --panel: #f5f7fa; --ink: #1f2937; --soft: #52607a; --faint: #c3c9d2;
  --whole: #d9dde3; --c0: #2563a8; --c1: #b45309; --c2: #0f766e; --c3: #9333a8; --c4: #b91c4a; --c5: #4d7c0f;
  --c6: #52607a; --c7: #7c4a2d; --sans: system-ui, sans-serif; --mono: ui-monospace, Consolas, monospace }
@media screen and (prefers-color-scheme: dark) { :root { --page: #11151b; --panel: #1b222c; --ink: #e5e9f0;
  --soft: #a3b1c6; --faint: #3b4656; --whole: #364152; --c0: #6aa9ee; --c1: #f0a35e; --c2: #45cdbb; --c3: #d59bf0;
  --c4: #f58aa8; --c5: #a9d65c; --c6: #a3b1c6; --c7: #d8a581 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 var(--sans); overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--faint) }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
a { color: var(--c0) }
nav a { margin-right: .9rem; display: inline-block }
p, li { max-width: 48rem }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); margin: 1rem 0 }
.card { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem }
.card strong { display: block; font-size: 1.7rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.card span { display: block; font-size: .9rem }
.wide { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: .4rem 0 }
caption { text-align: left; padding-bottom: .3rem; max-width: calc(100vw - 2rem) }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint) }
thead th { white-space: normal; vertical-align: bottom; max-width: 8rem }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--page) }
table.text th, table.text td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere }
table.text td:first-child { white-space: nowrap }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)) }
figure { margin: 0; max-width: 100%; min-width: 0; overflow-x: auto }
figure svg { display: block; width: 100%; height: auto }
figure svg * { stroke-linejoin: round; stroke-linecap: butt }
pre { background: var(--panel); padding: .7rem 1rem; border-radius: .5rem; overflow-x: auto; margin: .5rem 0 }
code, pre { font-family: var(--mono); font-size: .88rem }
.problem { border-left: .25rem solid var(--c4); padding-left: .8rem }
button { font: inherit; font-size: .8rem; color: var(--soft); background: none; border: 1px solid var(--faint);
  border-radius: .3rem; cursor: pointer }
summary { cursor: pointer }
@media print { body { max-width: none; font-size: 10pt } nav, button { display: none }
  .wide, figure { overflow: visible } figure, tr, .card, pre { break-inside: avoid }
  h2, h3, caption { break-after: avoid } pre { white-space: pre-wrap } }
"""

# A button that copies, where there is something to copy: tables with tabs, as spreadsheets take them.
SCRIPT = """
for (const item of document.querySelectorAll("table, pre")) {
  const cells = row => [...row.cells].map(cell => cell.innerText.trim()).join("\\t");
  const text = () => item.rows ? [...item.rows].map(cells).join("\\n") : item.innerText;
  const button = document.createElement("button");
  button.textContent = "copy";
  button.onclick = () => navigator.clipboard.writeText(text()).then(() => { button.textContent = "copied"; });
  (item.rows ? item.parentNode : item).after(button);
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(item => { item.open = true; }));
"""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; children and values of attributes that are not Markup are escaped. `class_` stands for class."""
    shown = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    return Markup(f"<{name}{shown}>" if name in VOID else f"<{name}{shown}>{joined(children)}</{name}>")


def joined(parts: Sequence[object]) -> Markup:
    """Markup and text, one after another."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts))


def table(caption: str, columns: Sequence[object], rows: Sequence[Sequence[object]], text: bool = False) -> Markup:
    """A table that scrolls by itself where the window is narrow; columns in which no row says anything are left out.

    Args:
        caption: what it shows, and in which unit.
        columns: their names.
        rows: cells; None for one that is not known.
        text: cells hold words, not numbers.
    """
    filled = [any(row[column] not in (None, "") for row in rows) for column in range(len(columns))]
    head = [tag("th", column, scope="col") for column, shown in zip(columns, filled, strict=True) if shown]
    body = [
        tag("tr", *(tag("td", "–" if cell is None else cell) for cell, shown in zip(row, filled, strict=True) if shown))
        for row in rows
    ]
    element = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *head)),
        tag("tbody", *body),
        class_="text" if text else "numbers",
    )
    return tag("div", element, class_="wide")


class Figures:
    """Numbers the figures of a page: ids are unique in it."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, figure: Figure, title: str, description: str = "") -> Markup:
        """A figure as inline SVG, its title and description told to a screen reader, in the page's colours and type."""
        self._count += 1
        prefix = f"f{self._count}-"
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        inner = svg(figure, transparent=True).partition("<svg")[2].partition(">")[2]
        inner = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", inner, flags=re.DOTALL)
        inner = re.sub(r'( id="|"#|\(#)', lambda match: f"{match[1]}{prefix}", inner)
        inner = re.sub(r'style="[^"]*"', lambda match: _themed(match[0]), inner)
        told = [tag("title", title, id=f"{prefix}title"), tag("desc", description, id=f"{prefix}desc")]
        head = (
            f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {0.75 * width:g} {0.75 * height:g}" '
            f'role="img" aria-labelledby="{prefix}title {prefix}desc" '
            f'style="min-width:{min(320, width) if width < 600 else 0.7 * width:g}px;max-width:{1.4 * width:g}px">'
        )
        caption = tag("figcaption", tag("b", title), f" {description}")
        return tag("figure", Markup(head), *told, Markup(inner), caption)


def _themed(style: str) -> str:
    for colour, variable in _COLOURS.items():
        style = style.replace(colour, variable)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", style)


def sections(parts: Mapping[str, Markup]) -> Iterator[Markup]:
    """A table of contents, then every part that is not empty under its heading."""
    shown = {f"part-{number}": (title, part) for number, (title, part) in enumerate(parts.items()) if part}
    yield tag("nav", *(tag("a", title, href=f"#{name}") for name, (title, _) in shown.items()))
    for name, (title, part) in shown.items():
        yield tag("section", tag("h2", title, id=name), part)


def document(title: str, *body: Markup) -> str:
    """A whole page, in one file."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    page = tag("html", head, tag("body", *body, tag("script", Markup(SCRIPT))), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"
