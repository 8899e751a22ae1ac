"""Compose the contact sheet: a row of pictures for each model, with the PSNR against the first row under each picture of the others."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, MARGIN, LABEL = 14, 28, 190  # pixels: between pictures, around the sheet, width of the column of the models' names
PAPER, INK, FAINT = "white", "#1a1a1a", "#6b6b6b"


@dataclass(frozen=True)
class Row:
    title: str
    file_bytes: int
    pictures: list[Image.Image]


def psnr(picture: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB, pixels in [0, 1]; infinite for equal pictures."""
    error = np.asarray(picture, np.float64) / 255 - np.asarray(reference, np.float64) / 255
    mean_square = float(np.mean(error * error))
    return float("inf") if mean_square == 0 else -10 * float(np.log10(mean_square))


def psnrs(row: Row, reference: Row) -> list[float]:
    return [psnr(picture, other) for picture, other in zip(row.pictures, reference.pictures, strict=True)]


def megabytes(row: Row) -> str:
    return f"{row.file_bytes / 1e6:.2f} MB"


def table(rows: list[Row], captions: list[str]) -> dict:
    """The sheet's figures, for JSON: file sizes, and PSNR in dB against the first row."""
    return {
        "file_bytes": {row.title: row.file_bytes for row in rows},
        "psnr": [{"prompt": caption} | {row.title: round(psnrs(row, rows[0])[index], 2) for row in rows[1:]}
                 for index, caption in enumerate(captions)],
        "mean_psnr": {row.title: round(float(np.mean(psnrs(row, rows[0]))), 2) for row in rows[1:]},
    }


def text_table(rows: list[Row], captions: list[str]) -> str:
    """The same figures as lines of text."""
    figures = table(rows, captions)
    width = max(map(len, captions))
    lines = ["".join([f"{'PSNR against ' + rows[0].title + ', dB':<{width}}", *(f"{row.title:>14}" for row in rows)])]
    for entry in figures["psnr"]:
        lines.append(f"{entry['prompt']:<{width}}{'':14}" + "".join(f"{entry[row.title]:14.2f}" for row in rows[1:]))
    lines.append(f"{'mean':<{width}}{'':14}" + "".join(f"{figures['mean_psnr'][row.title]:14.2f}" for row in rows[1:]))
    lines.append(f"{'file':<{width}}" + "".join(f"{megabytes(row):>14}" for row in rows))
    return "\n".join(lines)


def compose(rows: list[Row], captions: list[str]) -> Image.Image:
    """The sheet as a picture. Every row has one picture for each caption, and all pictures have one size."""
    width, height = rows[0].pictures[0].size
    title, head, body = (ImageFont.load_default(size) for size in (26, 19, 15))
    words = [wrap(caption, body, width) for caption in captions]
    top = MARGIN + 62 + 20 * max(text.count("\n") + 1 for text in words)
    pitch = height + 40
    extent = (left(len(captions), width) - GAP + MARGIN, top + len(rows) * pitch + MARGIN - 12)
    sheet = Image.new("RGB", extent, PAPER)
    draw = ImageDraw.Draw(sheet)
    sizes = "      ".join(f"{row.title} {megabytes(row)}" for row in rows)
    draw.text((MARGIN, MARGIN), sizes, INK, title)
    for column, text in enumerate(words):
        draw.multiline_text((left(column, width), top - 10), text, FAINT, body, anchor="ld", spacing=4)
    for index, row in enumerate(rows):
        draw_row(sheet, draw, row, None if index == 0 else psnrs(row, rows[0]), top + index * pitch, head, body)
    return sheet


def left(column: int, width: int) -> int:
    return MARGIN + LABEL + column * (width + GAP)


def draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Row, values: list[float] | None, y: int,
             head: ImageFont.FreeTypeFont, body: ImageFont.FreeTypeFont) -> None:
    width, height = row.pictures[0].size
    draw.text((MARGIN, y + height // 2 - 34), row.title, INK, head)
    draw.text((MARGIN, y + height // 2 - 6), f"{megabytes(row)} file", FAINT, body)
    mean = "the reference" if values is None else f"mean {np.mean(values):.1f} dB"
    draw.text((MARGIN, y + height // 2 + 16), mean, FAINT, body)
    for column, picture in enumerate(row.pictures):
        sheet.paste(picture, (left(column, width), y))
        if values is not None:
            draw.text((left(column, width) + width // 2, y + height + 6), f"{values[column]:.1f} dB", INK, body, anchor="ma")


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Break text between words so that no line is wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width or not lines[-1] else [lines[-1], word]
    return "\n".join(lines)
