"""The converter from the browser's workflow format to the server's prompt format."""

import pytest

from host.workflow import WorkflowError, bad_value, problems, to_prompt, widget_values

INFO = {
    "Load": {"input": {"required": {"name": [["a.safetensors"]]}}, "output": ["MODEL"]},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"min": 0, "max": 99, "control_after_generate": True}],
                "steps": ["INT", {"min": 1, "max": 50}],
                "mode": ["COMBO", {"options": ["x", "y"]}],
            },
            "optional": {"extra": ["MODEL"], "note": ["STRING", {"forceInput": True}]},
        },
        "output": ["LATENT"],
    },
    "Pass": {"input": {"required": {"model": ["MODEL"]}}, "output": ["MODEL"]},
}


def workflow(middle_mode: int = 0, sample_values: tuple = (7, "fixed", 20, "y")) -> dict:
    """Load -> Pass -> Reroute -> Sample, and a note."""
    return {
        "nodes": [
            {"id": 1, "type": "Load", "inputs": [], "outputs": [{"type": "MODEL"}], "widgets_values": ["a.safetensors"]},
            {"id": 2, "type": "Pass", "mode": middle_mode, "inputs": [{"name": "model", "type": "MODEL", "link": 1}],
             "outputs": [{"type": "MODEL"}]},
            {"id": 3, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 2}], "outputs": [{"type": "MODEL"}]},
            {"id": 4, "type": "Sample", "inputs": [{"name": "model", "type": "MODEL", "link": 3}], "outputs": [{"type": "LATENT"}],
             "widgets_values": list(sample_values)},
            {"id": 5, "type": "MarkdownNote", "widgets_values": ["words"]},
        ],
        "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"], [3, 3, 0, 4, 0, "MODEL"]],
    }


def test_widgets_are_named_and_the_seed_control_is_skipped():
    prompt = to_prompt(workflow(), INFO)
    assert prompt["4"]["inputs"] == {"model": ["2", 0], "seed": 7, "steps": 20, "mode": "y"}
    assert prompt.keys() == {"1", "2", "4"}
    assert problems(prompt, INFO) == []


def test_the_upload_buttons_value_is_skipped():
    node = {"id": 1, "type": "LoadImage", "widgets_values": ["a.png", "image", "lanczos"]}
    info = {"input": {"required": {"image": [["a.png"], {"image_upload": True}], "method": [["lanczos"]]}}}
    assert widget_values(node, info) == {"image": "a.png", "method": "lanczos"}


def test_a_bypassed_node_passes_its_input_on():
    assert to_prompt(workflow(middle_mode=4), INFO)["4"]["inputs"]["model"] == ["1", 0]


def test_a_muted_node_feeds_nothing():
    prompt = to_prompt(workflow(middle_mode=2), INFO)
    assert problems(prompt, INFO) == ["Sample (node 4): model is missing"]


def test_an_unknown_node_is_named():
    graph = workflow()
    graph["nodes"][0]["type"] = "Gone"
    with pytest.raises(WorkflowError, match="no node Gone"):
        to_prompt(graph, INFO)


def test_a_workflow_older_than_the_node_is_an_error():
    with pytest.raises(WorkflowError, match="no value for mode"):
        to_prompt(workflow(sample_values=(7, "fixed", 20)), INFO)


def test_subgraphs_are_refused():
    with pytest.raises(WorkflowError, match="subgraphs"):
        to_prompt({"nodes": [], "links": [], "definitions": {"subgraphs": [{}]}}, INFO)


def test_problems_names_values_that_the_server_would_refuse():
    prompt = to_prompt(workflow(sample_values=(7, "fixed", 500, "z")), INFO)
    prompt["4"]["inputs"]["surplus"] = 1
    assert sorted(problems(prompt, INFO)) == [
        "Sample (node 4): mode is 'z', not one of ['x', 'y']",
        "Sample (node 4): steps is 500, not within 1 to 50",
        "Sample (node 4): surplus is not one of its inputs",
    ]


@pytest.mark.parametrize(
    ("value", "kind", "options"),
    [(True, "INT", {}), (1.5, "INT", {}), ("1", "FLOAT", {}), (1, "BOOLEAN", {}), (1, "STRING", {}), ("q", "COMBO", {})],
)
def test_bad_values(value, kind, options):
    assert bad_value(value, kind, options)


@pytest.mark.parametrize(("value", "kind"), [(1, "FLOAT"), (False, "BOOLEAN"), ("", "STRING"), ("my.safetensors", "COMBO")])
def test_good_values(value, kind):
    assert bad_value(value, kind, {}) is None
