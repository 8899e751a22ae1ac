"""Where the page draws a workflow's nodes and links, in both of its renderers, from the file alone.

The older renderer draws nodes on the canvas; the newer one ("Nodes 2.0") lays them out as HTML, which takes more room. All positions
are graph coordinates in pixels at 100 %, (0, 0) anywhere, y downwards; a rectangle is (left, top, right, bottom).
"""

from dataclasses import dataclass

from host import workflow

TITLE = 30  # above a node's position
CLEARANCE = 14  # between a link and a node that it passes; at less it seems to touch or to enter the node
# Heights and the least width of a node in the newer renderer; the older one takes less.
MARGINS, SLOT, WIDGET, MULTILINE, LEAST_WIDTH = 24, 24, 32, 68, 225
PACK_NAME = 24  # the line with the name of a node's pack, unless it is ComfyUI
BADGE = 22  # the same name in the older renderer, above the title
MISSING_FILE = 28  # the line under a loader whose file is missing
# Text that a node shows after its run is no widget of its schema; PreviewAny's text also has a switch.
SHOWN_TEXT = {"SVDQuantLoadModel": 64, "SVDQuantQuantizeModel": 64, "PreviewAny": 104}
PICTURE = 246  # the place for the chosen picture in a node that loads one
SLOT_PITCH = 20
POINTS = 64  # samples of a link's curve

# What a window of 1366 x 768 shows of the canvas between the side bar, the tabs and the buttons, in screen pixels.
WINDOW = (62, 135, 1366, 768)


@dataclass(frozen=True)
class Renderer:
    """Where a renderer puts slots: the first one's pixels below its node's position, of a node and of a reroute, and the pixels inside
    the node's left or right edge."""

    name: str
    first_slot: int
    reroute_slot: int
    inset: int


RENDERERS = (Renderer("canvas", 14, 14, 10), Renderer("Nodes 2.0", 12, -19, 0))


def is_note(node: dict) -> bool:
    return node["type"] in workflow.NOTES


def is_drawn_by_the_page(node: dict) -> bool:
    """Whether the page alone knows this node's type: notes and reroutes, which the server's /object_info does not list."""
    return is_note(node) or node["type"] == "Reroute"


def least_height(node: dict, info: dict) -> int:
    """Height in pixels of a node's slots, widgets and shown text, below its title."""
    slots, widgets = 0, 0
    for kind, options in workflow.specs(info).values():
        if kind not in workflow.WIDGETS or options.get("forceInput"):
            slots += 1
        else:
            widgets += (MULTILINE if options.get("multiline") else WIDGET) + PICTURE * bool(options.get("image_upload"))
    height = MARGINS + SLOT * max(slots, len(info["output"])) + widgets + SHOWN_TEXT.get(node["type"], 0)
    return height + PACK_NAME * node["type"].startswith("SVDQuant") + MISSING_FILE * ("models" in node["properties"])


def box(node: dict, object_info: dict) -> tuple[float, float, float, float]:
    """A node's rectangle with its title and badge. The page enlarges a node whose stored size is too small."""
    (x, y), (width, height) = node["pos"], node["size"]
    if not is_drawn_by_the_page(node):
        width, height = max(width, LEAST_WIDTH), max(height, least_height(node, object_info[node["type"]]))
    return x, y - TITLE - BADGE * node["type"].startswith("SVDQuant"), x + width, y + height


def group_box(group: dict) -> tuple[float, float, float, float]:
    left, top, width, height = group["bounding"]
    return left, top, left + width, top + height


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def within(a: tuple, b: tuple) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Points of the cubic spline that the page draws from an output to an input; its handles are a quarter of the distance long."""
    (x0, y0), (x3, y3) = start, end
    handle = ((x3 - x0) ** 2 + (y3 - y0) ** 2) ** 0.5 / 4
    x1, x2 = x0 + handle, x3 - handle
    points = []
    for i in range(POINTS + 1):
        t = i / POINTS
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
        points.append((a * x0 + b * x1 + c * x2 + d * x3, (a + b) * y0 + (c + d) * y3))
    return points


def slot_points(link: list, nodes: dict, renderer: Renderer) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where a link leaves its output and where it enters its input."""
    _, source, out_slot, target, in_slot, _ = link

    def slot_y(node: dict, slot: int) -> float:
        return node["pos"][1] + SLOT_PITCH * slot + (renderer.reroute_slot if node["type"] == "Reroute" else renderer.first_slot)

    source, target = nodes[source], nodes[target]
    start = (source["pos"][0] + source["size"][0] - renderer.inset, slot_y(source, out_slot))
    return start, (target["pos"][0] + renderer.inset, slot_y(target, in_slot))


def hidden_links(graph: dict, object_info: dict, renderer: Renderer) -> list[str]:
    """Links that run behind a node or a note, the two nodes that they connect included, or pass another closer than CLEARANCE; each as a
    sentence."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    boxes = {number: box(node, object_info) for number, node in nodes.items()}
    found = []
    for link in graph["links"]:
        start, end = slot_points(link, nodes, renderer)
        points = curve(start, end)
        for number, (left, top, right, bottom) in boxes.items():
            if number in (link[1], link[3]):
                # A link begins and ends inside its own nodes' edges, and may swing out behind them by as much.
                own = renderer.inset + 2
                left, right = left + own * (number == link[3]), right - own * (number == link[1])
            else:
                left, top, right, bottom = left - CLEARANCE, top - CLEARANCE, right + CLEARANCE, bottom + CLEARANCE
            if any(left < x < right and top < y < bottom for x, y in points):
                ends = " -> ".join(f"{nodes[i].get('title', nodes[i]['type'])} ({i})" for i in (link[1], link[3]))
                found.append(f"{link[5]} {ends} runs behind {nodes[number].get('title', nodes[number]['type'])} ({number})")
    return found


def on_screen(rectangle: tuple, view: dict) -> tuple[float, float, float, float]:
    """A rectangle in screen pixels under a workflow's `extra.ds`."""
    scale, (dx, dy) = view["scale"], view["offset"]
    left, top, right, bottom = rectangle
    return (left + dx) * scale, (top + dy) * scale, (right + dx) * scale, (bottom + dy) * scale
