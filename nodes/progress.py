"""What a node shows while it works, and how it learns that it is to stop."""

import comfy.model_management
import comfy.utils
from server import PromptServer


class NodeProgress:
    """Progress of a node: its bar, the line of text under it, and Cancel."""

    def __init__(self, node_id):
        self.node_id = node_id
        self.bar = None

    def total(self, steps):
        self.bar = comfy.utils.ProgressBar(steps, node_id=self.node_id)

    def step(self, text):
        self.check()
        self.bar.update(1)
        self.say(text)

    def at(self, done, total, text):
        """Set the bar to `done` of `total`; step counts for itself."""
        self.check()
        if self.bar is None:
            self.total(total)
        self.bar.update_absolute(done, total)
        self.say(text)

    def say(self, text):
        if self.node_id is not None and PromptServer.instance is not None:
            PromptServer.instance.send_progress_text(text, self.node_id)

    def check(self):
        comfy.model_management.throw_exception_if_processing_interrupted()
