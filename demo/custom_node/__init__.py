"""The nodes of the demo and the tests: captions for the demo's tiny FLUX. They are not part of the pack that users install."""

import importlib.util
from pathlib import Path

import torch.nn.functional as F
from comfy_api.latest import ComfyExtension, io

# custom_nodes has a link to this folder, so the neighbouring folder is found from the link's target.
WORDS = Path(__file__).resolve().parents[1] / "tiny_flux" / "words.py"


def load_words():
    """demo/tiny_flux/words.py: `encode(caption)` -> context (1, L, C), pooled (1, V)."""
    spec = importlib.util.spec_from_file_location("svdquant_demo_words", WORDS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


words = load_words()


class Words(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantDemoWords",
            display_name="Words to conditioning (demo)",
            category="SVDQuant/demo",
            description="Encodes captions for the demo's tiny FLUX, which knows a few dozen words and has no text encoder.",
            inputs=[io.String.Input("text", multiline=True, default="small red circle left of large blue star on white",
                                    tooltip="One caption per line. A word that the tiny model does not know is an error.")],
            outputs=[
                io.Conditioning.Output("each", display_name="each", is_output_list=True,
                                       tooltip="A list with one conditioning per caption: a sampler after it runs once for each."),
                io.Conditioning.Output("all", display_name="all",
                                       tooltip="One conditioning that holds every caption, for Quantize Model to calibrate on."),
            ],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        captions = [line.strip() for line in text.splitlines() if line.strip()]
        if not captions:
            raise ValueError("Words to conditioning: the text is empty; write one caption per line.")
        entries = [[context, {"pooled_output": pooled}] for context, pooled in map(words.encode, captions)]
        return io.NodeOutput([[entry] for entry in entries], entries)


class WidenConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantDemoWidenConditioning",
            display_name="Widen conditioning (demo)",
            category="SVDQuant/demo",
            description="Adds channels of zeros to text tokens, so that nodes made for FLUX.1's text width take the demo's words.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The tokens, from Words to conditioning."),
                io.Int.Input("channels", default=4096, min=1, max=16384, tooltip="Channels of a token afterwards; FLUX.1 reads 4096."),
            ],
            outputs=[io.Conditioning.Output(tooltip="The same tokens, with as many channels as asked for.")],
        )

    @classmethod
    def execute(cls, conditioning: list, channels: int) -> io.NodeOutput:
        return io.NodeOutput([[F.pad(context, (0, channels - context.shape[-1])), extra] for context, extra in conditioning])


class DemoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Words, WidenConditioning]


async def comfy_entrypoint() -> DemoExtension:
    return DemoExtension()
