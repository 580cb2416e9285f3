"""Tokens as words: what the marks of tokenizers mean, and coloured words as HTML."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence

import numpy as np

SPACES = ("▁", "Ġ", " ")  # what leads a word: U+2581 in SentencePiece, U+0120 in byte-level BPE, a space where decoded
_ALONE = re.compile(r"<.+>|\[[A-Z]+\]|[\r\nĊ]+")  # special tokens; line breaks, U+010A in byte-level BPE
BREAK = "↵"


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is written on one colour; `glued` to the piece before it, or else the beginning of a word."""

    text: str
    glued: bool
    value: float
    paper: str = ""
    ink: str = ""


def pieces(rows: Sequence[Sequence[str]], values: Sequence[np.ndarray], how: str) -> list[list[Piece]]:
    """The tokens of every row as they are to be written; `how` is what `jaxlrp.plot.text` calls `pieces`."""
    # in a text whose words are led by a space, what has none goes on with the word before it
    led = any(token.startswith(SPACES) for row in rows for token in row)
    return [_row(tokens, v, how, led) for tokens, v in zip(rows, values, strict=True)]


def _row(tokens: Sequence[str], values: np.ndarray, how: str, led: bool) -> list[Piece]:
    made: list[Piece] = []
    joins = False  # whether the token before may be gone on with
    for token, value in zip(tokens, values, strict=True):
        shown, glued, alone = token, False, _ALONE.fullmatch(token) is not None
        if how != "show" and not alone:
            glued = joins and (not token.startswith(SPACES) if led else token.startswith("##") and len(token) > 2)
            shown = token.removeprefix("##") if glued and not led else token[token.startswith(SPACES) :]
            shown = re.sub("|".join(SPACES), " ", shown)
        joins = not alone
        shown = re.sub(r"\s", " ", re.sub("\r?\n|Ċ", BREAK, shown))
        if how == "sum" and glued:
            last = made.pop()
            shown, value, glued = last.text + shown, last.value + value, last.glued
        made.append(Piece(shown, glued, float(value)))
    return made


def coloured(row: Sequence[Piece], pixels: np.ndarray) -> list[Piece]:
    """The row on its colours, uint8 (len(row), 3), each in black or white, whichever contrasts with it more.

    Contrast is (L + .05) / (L' + .05), L > L' the relative luminances (WCAG 2): equal at sqrt(.05 * 1.05) - .05.
    """
    srgb = pixels / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    inks = np.where(linear @ [0.2126, 0.7152, 0.0722] < np.sqrt(0.05 * 1.05) - 0.05, "#ffffff", "#000000")
    found = zip(row, pixels, inks, strict=True)
    return [dataclasses.replace(piece, paper=_hex(pixel), ink=str(ink)) for piece, pixel, ink in found]


def page(rows: Sequence[Sequence[Piece]], labels: Sequence[str], title: str | None, legend: str = "") -> str:
    """The rows as one HTML element, with every character of the user's escaped."""
    lines = []
    for row, label in zip(rows, labels, strict=True):
        line = "".join(" " * (not piece.glued) + _span(piece) for piece in row)
        lines.append(f'<div style="color:#666">{html.escape(label)}</div><div>{line.strip()}</div>')
    head = f'<div style="font-weight:bold">{html.escape(title)}</div>' if title else ""
    style = "font-family:sans-serif;line-height:1.8;overflow-wrap:anywhere;color:black;background:white;padding:.5em"
    table = "display:grid;grid-template-columns:max-content 1fr;column-gap:1em"
    return f'<div style="{style}">{head}<div style="{table}">{"".join(lines)}</div>{legend}</div>'


def _span(piece: Piece) -> str:
    style = f"background:{piece.paper};color:{piece.ink};padding:.15em .12em;white-space:pre-wrap"
    written = html.escape(piece.text) or "&nbsp;"
    return f'<span style="{style}" title="{piece.value:.3g}">{written}</span>' + "<br>" * piece.text.endswith(BREAK)


def legend(limit: float, name: str, pixels: np.ndarray) -> str:
    """A colour bar from -limit to limit."""
    colours = ",".join(map(_hex, pixels))
    style = f"display:inline-block;width:10em;height:.7em;background:linear-gradient(to right,{colours})"
    return f'<div style="font-size:85%">{-limit:.3g} <span style="{style}"></span> {limit:.3g} {name}</div>'


def document(page: str, title: str | None) -> str:
    """A file for a browser."""
    name = html.escape(title or "relevance")
    return f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{name}</title>\n{page}\n</html>\n'


def _hex(pixel: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*pixel)
