"""Sections as Markdown, and as one page of HTML that needs nothing else and prints."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from daco_rt.evaluate.parts import Code, Example, Figure, Section, Table

PICTURE = 192
"""Longest side in pixels of the pictures in a page."""
STYLE = """\
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  padding: 0 1.2rem; max-width: 72rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { max-width: 52rem; margin: .4rem 0 .8rem; } nav a { margin-right: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
td { white-space: nowrap; } td.left { white-space: normal; }
th { vertical-align: bottom; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #999; font-weight: 600; } .left { text-align: left; }
figure { margin: .8rem 0; } figure svg { max-width: 100%; height: auto; }
details { margin: .5rem 0; border: 1px solid #ddd; border-radius: 4px; padding: .4rem .8rem; }
summary { cursor: pointer; } .tag { color: #666; font-size: .85rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem;
  margin: .6rem 0; }
.answers > div { background: #f6f6f6; border-radius: 4px; padding: .5rem .7rem; overflow-wrap: anywhere; }
.answers b { display: block; font-size: .85rem; }
.answers pre { white-space: pre-wrap; font: inherit; margin: .2rem 0; }
details > img { display: block; margin: .5rem 0; max-width: 12rem; border: 1px solid #ddd; }
code { background: #f2f2f2; padding: .1rem .3rem; border-radius: 3px; }
body > pre { background: #f2f2f2; padding: .5rem .7rem; border-radius: 4px; overflow-x: auto; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { margin: 0; padding: 0; max-width: none; font-size: 10pt; } nav { display: none; }
  h2 { break-after: avoid; } figure, tr, details { break-inside: avoid; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; width: 100%; }
  td { white-space: normal; } th, td { padding: .15rem .3rem; } thead { display: table-header-group; }
  .answers > div, code { background: none; border: 1px solid #ccc; }
  figure svg { max-width: 24cm; }
}
"""


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the sections as Markdown; figures are links to ``figures/``."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.text:
            lines += [section.text, ""]
        for part in section.parts:
            if isinstance(part, Table):
                rules = ["---" if i < part.left else "---:" for i in range(len(part.titles))]
                lines += [_row(part.titles), _row(rules), *map(_row, part.rows), ""]
            elif isinstance(part, Figure):
                lines += [f"![{part.alt}](figures/{part.name}.svg)", ""]
            elif isinstance(part, Code):
                lines += ["```sh", *part.lines, "```", ""]
            else:
                seen = " (with a picture)" if part.image is not None else ""
                lines += [f"**{part.category}** — {_plain(part.question)}{seen}", ""]
                for variant, (text, removed) in part.answers.items():
                    gone = f" *(removed: {removed})*" if removed else ""
                    lines.append(f"- **{variant}**: {_plain(text)}{gone}")
                lines.append("")
    return "\n".join(lines)


def page(title: str, sections: Sequence[Section]) -> str:
    """Return the sections as one HTML page with everything inside; it loads nothing and runs no script."""
    links = "".join(f'<a href="#s{i}">{html.escape(s.title)}</a>' for i, s in enumerate(sections))
    body = [f"<h1>{html.escape(title)}</h1>", f"<nav>{links}</nav>"]
    for i, section in enumerate(sections):
        body.append(f'<h2 id="s{i}">{html.escape(section.title)}</h2>')
        if section.text:
            body.append(f"<p>{_inline(section.text)}</p>")
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_table(part))
            elif isinstance(part, Figure):
                body.append(f'<figure role="img" aria-label="{html.escape(part.alt)}">{part.svg}</figure>')
            elif isinstance(part, Code):
                body.append("<pre>" + "\n".join(map(html.escape, part.lines)) + "</pre>")
            else:
                body.append(_example(part))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html>\n<html lang="en"><head>{head}\n<style>\n{STYLE}</style></head>\n<body>\n' + (
        "\n".join(body) + "\n</body></html>\n"
    )


def _table(table: Table) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="left">{html.escape(c)}</{tag}>'
            if i < table.left
            else f"<{tag}>{html.escape(c)}</{tag}>"
            for i, c in enumerate(row)
        )

    rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    head = f"<tr>{cells('th', table.titles)}</tr>"
    return f'<div class="scroll"><table><thead>{head}</thead>\n<tbody>{rows}</tbody></table></div>'


def _example(example: Example) -> str:
    boxes = []
    for variant, (text, removed) in example.answers.items():
        gone = f'<span class="tag">removed: {html.escape(removed)}</span>' if removed else ""
        boxes.append(f"<div><b>{html.escape(variant)}</b><pre>{html.escape(text)}</pre>{gone}</div>")
    head = f'<span class="tag">{html.escape(example.category)}</span> {html.escape(example.question)}'
    picture = _picture(example.image)
    answers = f'<div class="answers">{"".join(boxes)}</div>'
    return f"<details open><summary>{head}</summary>{picture}{answers}</details>"


def _picture(path: Path | None) -> str:
    """A small copy of a picture inside the page; nothing where it cannot be read any more."""
    if path is None:
        return ""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except OSError:
        return ""
    small.thumbnail((PICTURE, PICTURE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="the picture of this question">'


def _inline(text: str) -> str:
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text of a model on one line, in which nothing is markup."""
    flat = " ".join(text.split())
    for sign in "\\`*_<>[]|#":
        flat = flat.replace(sign, f"\\{sign}")
    return flat
