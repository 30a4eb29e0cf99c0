"""The frame of this project's HTML pages: one file with its style inside, sections, tables, facts. Knows nothing of what it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def page(title: str, heading: str, lead: str, sections: Iterable[str]) -> str:
    """A whole page. ``lead`` is text, ``sections`` are HTML."""
    return (
        _PAGE.replace("{{title}}", escape(title))
        .replace("{{heading}}", escape(heading))
        .replace("{{lead}}", escape(lead))
        .replace("{{body}}", "\n".join(sections))
    )


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already; the first column is a row's heading."""
    lines = [
        "<div class='wide'><table><thead><tr>",
        *(f"<th scope='col'>{cell}</th>" for cell in head),
        "</tr></thead><tbody>",
    ]
    for first, *others in rows:
        lines.append(f"<tr><th scope='row'>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def facts(title: str, values: Mapping[str, object]) -> str:
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in values.items())
    return f"<h3>{escape(title)}</h3><dl>{items}</dl>"


def bullets(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def paragraph(sentence: str) -> str:
    return f"<p>{escape(sentence)}</p>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
:root { color-scheme: light; }
body { margin: 0; background: #f5f7fa; color: #1f2933; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: 1rem 0 .25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: 1rem; margin: 1rem 0; }
p { margin: .6rem 0 0; color: #3e4c59; font-size: .93rem; }
img { max-width: 100%; height: auto; display: block; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.wide { overflow-x: auto; }
.roomy { min-width: 40rem; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
th { font-weight: 600; }
thead th { color: #52606d; font-weight: 500; font-size: .85rem; }
tr > :first-child { text-align: left; }
small { color: #7b8794; }
dl { display: grid; grid-template-columns: minmax(8rem, 14rem) 1fr; gap: .15rem .75rem; margin: 0; font-size: .9rem; }
dt { color: #52606d; }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2rem; font-size: .93rem; color: #3e4c59; }
</style>
</head>
<body>
<main>
<h1>{{heading}}</h1>
<p>{{lead}}</p>
{{body}}
</main>
</body>
</html>
"""
