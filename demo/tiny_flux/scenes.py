"""The pictures from which the small FLUX learns: one to three lit shapes on a shaded ground, drawn from signed distances.

`sample` draws random scenes with their captions, and `draw` renders them. Both work on whole batches, on any device; lengths are
fractions of the picture's side, x to the right and y down.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from . import words

SIZE = 192          # pixels a side; 24 x 24 latents, 144 image tokens
OBJECTS = 3         # at most, in one picture

RADII = torch.tensor((0.095, 0.14, 0.2))
MARGIN = 0.015
REACH = 1.1         # how far a shape of radius 1 extends
COLOUR_VALUES = torch.tensor((
    (0.86, 0.16, 0.16), (0.95, 0.52, 0.11), (0.96, 0.84, 0.18), (0.20, 0.65, 0.27), (0.13, 0.74, 0.80),
    (0.16, 0.34, 0.88), (0.53, 0.24, 0.76), (0.95, 0.48, 0.70), (0.94, 0.94, 0.95), (0.13, 0.13, 0.15)))
GROUND_VALUES = torch.tensor((
    (0.91, 0.91, 0.92), (0.93, 0.86, 0.72), (0.55, 0.56, 0.58), (0.60, 0.78, 0.92),
    (0.65, 0.87, 0.74), (0.92, 0.70, 0.72), (0.13, 0.17, 0.36), (0.10, 0.10, 0.11)))
HIDDEN = (("white", "white"), ("white", "cream"), ("black", "black"), ("black", "navy"),    # (colour, ground) that are not drawn,
          ("pink", "rose"), ("cyan", "sky"), ("blue", "navy"))                              # since the shape would hardly show

# shapes whose outline repeats n times per turn: n, radius of the outer vertex, radius half a sector further, rotation, lift
POLYGONS = {
    "square": (4, 1.2, 1.2 * math.cos(math.pi / 4), math.pi / 4, 0.0),
    "triangle": (3, 1.2, 0.6, 0.0, 0.22),
    "star": (5, 1.12, 0.48, 0.0, 0.05),
    "diamond": (4, 1.12, 1.12 * math.cos(math.pi / 4), 0.0, 0.0),
    "hexagon": (6, 1.04, 1.04 * math.cos(math.pi / 6), 0.0, 0.0),
}


@dataclass
class Scenes:
    """A batch of n scenes; an absent object has radius 0."""
    words: torch.Tensor     # (n, words.LENGTH) int64, the caption
    centers: torch.Tensor   # (n, OBJECTS, 2)
    radii: torch.Tensor     # (n, OBJECTS)
    shapes: torch.Tensor    # (n, OBJECTS) index into words.SHAPES
    colours: torch.Tensor   # (n, OBJECTS) index into words.COLOURS
    ground: torch.Tensor    # (n,) index into words.GROUNDS
    tilt: torch.Tensor      # (n,) direction in which the ground darkens, radians

    def captions(self) -> list[str]:
        return [words.sentence(ids) for ids in self.words]

    def where(self, keep: torch.Tensor, other: "Scenes") -> "Scenes":
        """The scenes of self where keep (n,) is true, and those of the other elsewhere."""
        def choose(a, b):
            return torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, b)
        return Scenes(*(choose(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)))


def sample(n: int, generator: torch.Generator) -> Scenes:
    """n random scenes with their captions: 30 % of one object, 55 % of two, 15 % of three in a row."""
    kind = _uniform(generator, n)
    one, two, three = (_scene(n, generator, objects) for objects in (1, 2, 3))
    return one.where(kind < 0.3, two.where(kind < 0.85, three))


def _uniform(generator, *shape, low=0.0, high=1.0):
    return torch.rand(*shape, generator=generator, device=generator.device) * (high - low) + low


def _pick(generator, shape, count):
    return torch.randint(count, shape, generator=generator, device=generator.device)


def _vocabulary(phrases, device):
    """(len(phrases), 2): the word indices of phrases of one or two words, padded."""
    rows = [words.word_ids(phrase)[:2] for phrase in phrases]
    return torch.tensor(rows, device=device)


def _scene(n, generator, objects):
    """n scenes, each with the given number of objects."""
    device = generator.device
    present = torch.arange(OBJECTS, device=device) < objects
    sizes = _pick(generator, (n, OBJECTS), 3 if objects < 3 else 2)
    shapes = _pick(generator, (n, OBJECTS), len(words.SHAPES))
    ground = _pick(generator, (n,), len(words.GROUNDS))
    colours = _visible_colours(_pick(generator, (n, OBJECTS), len(words.COLOURS)), ground)
    radii = RADII.to(device)[sizes] * _uniform(generator, n, OBJECTS, low=0.95, high=1.05) * present
    centers, phrase = _alone(generator, radii) if objects == 1 else _in_a_row(generator, radii)
    caption = _caption(generator, objects, sizes, colours, shapes, phrase, ground)
    return Scenes(caption, centers, radii, shapes, colours, ground, _uniform(generator, n, low=0.3, high=1.3))


def _visible_colours(colours, ground):
    """colours (n, OBJECTS), in which each colour that the ground would hide is replaced by the one half the list further on."""
    hidden = torch.zeros(len(words.COLOURS), len(words.GROUNDS), dtype=torch.bool, device=colours.device)
    for colour, under in HIDDEN:
        hidden[words.COLOURS.index(colour), words.GROUNDS.index(under)] = True
    half = len(words.COLOURS) // 2
    return torch.where(hidden[colours, ground[:, None]], (colours + half) % len(words.COLOURS), colours)


def _alone(generator, radii):
    """Centers (n, OBJECTS, 2) and the place's words (n, 2) for one object; a third of the captions name no place."""
    n, device = len(radii), generator.device
    place = _pick(generator, (n,), len(words.PLACES))
    grid = torch.tensor([(x, y) for y in (0.27, 0.5, 0.73) for x in (0.27, 0.5, 0.73)], device=device)
    named = grid[place] + _uniform(generator, n, 2, low=-0.03, high=0.03)
    reach = REACH * radii[:, :1] + MARGIN
    anywhere = reach + _uniform(generator, n, 2) * (1 - 2 * reach)
    says = _uniform(generator, n, 1) < 0.67
    centers = torch.where(says, named, anywhere)
    return centers[:, None].expand(-1, OBJECTS, -1), _vocabulary(words.PLACES, device)[place] * says


