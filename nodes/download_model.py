"""SVDQuant Download Model: downloads a model file from the Hugging Face Hub to models/diffusion_models."""

from comfy_api.latest import io

from ..quant.download import hub
from ..quant.host import written
from ..quant.host.model_folder import found_elsewhere, name_in_folder, target_path
from .checked import check_types, checked, choose
from .newer import ADVANCED, CATEGORY, SEARCH
from .progress import NodeProgress

OWN_CHOICE = "repository and file below"


def nunchaku(model, codes="int4", rank=32, variant=""):
    """(repository, file) of a model that the Nunchaku project publishes. codes: "int4", or "fp4" for NVFP4; variant: the end of the file's
    name."""
    return f"nunchaku-ai/nunchaku-{model}", f"svdq-{codes}_r{rank}-{model}{variant}.safetensors"


# The models, repositories and sizes are those that the Hub's pages list, with these exceptions: the page of nunchaku-qwen-image was seen in
# part, with 12.7 GB for rank 128 INT4 of the Lightning variants, whose tensors are the base model's; that Qwen-Image-Edit-2509 of rank 128
# has 11.79 GiB, and Z-Image-Turbo of rank 128 4,011,374,152 bytes, is what users of the files have published.
PRESETS = {
    "FLUX.1-dev INT4 (6.8 GB)": nunchaku("flux.1-dev"),
    "FLUX.1-schnell INT4 (6.7 GB)": nunchaku("flux.1-schnell"),
    "FLUX.1-Krea-dev INT4 (6.8 GB)": nunchaku("flux.1-krea-dev"),
    "FLUX.1-Kontext-dev INT4 (6.8 GB)": nunchaku("flux.1-kontext-dev"),
    "FLUX.1-Fill-dev INT4 (6.8 GB)": nunchaku("flux.1-fill-dev"),
    "FLUX.1-Canny-dev INT4 (6.8 GB)": nunchaku("flux.1-canny-dev"),
    "FLUX.1-Depth-dev INT4 (6.8 GB)": nunchaku("flux.1-depth-dev"),
    "Qwen-Image INT4 (12.7 GB)": nunchaku("qwen-image", rank=128),
    "Qwen-Image 4 steps INT4 (12.7 GB)": nunchaku("qwen-image", rank=128, variant="-lightningv1.0-4steps"),
    "Qwen-Image-Edit-2509 INT4 (12.7 GB)": nunchaku("qwen-image-edit-2509", rank=128),
    "Z-Image-Turbo INT4 (4.0 GB)": nunchaku("z-image-turbo", rank=128),
    "FLUX.1-dev NVFP4 (7.0 GB)": nunchaku("flux.1-dev", "fp4"),
    "FLUX.1-schnell NVFP4 (7.0 GB)": nunchaku("flux.1-schnell", "fp4"),
    "FLUX.1-Kontext-dev NVFP4 (7.0 GB)": nunchaku("flux.1-kontext-dev", "fp4"),
    "FLUX.1-Fill-dev NVFP4 (7.0 GB)": nunchaku("flux.1-fill-dev", "fp4"),
}
# The labels under which workflows of earlier versions have five of them.
EARLIER = {f"{name}, Nunchaku INT4 rank 32 (6.77 GB)": nunchaku(name.lower())
           for name in ("FLUX.1-dev", "FLUX.1-Krea-dev", "FLUX.1-Kontext-dev", "FLUX.1-Canny-dev", "FLUX.1-Depth-dev")}


def choice(model, repository, file, revision, filename):
    """(repository, file, revision, filename) to download, from the node's inputs. Raises ValueError on inputs that name no file."""
    earlier = EARLIER.get(model) if isinstance(model, str) else None
    repository, file = earlier or choose("model", model, PRESETS | {OWN_CHOICE: (repository, file)})
    repository, file, revision = hub.names(repository, file, revision)
    hub.check_names(repository, file, revision)
    return repository, file, revision, filename if filename.strip() else file.rsplit("/", 1)[-1]


class SVDQuantDownloadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantDownloadModel",
            display_name="SVDQuant Download Model",
            category=CATEGORY,
            **SEARCH,
            description="Downloads a model from the Hugging Face Hub to models/diffusion_models and verifies it. An interrupted "
                        "download resumes where it stopped; a file that is already there is used as it is.",
            inputs=[
                io.Combo.Input("model", options=[*PRESETS, OWN_CHOICE], default=next(iter(PRESETS)),
                               tooltip="A 4-bit model that the Nunchaku project publishes, or the repository and file named below. "
                                       "INT4 suits all GPUs; NVFP4 runs without kernels of this pack, which is slow."),
                io.String.Input("repository", default="",
                                tooltip="The repository on the Hub, as owner/name. Leave empty for a model of the list.", **ADVANCED),
                io.String.Input("file", default="",
                                tooltip="The path of a .safetensors or .sft file in the repository. Leave empty for a model of the list.",
                                **ADVANCED),
                io.String.Input("revision", default="main", tooltip="The branch, tag or commit to download the file from.", **ADVANCED),
                io.String.Input("filename", default="",
                                tooltip="The name of the file in models/diffusion_models, with an optional subfolder. Leave empty to keep "
                                        "the repository's name.", **ADVANCED),
            ],
            # Not io.Combo.Output: its type is its list of options, which no V3 combo input accepts.
            outputs=[io.Custom("COMBO").Output(display_name="model_name",
                                               tooltip="The file's name, for model_name of SVDQuant Load Model.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, repository=None, file=None, revision=None, filename=None):
        if None in (model, repository, file, revision, filename):  # an input comes from a node that has not run yet
            return written.fingerprint(None)
        try:
            *_, filename = choice(model, repository, file, revision, filename)
        except ValueError:
            return None
        return written.fingerprint(name_in_folder(filename))

    @classmethod
    def validate_inputs(cls, model=None, repository=None, file=None, revision=None, filename=None):
        inputs = model, repository, file, revision, filename
        return None in inputs or checked(cls, lambda: target_path(choice(*inputs)[-1]))

    @classmethod
    def execute(cls, model, repository, file, revision, filename):
        with NodeProgress.of(cls) as progress:
            check_types(cls, repository=repository, file=file, revision=revision, filename=filename)
            repository, file, revision, filename = choice(model, repository, file, revision, filename)
            path, name = target_path(filename)
            hub.download(hub.look_up(repository, file, revision, progress), found_elsewhere(path, name) or path, progress)
            written.note(name)
            return io.NodeOutput(name)
