"""Convert a workflow in the browser's format to a prompt in the server's format, with the server's own /object_info.

The browser's format lists nodes with positional widget values, and links in a table. The server's format has, for each node, its
class and its inputs by name. Muted nodes, bypassed nodes and reroutes have the same effect as in the page.
"""

ALWAYS, MUTED, BYPASSED = 0, 2, 4  # a node's `mode`
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")  # the page gives these a control_after_generate widget even where the schema does not ask


class WorkflowError(ValueError):
    """The workflow does not fit the server's nodes."""


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """{node id: {"class_type", "inputs"}} for POST /prompt."""
    if workflow.get("definitions", {}).get("subgraphs"):
        raise WorkflowError("This workflow has subgraphs, which are not supported here; unpack them in ComfyUI first.")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}  # id -> (node, output slot)
    prompt = {}
    for node in nodes.values():
        if node["type"] in NOTES or node["type"] == "Reroute" or node.get("mode", ALWAYS) != ALWAYS:
            continue
        if node["type"] not in object_info:
            raise WorkflowError(f"The server has no node {node['type']} (node {node['id']}).")
        inputs = widget_values(node, object_info[node["type"]])
        for entry in node.get("inputs", []):
            source = find_source(entry.get("link"), nodes, links)
            if source is not None:
                inputs[entry["name"]] = [str(source[0]), source[1]]
        meta = {"title": node.get("title", node["type"])}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": meta}
    return prompt


def specs(info: dict) -> dict:
    """{input name: (type, options)} in the page's order; a V1 combo's list of choices becomes type COMBO."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            options = options[0] if options else {}
            found[name] = ("COMBO", {**options, "options": kind}) if isinstance(kind, list) else (kind, options)
    return found


def widget_values(node: dict, info: dict) -> dict:
    """{input name: value} from a node's positional widget values, which exist for linked inputs too."""
    values = node.get("widgets_values", [])
    if isinstance(values, dict):
        return dict(values)
    values, inputs = iter(values), {}
    for name, (kind, options) in specs(info).items():
        if kind not in WIDGETS or options.get("forceInput"):
            continue
        try:
            inputs[name] = next(values)
        except StopIteration:
            raise WorkflowError(f"{node['type']} (node {node['id']}) has no value for {name}; "
                                "the workflow is older than the node.") from None
        if has_page_widget(name, kind, options):
            next(values, None)
    return inputs


def has_page_widget(name: str, kind: str, options: dict) -> bool:
    """Whether the page stores a value of its own behind this one: the seed's control, or the button that uploads a picture."""
    return kind == "INT" and options.get("control_after_generate", name in SEEDS) or options.get("image_upload", False)


def find_source(link: int | None, nodes: dict, links: dict) -> tuple[int, int] | None:
    """(node id, output slot) that feeds a link, through reroutes and bypassed nodes; None if nothing does."""
    while link is not None:
        node_id, slot = links[link]
        node = nodes[node_id]
        mode = node.get("mode", ALWAYS)
        if mode == MUTED:
            return None
        if mode != BYPASSED and node["type"] != "Reroute":
            return node_id, slot
        output_type = node["outputs"][slot]["type"]
        fits = [entry for entry in node.get("inputs", []) if node["type"] == "Reroute" or entry["type"] == output_type]
        link = fits[0].get("link") if fits else None
    return None


def problems(prompt: dict, object_info: dict) -> list[str]:
    """The parts of a prompt that the server would refuse or silently change; model files may be missing."""
    found = []
    for node_id, node in prompt.items():
        info = object_info[node["class_type"]]
        known = specs(info)
        place = f"{node['class_type']} (node {node_id})"
        found += [f"{place}: {name} is not one of its inputs" for name in node["inputs"].keys() - known.keys()]
        found += [f"{place}: {name} is missing" for name in info["input"].get("required", {}) if name not in node["inputs"]]
        for name in node["inputs"].keys() & known.keys():
            value, (kind, options) = node["inputs"][name], known[name]
            if isinstance(value, list):
                source = prompt[value[0]]["class_type"]
                given = object_info[source]["output"][value[1]]
                given = "COMBO" if isinstance(given, list) else given
                if "*" not in (given, kind) and given != kind:
                    found.append(f"{place}: {name} takes {kind}, {source} returns {given}")
            elif complaint := bad_value(value, kind, options):
                found.append(f"{place}: {name} {complaint}")
    return found


def bad_value(value, kind: str, options: dict) -> str | None:
    """The error in a widget's value, or None."""
    if kind in ("INT", "FLOAT"):
        if isinstance(value, bool) or not isinstance(value, int if kind == "INT" else (int, float)):
            return f"is {value!r}, not a number"
        if not options.get("min", value) <= value <= options.get("max", value):
            return f"is {value}, not within {options.get('min')} to {options.get('max')}"
    if kind == "BOOLEAN" and not isinstance(value, bool):
        return f"is {value!r}, not true or false"
    if kind == "STRING" and not isinstance(value, str):
        return f"is {value!r}, not text"
    if kind == "COMBO" and value not in options.get("options", []) and not is_model_file(value):
        return f"is {value!r}, not one of {options.get('options')}"
    return None


def is_model_file(value) -> bool:
    return isinstance(value, str) and value.endswith((".safetensors", ".sft"))