def _in_a_row(generator, radii):
    """Centers (n, OBJECTS, 2) of objects in a row or a column, and the relation's words (n, 2).

    The first object is the first along the axis for 'left of' and 'above', the last for 'right of' and 'below'. One
    caption in eight says 'and', which leaves the order open.
    """
    n, device = len(radii), generator.device
    relation = _pick(generator, (n,), len(words.RELATIONS))
    reach = REACH * radii
    count = (radii > 0).sum(dim=1, keepdim=True)
    slack = 1 - 2 * MARGIN - 2 * reach.sum(dim=1, keepdim=True)
    weights = _uniform(generator, n, OBJECTS + 1, low=0.25) * (torch.arange(OBJECTS + 1, device=device) <= count)
    gaps = slack * weights / weights.sum(dim=1, keepdim=True)
    along = MARGIN + (gaps[:, :-1] + 2 * reach).cumsum(dim=1) - reach
    backwards = (relation % 2 == 1)[:, None]
    along = torch.where(backwards, 1 - along, along)
    across = 0.5 + _uniform(generator, n, 1, low=-0.2, high=0.2) + _uniform(generator, n, OBJECTS, low=-0.06, high=0.06)
    across = torch.minimum(torch.maximum(across, reach + MARGIN), 1 - reach - MARGIN)
    upright = (relation >= 2)[:, None, None]
    centers = torch.where(upright, torch.stack((across, along), dim=-1), torch.stack((along, across), dim=-1))
    both = _uniform(generator, n, 1) < 0.125
    phrase = torch.where(both, _vocabulary(("and",), device), _vocabulary(words.RELATIONS, device)[relation])
    return centers, phrase


def _caption(generator, objects, sizes, colours, shapes, phrase, ground):
    """Word indices (n, words.LENGTH). A size is left out one time in five, the ground one time in ten."""
    n, device = len(ground), generator.device

    def index(names, picked):
        return torch.tensor([words.INDEX[name] for name in names], device=device)[picked]

    said = _uniform(generator, n, OBJECTS) < 0.8
    names = torch.stack((index(words.SIZES, sizes) * said, index(words.COLOURS, colours), index(words.SHAPES, shapes)), dim=-1)
    parts = [names[:, 0], phrase]
    for k in range(1, objects):
        parts += [phrase, names[:, k]] if k > 1 else [names[:, k]]
    says_ground = (_uniform(generator, n, 1) < 0.9).long()
    on = torch.full_like(ground, words.INDEX["on"])
    parts.append(torch.stack((on, index(words.GROUNDS, ground)), dim=-1) * says_ground)
    caption = torch.cat(parts, dim=1)
    order = (caption == 0).to(torch.uint8).argsort(dim=1, stable=True)
    return F.pad(caption.gather(1, order), (0, words.LENGTH - caption.shape[1]))


