"""The page's scripts, run by Node.js with stand-ins for the page's modules. What a browser draws was looked at in both hosts' pages."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no Node.js")

APP = """
export const extensions = {}, nodes = {};
export const app = {
  graph: { getNodeById: (id) => nodes[id] },
  registerExtension: (extension) => { extensions[extension.name] = extension; },
  extensionManager: { setting: { get: () => globalThis.language } },
};
"""
API = """
export const api = new EventTarget();
api.fetchApi = async () => ({ json: async () => globalThis.i18n });
"""
# An older page: it replaces a language's texts when it loads it. Its own listener puts a text into the node's box.
START = """
import { readFileSync, existsSync } from "node:fs";
import { app, extensions, nodes } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
globalThis.language = "ja";
globalThis.window = { comfyAPI: { utils: { applyTextReplacements: (page, text) => text.replace("%A.b%", page === app) } } };
globalThis.fetch = async (url) => ({ ok: existsSync(url), json: async () => JSON.parse(readFileSync(url)) });
globalThis.i18n = { ja: { nodeDefs: { SVDQuantLoadModel: "ours", Other: "theirs" } }, fr: {} };
const texts = {}, symbol = Symbol();
const page = {
  setLocaleMessage: (language, found) => { texts[language] = found; },
  mergeLocaleMessage: (language, found) => { texts[language] = { ...texts[language], ...found }; },
};
const vue = { __VUE_I18N_SYMBOL__: symbol, _context: { provides: { [symbol]: { global: page } } } };
globalThis.document = { getElementById: () => ({ __vue_app__: vue }) };
const box = { name: "$$node-text-preview" };
api.addEventListener("progress_text", ({ detail }) => { box.value = detail.text; });
await import("./svdquant.js");
await import("./translations.js");
for (const extension of Object.values(extensions)) await extension.setup();
async function say(text, nodeId = "1") {
  api.dispatchEvent(Object.assign(new Event("progress_text"), { detail: { text, nodeId } }));
  await new Promise((resolve) => setTimeout(resolve, 10));
  return box.value;
}
function node(comfyClass, more = {}) {
  return { comfyClass, size: [200, 100], setSize(size) { this.size = size; }, widgets: [box], ...more };
}
nodes[1] = node("SVDQuantLoadModel");
nodes[2] = node("Other");
nodes[3] = node("Subgraph", { subgraph: { getNodeById: () => nodes[1] } });
"""


@pytest.fixture
def run(tmp_path):
    """A function that runs JavaScript after START and returns the JSON of the expression at its end."""
    folder = tmp_path / "extensions" / "pack"
    shutil.copytree(ROOT / "web", folder)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "scripts" / "app.js").write_text(APP)
    (tmp_path / "scripts" / "api.js").write_text(API)

    def run(code, result):
        (folder / "run.js").write_text(f"{START}\n{code}\nconsole.log(JSON.stringify({result}));", encoding="utf-8")
        done = subprocess.run([NODE, str(folder / "run.js")], capture_output=True, encoding="utf-8", timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_messages_are_shown_in_the_pages_language(run):
    texts = ["layer 3 of 7, about 2 min left", "layer 3 of 7",
             "x.safetensors is a LoRA; move it to models/loras, and choose a FLUX.1 model in safetensors format.",
             "16-bit FLUX.1, opens with SVDQuant Load Model\nother", "no message",
             "x.safetensors lacks tensor a.b; the file is incomplete, download it again."]
    places = [*((text, "1") for text in texts), ("stopped", "3:1"), ("stopped", "2"), ("stopped", "9")]
    said = run("", f"[{', '.join(f'await say(...{json.dumps(place)})' for place in places)}]")
    assert said == ["7 層中 3 層目、残り約 2 min", "7 層中 3 層目",
                    "x.safetensors は LoRA です。models/loras に移動し、safetensors 形式の FLUX.1 モデルを選んでください。",
                    "16-bit FLUX.1、SVDQuant モデルを読み込む で開けます\nother", "no message",
                    "x.safetensors にテンソル a.b がありません。ファイルが不完全です。もう一度ダウンロードしてください。",
                    "停止しました", "stopped", "stopped"]


def test_an_older_page_keeps_the_packs_translations(run):
    assert run("page.setLocaleMessage('ja', { main: 1 }); page.setLocaleMessage('de', { main: 2 });", "texts") == {
        "ja": {"main": 1, "nodeDefs": {"SVDQuantLoadModel": "ours"}}, "fr": {"nodeDefs": {}}, "de": {"main": 2}}


def test_a_filename_has_the_tokens_of_save_image(run):
    code = """const save = node("SVDQuantSaveModel", { widgets: [{ name: "filename", value: "x_%A.b%" }] });
              extensions["SVDQuant.nodes"].nodeCreated(save);"""
    assert run(code, "[save.widgets[0].serializeValue(), save.size]") == ["x_true", [300, 100]]


def test_workflows_of_earlier_versions_keep_their_values(run):
    code = """class Quantize { configure(data) { this.found = data.widgets_values; } }
              extensions["SVDQuant.nodes"].beforeRegisterNodeDef(Quantize, { name: "SVDQuantQuantizeModel" });
              const load = (values) => { const made = new Quantize(); made.configure({ widgets_values: values }); return made.found; };"""
    present = ["best", 32, 8, 5, "x.*", 4, "temp"]
    assert run(code, f"[load([8, 5, 32, 'best', 'x.*', 4, 'temp']), load({json.dumps(present)}), load(undefined)]") == [
        present, present, None]


def test_a_box_grows_with_its_text_once_the_page_has_measured_it(run):
    """Which it does when it draws the node, at the earliest."""
    code = """let drawn = 0;
              nodes[1].onDrawForeground = () => { drawn += 1; };
              extensions["SVDQuant.nodes"].nodeCreated(nodes[1]);
              const draw = async () => { nodes[1].onDrawForeground(); await new Promise((resolve) => setTimeout(resolve, 10)); };
              await say("a sentence of more than two lines, ".repeat(5)); await draw(); const unmeasured = nodes[1].size[1];
              box.computedHeight = 58; const offScreen = nodes[1].size[1]; await draw(); const after = [...nodes[1].size];
              box.computedHeight += after[1] - 100; await draw(); await say("short"); await draw(); const short = [...nodes[1].size];
              box.computedHeight = 600; await say("line\\n".repeat(500)); await draw(); const long = [...nodes[1].size];"""
    unmeasured, off_screen, after, short, long, drawn = run(code, "[unmeasured, offScreen, after, short, long, drawn]")
    assert unmeasured == off_screen == 100 and 150 < after[1] < 250
    assert after == short == long and after[0] == 300, "a box never shrinks, and a long text scrolls"
    assert drawn == 5, "what was there before still runs"


def test_reports_are_shown_as_markdown_and_other_texts_as_they_are(run):
    """A newer page's text finds its switch by the node's id; an older page has no switch."""
    code = """await import("./js/report_preview.js");
              const quantize = { type: "SVDQuantQuantizeModel", outputs: [{ name: "MODEL" }, { name: "report" }] };
              const preview = (id, slot, ...widgets) => ({ id, type: "PreviewAny", widgets, getInputLink: () => ({ origin_slot: slot }),
                                                           getInputNode: () => quantize });
              const text = () => ({ name: "preview_text", component: {}, props: { kept: 1 } });
              const shown = (slot) => preview(7, slot, text(), { name: "preview_mode", value: false });
              app.graph.nodes = [shown(1), shown(0), preview(8, 1, { name: "preview" }), { type: "Other" }];
              extensions["SVDQuant.ReportPreview"].afterConfigureGraph();"""
    report, model, older, _ = run(code, "app.graph.nodes")
    assert [report["widgets"][1]["value"], report["widgets"][0]["props"]] == [True, {"kept": 1, "nodeId": 7}]
    assert [model["widgets"][1]["value"], model["widgets"][0]["props"]] == [False, {"kept": 1}]
    assert older["widgets"] == [{"name": "preview"}]
