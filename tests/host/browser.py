"""ComfyUI's page in a headless Chromium, driven by Playwright: open a template from the list, run it, save it.

Needs the package playwright and an installed chromium; Playwright's own download of a browser isn't used.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

WINDOW = {"width": 1366, "height": 768}
PATIENCE = 240_000  # milliseconds; a page without a GPU on a busy machine takes its time
# Text and address of the console's messages that are this pack's: its scripts, nodes and files.
OURS = ("svdquant", "workflow_templates/")
POLL = 500  # milliseconds

# The scripts' arguments and results are JSON. `app` is the page's own.
VIEW = "() => ({scale: app.canvas.ds.scale, offset: [...app.canvas.ds.offset]})"
GRAPH = "() => JSON.parse(JSON.stringify(app.graph.serialize()))"
READY = """() => window.app?.extensionManager?.command && app.canvas?.graph && document.querySelector('#graph-canvas')
    && !document.querySelector('#splash-loader')"""
SHOWN = "name => app.extensionManager.workflow.activeWorkflow?.filename === name && app.graph.nodes.length > 0"
BLANK = "name => app.extensionManager.workflow.activeWorkflow?.filename !== name && app.graph.nodes.length === 0"
COMMAND = "name => app.extensionManager.command.execute(name)"
SETTING = "([name, value]) => app.extensionManager.setting.set(name, value)"
COUNT_PROGRESS = """() => {
    window.progressSeen = 0;
    app.api.addEventListener("progress", () => { window.progressSeen += 1; });
}"""
IDLE = """async () => {
    const queue = await (await app.api.fetchApi("/queue")).json();
    return queue.queue_running.length + queue.queue_pending.length === 0;
}"""
DRAWN = """() => app.graph.nodes.filter(node => node.type === "SaveImage")
    .every(node => app.nodeOutputs[node.id]?.images?.length)"""


def chromium() -> str | None:
    """Path of an installed Chromium; None without one, or without playwright."""
    if importlib.util.find_spec("playwright") is None:
        return None
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One tab. complaints: the console's errors of this pack, and exceptions in any script."""

    def __init__(self, page, url: str):
        self.page, self.url, self.complaints = page, url, []
        page.set_default_timeout(PATIENCE)
        page.on("console", self.note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def note(self, message) -> None:
        """Other servers, which the page asks about packs and models' sizes, may be out of reach."""
        address = message.location.get("url", "")
        text = f"{message.text} {address}"
        ours = address.startswith(self.url) and any(word in text.lower() for word in OURS)
        if message.type == "error" and ours:
            self.complaints.append(text)

    def wait(self, condition: str, argument=None) -> None:
        """Wait until a script is true. It is asked at an interval, since a busy page draws few frames."""
        self.page.wait_for_function(condition, arg=argument, polling=POLL)

    def open(self, settings: dict) -> None:
        """Load the page and change its settings."""
        self.page.goto(self.url)
        self.wait(READY)
        for setting in settings.items():
            self.page.evaluate(SETTING, list(setting))

    def open_template(self, name: str) -> dict:
        """Choose a template in the list, as a user does, and return the graph that the page has made of it."""
        self.close_dialogs()
        self.page.evaluate(COMMAND, "Comfy.BrowseTemplates")
        self.page.locator("[role=dialog] input:not([type=checkbox])").first.fill(name)
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.wait(SHOWN, name)
        self.page.wait_for_timeout(500)  # for dialogs that the page opens when the graph is loaded
        return self.graph()

    def dialogs(self) -> list[str]:
        return self.page.locator("[role=dialog]").all_inner_texts()

    def close_dialogs(self) -> None:
        for _ in range(5):
            if not self.page.locator("[role=dialog]").count():
                return
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(300)

    def graph(self) -> dict:
        return self.page.evaluate(GRAPH)

    def view(self) -> dict:
        """{"scale", "offset"} of the canvas, as a workflow's `extra.ds`."""
        return self.page.evaluate(VIEW)

    def set_widgets(self, values: dict) -> None:
        """Set the widgets of these names of all nodes but notes."""
        self.page.evaluate("""values => app.graph.nodes.filter(node => !node.isVirtualNode).flatMap(node => node.widgets ?? [])
            .filter(widget => widget.name in values).forEach(widget => { widget.value = values[widget.name]; })""", values)

    def run(self) -> int:
        """Click Run, wait until every Save Image node shows pictures, and return the number of steps that the page heard of."""
        self.page.evaluate(COUNT_PROGRESS)
        self.page.get_by_test_id("queue-button").click()
        self.wait(DRAWN)
        self.wait(IDLE)
        return self.page.evaluate("window.progressSeen")

    def fit_view(self) -> None:
        """Zoom until the whole graph is on the screen."""
        self.page.evaluate(COMMAND, "Comfy.Canvas.FitView")
        self.page.wait_for_timeout(1000)  # the canvas moves there

    def markdown_switches(self) -> list[bool]:
        """The switches between plain text and Markdown of all nodes that show text."""
        return self.page.evaluate("""() => app.graph.nodes.flatMap(node => node.widgets ?? [])
            .filter(widget => widget.name === "preview_mode").map(widget => widget.value)""")

    def tables(self) -> int:
        """How many tables the page shows on nodes, which it makes of Markdown."""
        return self.page.locator(".dom-widget table").count()

    def save(self, name: str) -> None:
        """Save the open workflow under a name, as Ctrl+S does."""
        self.page.evaluate("() => { app.extensionManager.command.execute('Comfy.SaveWorkflow'); }")
        box = self.page.locator("[role=dialog] input").first
        box.fill(name)
        box.press("Enter")
        self.wait("name => app.extensionManager.workflow.activeWorkflow?.path === `workflows/${name}.json`", name)

    def reopen(self, name: str) -> dict:
        """Load the page anew and open the workflow saved last from the sidebar, behind an empty one: the page restores it by itself.

        A page that is still restoring names the restored workflow as the open one, whatever its graph holds by then. So each step waits
        for both."""
        self.page.reload()
        self.wait(READY)
        self.wait(SHOWN, name)
        self.page.evaluate(COMMAND, "Comfy.NewBlankWorkflow")
        self.wait(BLANK, name)
        self.page.keyboard.press("w")
        self.page.get_by_role("treeitem", name=name).last.click()
        self.wait(SHOWN, name)
        return self.graph()


@contextmanager
def page(url: str, settings: dict) -> Iterator[Page]:
    """A fresh tab on a server's page at 1366 x 768."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            tab = Page(browser.new_page(viewport=WINDOW), url)
            tab.open(settings)
            yield tab
        finally:
            browser.close()

