"""A page as one HTML file that needs nothing but a browser: no network, no other files."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files


def page(
    title: str,
    body: Iterable[str],
    footer: str,
    *,
    kind: str = "",
    data: str = "",
    scripts: Sequence[str] = (),
    styles: Sequence[str] = ("report.css",),
) -> str:
    """A whole HTML document, whose own policy lets it load nothing and run no script but those given.

    Args:
        title: plain text.
        body: parts of the page as HTML, everything in them escaped; empty ones are left out.
        footer: HTML.
        kind: class of the body.
        data: HTML that the scripts read.
        scripts: JavaScript.
        styles: files of this folder.
    """
    scripts = [_embeddable(script) for script in scripts]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escape(title)}</title>",
            f"<style>{''.join(asset(style) for style in styles)}</style>",
            "</head>",
            f'<body class="{kind}">' if kind else "<body>",
            "<main>",
            *(part for part in body if part),
            f"<footer>{footer}</footer>",
            "</main>",
            *([data] if data else []),
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def asset(name: str) -> str:
    """The text of a file of this folder."""
    return files("tinier.report").joinpath(name).read_text(encoding="utf-8")


def _embeddable(script: str) -> str:
    """A script that cannot end its element early, whose bytes the browser hashes as they are here."""
    script = script.replace("\r\n", "\n").replace("\r", "\n")
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(scripts: list[str]) -> str:
    """The page may load nothing, and run these scripts only."""
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    ]
    allowed = " ".join(hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
