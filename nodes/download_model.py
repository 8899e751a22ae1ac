"""SVDQuant Download Model: a model file from the Hugging Face Hub into models/diffusion_models."""

from comfy_api.latest import io

from ..quant.download import hub
from ..quant.host import written
from ..quant.host.model_folder import found_elsewhere, name_in_folder, target_path
from .progress import NodeProgress

OWN_CHOICE = "repository and file below"


def nunchaku(model):
    """(repository, file) of a FLUX.1 as Nunchaku's makers publish it in INT4."""
    return f"nunchaku-ai/nunchaku-{model}", f"svdq-int4_r32-{model}.safetensors"


# What the Hub's pages list, sizes too.
PRESETS = {
    "FLUX.1-dev, Nunchaku INT4 rank 32 (6.77 GB)": nunchaku("flux.1-dev"),
    "FLUX.1-Krea-dev, Nunchaku INT4 rank 32 (6.77 GB)": nunchaku("flux.1-krea-dev"),
    "FLUX.1-Kontext-dev, Nunchaku INT4 rank 32 (6.77 GB)": nunchaku("flux.1-kontext-dev"),
    "FLUX.1-Canny-dev, Nunchaku INT4 rank 32 (6.77 GB)": nunchaku("flux.1-canny-dev"),
    "FLUX.1-Depth-dev, Nunchaku INT4 rank 32 (6.77 GB)": nunchaku("flux.1-depth-dev"),
}


def choice(model, repository, file, revision, filename):
    """(repository, file, revision, filename) to download, from the node's inputs. Raises ValueError, one sentence."""
    if model in PRESETS:
        repository, file = PRESETS[model]
    repository, file, revision = hub.names(repository, file, revision)
    hub.check_names(repository, file, revision)
    return repository, file, revision, filename if filename.strip() else file.rsplit("/", 1)[-1]


class SVDQuantDownloadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantDownloadModel",
            display_name="SVDQuant Download Model",
            category="loaders/svdquant",
            description="Downloads a model from the Hugging Face Hub into models/diffusion_models, and checks it. A download "
                        "that was stopped goes on where it was; a file that is there already is used.",
            inputs=[
                io.Combo.Input("model", options=[*PRESETS, OWN_CHOICE], default=next(iter(PRESETS)),
                               tooltip="A published 4-bit FLUX.1, or a file of your own choice."),
                io.String.Input("repository", default="",
                                tooltip="For a choice of your own: the repository on the Hub, as owner/name."),
                io.String.Input("file", default="",
                                tooltip="For a choice of your own: the path of a .safetensors or .sft file in the repository."),
                io.String.Input("revision", default="main", tooltip="The branch, tag or commit to take the file from."),
                io.String.Input("filename", default="",
                                tooltip="Name to give the file in models/diffusion_models; empty for the repository's. A folder "
                                        "may stand before it."),
            ],
            # Not io.Combo.Output: its type is its list of options, which no V3 combo input accepts.
            outputs=[io.Custom("COMBO").Output(display_name="model_name",
                                               tooltip="The file, for SVDQuant Load Model's model_name.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, repository=None, file=None, revision=None, filename=None):
        if None in (model, repository, file, revision, filename):  # from another node, which runs later
            return written.fingerprint(None)
        try:
            *_, filename = choice(model, repository, file, revision, filename)
        except ValueError:
            return None
        return written.fingerprint(name_in_folder(filename))

    @classmethod
    def execute(cls, model, repository, file, revision, filename):
        repository, file, revision, filename = choice(model, repository, file, revision, filename)
        path, name = target_path(filename)
        progress = NodeProgress(cls.hidden.unique_id if cls.hidden else None)
        hub.download(hub.look_up(repository, file, revision, progress), found_elsewhere(path, name) or path, progress)
        written.note(name)
        return io.NodeOutput(name)
