// Shows reports of SVDQuant Quantize Model as Markdown in ComfyUI's Preview as Text.
//
// Reports are Markdown with tables. Newer pages show text as plain text, with a switch that they don't store in workflows; older pages
// have no switch and always show Markdown. The text's component finds the switch by its node's id, which some pages give it only in
// Nodes 2.0.

import { app } from "../../../scripts/app.js";

const PREVIEW = "PreviewAny";
const QUANTIZE = "SVDQuantQuantizeModel";
const SWITCH = "preview_mode";
const TEXT = "preview_text";

/** Whether a node's only input comes from the report of a SVDQuant Quantize Model. */
function previewsReport(node) {
  const link = node.getInputLink(0);
  const source = link && node.getInputNode(0);
  return source?.type === QUANTIZE && source.outputs[link.origin_slot]?.name === "report";
}

app.registerExtension({
  name: "SVDQuant.ReportPreview",
  afterConfigureGraph() {
    for (const node of (app.rootGraph ?? app.graph).nodes) {
      const markdown = node.type === PREVIEW && node.widgets?.find((widget) => widget.name === SWITCH);
      if (!markdown || !previewsReport(node)) continue;
      markdown.value = true;
      const text = node.widgets.find((widget) => widget.name === TEXT);
      if (text?.component) text.props = { ...text.props, nodeId: node.id };
    }
  },
});
