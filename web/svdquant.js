// The page's part of the nodes: Save Image's tokens in filenames, workflows of earlier versions, and boxes that are tall enough to read.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const WIDTHS = { SVDQuantInspect: 400, SVDQuantDoctor: 520, SVDQuantSaveModel: 300, SVDQuantLoadModel: 300, SVDQuantDownloadModel: 300 };
const TEXT_BOX = "$$node-text-preview"; // the page's name of the widget under which a node's text stands
const LETTER = 6.2, LINE = 14, MARGIN = 44; // pixels of the text's letters and lines, and around it
const TALLEST = 600; // pixels of a box; a longer text scrolls

// The node of ours that an event of the server is about, also within subgraphs, where its id is a path; undefined if it is another's.
export function ownNode(id) {
  let graph = app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node?.comfyClass?.startsWith("SVDQuant") ? node : undefined;
}

// The values of Quantize Model's widgets in workflows in which steps, seed and rank came before the preset.
function inPresentOrder([steps, seed, rank, preset, ...rest]) {
  return [preset, rank, steps, seed, ...rest];
}

// The widget in which the page shows a node's text.
export function textBox(node) {
  return node?.widgets?.find((widget) => widget.name === TEXT_BOX);
}

// The width of a line in Latin letters; those of Chinese, Japanese and Korean are about twice as wide.
function width(line) {
  return [...line].reduce((sum, letter) => sum + (letter > "\u2e80" ? 1.9 : 1), 0);
}

const unfitted = new WeakSet(); // nodes with a new text

// The page gives a node's text two lines, whatever its length: make room for the rest of it. Called when a node is drawn, since the page has
// measured the box only then; a node off the screen waits.
function fit(node) {
  const box = textBox(node);
  if (!box?.computedHeight || !unfitted.delete(node)) return;
  const columns = (node.size[0] - MARGIN) / LETTER;
  const lines = box.value.split("\n").reduce((count, line) => count + Math.max(1, Math.ceil(width(line) / columns)), 0);
  const missing = Math.min(lines * LINE + MARGIN, TALLEST) - box.computedHeight;
  if (missing > 0) node.setSize([node.size[0], node.size[1] + missing]);
}

function fitWhenDrawn(node) {
  const draw = node.onDrawForeground;
  node.onDrawForeground = function (...given) {
    if (unfitted.has(node)) setTimeout(() => fit(node)); // not while the page draws
    return draw?.apply(this, given);
  };
}

app.registerExtension({
  name: "SVDQuant.nodes",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "SVDQuantQuantizeModel") return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (data) {
      const values = data.widgets_values;
      if (typeof values?.[0] === "number") data = { ...data, widgets_values: inPresentOrder(values) };
      return configure.call(this, data);
    };
  },

  nodeCreated(node) {
    if (node.comfyClass?.startsWith("SVDQuant")) fitWhenDrawn(node);
    if (node.comfyClass === "SVDQuantSaveModel") {
      const filename = node.widgets.find((widget) => widget.name === "filename");
      filename.serializeValue = () => window.comfyAPI.utils.applyTextReplacements(app, filename.value);
    }
    const least = WIDTHS[node.comfyClass];
    if (least > node.size[0]) node.setSize([least, node.size[1]]);
  },

  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      const node = ownNode(detail.nodeId);
      if (!node) return;
      setTimeout(() => { // after the page's own listener, and the translation
        unfitted.add(node);
        app.canvas?.setDirty(true, true);
      });
    });
  },
});
