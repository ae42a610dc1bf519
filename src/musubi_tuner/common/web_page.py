"""HTML files that need nothing beside them, in one look."""

from __future__ import annotations

import base64
import html
from pathlib import Path

_STYLE = Path(__file__).with_name("web_page.css")


def web_page(title: str, lead: str, body: str, *, style: str = "") -> str:
    """A whole page.

    Args:
        title, lead: plain text.
        body: HTML below them.
        style: CSS beside the shared one.
    """
    styles = _STYLE.read_text(encoding="utf-8") + style
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{styles}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>{body}</main></body></html>\n"
    )


def section(heading: str, body: str) -> str:
    """A card with a plain text heading around HTML."""
    return f"<section><h2>{html.escape(heading)}</h2>{body}</section>"


def data_uri(media_type: str, data: bytes) -> str:
    """A file as an address, for ``src``."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
