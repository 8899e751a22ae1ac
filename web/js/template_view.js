// Opens this pack's workflow templates at the view that they were laid out for.
//
// Newer pages zoom every template out until all of it fits, which leaves no readable text on a graph of a dozen nodes. Older ones restore
// `extra.ds`, as all of them do for saved workflows. A template that carries `extra.svdquant_restore_view` gets the stored view everywhere.
// The mark is removed with the first opening, so that undo, tabs and saved copies behave like any other workflow's.

import { app } from "../../../scripts/app.js";

const MARK = "svdquant_restore_view";
const VIEW_SETTING = "Comfy.EnableWorkflowViewRestore";

function isView(view) {
  return Number.isFinite(view?.scale) && view.scale > 0 && view.offset?.length === 2 && view.offset.every(Number.isFinite);
}

/** Remove the mark from a graph and return the view that it asks for, or null. */
function takeView(graph) {
  if (!graph?.extra?.[MARK]) return null;
  delete graph.extra[MARK];
  return isView(graph.extra.ds) ? graph.extra.ds : null;
}

app.registerExtension({
  name: "SVDQuant.TemplateView",
  afterConfigureGraph() {
    const view = takeView(app.rootGraph ?? app.graph);
    const canvas = app.canvas?.ds;
    if (!view || !canvas || app.extensionManager?.setting?.get(VIEW_SETTING) === false) return;
    // On a screen so large that the whole graph is readable, the page's own choice stays.
    if (canvas.scale >= view.scale) return;
    canvas.scale = view.scale;
    [canvas.offset[0], canvas.offset[1]] = view.offset;
    app.canvas.setDirty(true, true);
  },
});
