"""What a node shows while it works, how it learns that it is to stop, and where it keeps what it has done by then."""

import os

import comfy.model_management
import comfy.utils
import folder_paths
from server import PromptServer

KEPT = "svdquant_progress"  # the folder's name
# {choice of a node: function that gives the folder, or None for nowhere}
PROGRESS_FOLDERS = {"temp": lambda: os.path.join(folder_paths.get_temp_directory(), KEPT),
                    "output": lambda: os.path.join(folder_paths.get_output_directory(), KEPT),
                    "off": lambda: None}


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
