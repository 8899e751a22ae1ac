"""Draw the picture of the template SVDQuant_FLUX1-Redux_variations: a schematic of its graph.

    python demo/host/setup.py demo/redux_schematic.py

There is no tiny Redux, so that no variation can be drawn: the frames of the variations stay empty. The picture that goes in is one that the
tiny FLUX drew in 4 bits, from the sheet of the text-to-image template.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
SOURCE, TARGET = WORKFLOWS / "SVDQuant_FLUX1-dev_text_to_image.jpg", WORKFLOWS / "SVDQuant_FLUX1-Redux_variations.jpg"
SIDE, FRAME = 640, 168  # pixels of the picture, and of a frame in it
BACKGROUND, BOX, TEXT, DIM = "#202024", "#3a3a44", "#f2f2f2", "#b4b4bc"
IMAGE, CLIP, MODEL = "#64b5f6", "#a8dadc", "#b39ddb"  # ComfyUI's colours of such links
TOKENS = 27 * 27  # SigLIP's patches of 14 pixels in a picture of 384


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def box(draw: ImageDraw.ImageDraw, x: int, y: int, width: int, name: str, note: str) -> None:
    """A node with its name and what it gives."""
    draw.rounded_rectangle((x, y, x + width, y + 66), 10, BOX)
    draw.text((x + width // 2, y + 22), name, TEXT, font(21), anchor="mm")
    draw.text((x + width // 2, y + 48), note, DIM, font(15), anchor="mm")


def arrow(draw: ImageDraw.ImageDraw, points: list[tuple[int, int]], colour: str) -> None:
    """A line through points, whose last stretch goes to the right or down and ends in a head."""
    draw.line(points, colour, 4, joint="curve")
    x, y = points[-1]
    if points[-2][1] == y:
        draw.polygon([(x + 8, y), (x - 6, y - 8), (x - 6, y + 8)], colour)
    else:
        draw.polygon([(x, y + 8), (x - 8, y - 6), (x + 8, y - 6)], colour)


def schematic(source: Image.Image) -> Image.Image:
    """source: the square sheet of four pictures, of which the first one goes in."""
    sheet = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((32, 52), "Variations of a picture", TEXT, font(34), anchor="lm")
    half = source.width // 2
    first = source.convert("RGB").crop((0, 0, half, half)).resize((FRAME, FRAME), Image.Resampling.LANCZOS)
    sheet.paste(first, (32, 112))
    box(draw, 300, 118, 308, "SigLIP", f"sees {TOKENS} patches")
    box(draw, 300, 222, 308, "Redux", f"turns them into {TOKENS} text tokens")
    box(draw, 300, 326, 308, "FLUX.1 dev in 4 bits", "draws what they say")
    arrow(draw, [(32 + FRAME, 151), (288, 151)], IMAGE)
    arrow(draw, [(454, 184), (454, 212)], CLIP)
    arrow(draw, [(454, 288), (454, 316)], MODEL)
    for number in range(3):
        x, y = 32 + number * (FRAME + 36), 456
        arrow(draw, [(454, 392), (454, 424), (x + FRAME // 2, 424), (x + FRAME // 2, y - 12)], IMAGE)
        draw.rectangle((x, y, x + FRAME, y + FRAME - 24), outline=DIM, width=2)
        draw.text((x + FRAME // 2, y + FRAME // 2 - 12), f"seed {number + 1}", DIM, font(20), anchor="mm")
    return sheet


if __name__ == "__main__":
    schematic(Image.open(SOURCE)).save(TARGET, quality=90)
    print(TARGET)
