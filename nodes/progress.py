"""The progress that a node shows, its cancellation, and the folders in which an interrupted quantization is kept."""

import os

import comfy.model_management
import comfy.utils
import folder_paths
from server import PromptServer

from ..quant.text import bounded

FOLDER = "svdquant_progress"
# {value of the input progress: function that returns the folder, or None if nothing is kept}
PROGRESS_FOLDERS = {"temp": lambda: os.path.join(folder_paths.get_temp_directory(), FOLDER),
                    "output": lambda: os.path.join(folder_paths.get_output_directory(), FOLDER),
                    "off": lambda: None}


class NodeProgress:
    """A node's progress bar, the line of text under it, and Cancel. As a context it also shows the sentence of an error on the node: newer
    pages hide an exception's text behind "View details"."""

    refused = set()  # ids of the nodes on which the sentence of a refused input is shown

    def __init__(self, node_id):
        self.node_id = node_id
        self.bar = None

    @classmethod
    def of(cls, node):
        """The progress of the node that is running. node: its class, as ComfyUI passes it to execute."""
        return cls(node.hidden.unique_id if node.hidden else None)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        # In newer versions of ComfyUI a cancellation is no Exception.
        if isinstance(error, Exception) and not isinstance(error, comfy.model_management.InterruptProcessingException):
            self.say(bounded(next(iter(str(error).splitlines()), kind.__name__)))

    def total(self, steps):
        self.bar = comfy.utils.ProgressBar(steps, node_id=self.node_id)

    def step(self, text):
        self.check()
        self.bar.update(1)
        self.say(text)

    def at(self, done, total, text):
        """Set the bar to `done` of `total`; step() counts on its own."""
        self.check()
        if self.bar is None:
            self.total(total)
        self.bar.update_absolute(done, total)
        self.say(text)

    def say(self, text):
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate, as in a name, can't be sent
        if self.node_id is not None and PromptServer.instance is not None:
            PromptServer.instance.send_progress_text(text, self.node_id)

    def refuse(self, sentence):
        """Show why an input was refused when Run was clicked: newer pages hide that too."""
        self.refused.add(self.node_id)
        self.say(sentence)

    def accept(self):
        """Clear the sentence of a refused input: a node whose result is in ComfyUI's cache does not run, so it shows nothing new."""
        if self.node_id in self.refused:
            self.refused.remove(self.node_id)
            self.say(" ")  # the page ignores an empty text

    def check(self):
        comfy.model_management.throw_exception_if_processing_interrupted()