def _distances(shapes, x, y):
    """Signed distances (n, k, h, w) of unit shapes (n, k) at x to the right, y up; negative inside.

    Distances are those to the nearest outline's line: exact on the outline, where antialiasing needs them.
    """
    r = torch.hypot(x, y)
    ax, ay = x.abs(), y.abs()
    table = torch.tensor([POLYGONS.get(name, (4, 1.0, 1.0, 0.0, 0.0)) for name in words.SHAPES], device=x.device)
    d = _polygon(*table[shapes][..., None, None].unbind(dim=2), x, y)
    others = {
        "circle": r - 1,
        "ring": (r - 0.7).abs() - 0.29,
        "moon": torch.maximum(r - 1, F.leaky_relu(0.8 - torch.hypot(x - 0.52, y - 0.18), 0.4) * 2.5),  # no shadow in the bite
        "cross": torch.maximum(torch.maximum(ax, ay) - 0.98, torch.minimum(ax, ay) - 0.34),
        "heart": _heart(x, y, ax),
    }
    for name, distance in others.items():
        d = torch.where((shapes == words.SHAPES.index(name))[..., None, None], distance, d)
    return d


def _polygon(n, outer, inner, turn, lift, x, y):
    """Distance to the edge between the vertex (outer) and the point half a sector further on (inner)."""
    y = y + lift
    half = math.pi / n
    angle = torch.remainder(torch.atan2(x, y) - turn + half, 2 * half) - half
    r = torch.hypot(x, y)
    edge_x, edge_y = inner * torch.cos(half) - outer, inner * torch.sin(half)
    length = torch.hypot(edge_x, edge_y)
    return ((r * torch.cos(angle) - outer) * edge_y - r * torch.sin(angle).abs() * edge_x) / length


def _heart(x, y, ax, half=0.58, lift=-0.09, blend=0.3):
    """A square standing on its corner, with a disc on the middle of each upper edge; blend softens the crease between."""
    y = y - lift
    side = half / math.sqrt(2)
    square = torch.maximum((x + y).abs(), (y - x).abs()) / math.sqrt(2) - half
    disc = torch.hypot(ax - side, y - side) - half
    near = (1 - (square - disc).abs() / blend).clamp(min=0)
    return torch.minimum(square, disc) - near * near * blend / 4


def draw(scenes: Scenes, size: int = SIZE) -> torch.Tensor:
    """Pictures (n, 3, size, size) in [0, 1]: bevelled shapes lit from the top left, each over its soft shadow."""
    device = scenes.radii.device
    steps = (torch.arange(size, device=device) + 0.5) / size
    x, y = steps[None, :], steps[:, None]
    picture = _ground(scenes, x, y)
    radii = scenes.radii.clamp(min=1e-3)[..., None, None]
    px = (x - scenes.centers[..., 0, None, None]) / radii
    py = (scenes.centers[..., 1, None, None] - y) / radii
    d = torch.where(scenes.radii[..., None, None] > 0, _distances(scenes.shapes, px, py) * radii, 1.0)
    picture = picture * (1 - _shadows(d, size))
    shade, gloss = _light(d, radii, size)
    colour = COLOUR_VALUES.to(device)[scenes.colours][..., None, None]
    body = colour * shade[:, :, None] + gloss[:, :, None]
    alpha = (0.5 - d * size).clamp(0, 1)[:, :, None]
    for k in range(OBJECTS):
        picture = picture + alpha[:, k] * (body[:, k] - picture)
    return picture.clamp(0, 1)


def _ground(scenes, x, y):
    """(n, 3, h, w): the ground's colour, darker along the tilt and towards the corners."""
    tilt = scenes.tilt[:, None, None]
    slope = (x - 0.5) * torch.cos(tilt) + (y - 0.5) * torch.sin(tilt)
    corner = (x - 0.5) ** 2 + (y - 0.5) ** 2
    level = 1.03 - 0.26 * slope - 0.2 * corner
    return GROUND_VALUES.to(x.device)[scenes.ground][..., None, None] * level[:, None]


def _shadows(d, size, offset=0.028, blur=0.035):
    """(n, 1, h, w): the fraction of light that the objects block, in soft shadows to their lower right."""
    by = round(offset * size)
    moved = F.pad(d, (by, 0, by, 0), mode="replicate")[..., :size, :size]
    fall = (0.5 - moved / (2 * blur)).clamp(0, 1)
    return 0.42 * (fall * fall * (3 - 2 * fall)).amax(dim=1, keepdim=True)


def _light(d, radii, size, light=(-0.48, -0.60, 0.64)):
    """Shade (a factor) and gloss (added), both (n, k, h, w), of a rounded bevel a third of the radius wide."""
    dy, dx = torch.gradient(d * size, dim=(-2, -1))
    slope = 1 - (-d / (0.38 * radii)).clamp(0, 1)
    nx, ny = 0.85 * dx * slope, 0.85 * dy * slope
    nz = (1 - nx * nx - ny * ny).clamp(min=0.05).sqrt()
    facing = nx * light[0] + ny * light[1] + nz * light[2]
    shade = 1 + 0.62 * (facing - light[2])
    gloss = 0.4 * (facing - 0.86).clamp(min=0) / 0.14
    return shade, gloss
