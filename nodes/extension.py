"""The ComfyUI extension that registers the nodes."""

from comfy_api.latest import ComfyExtension

from .compare import SVDQuantCompare
from .compare_models import SVDQuantCompareModels
from .doctor import SVDQuantDoctor
from .download_model import SVDQuantDownloadModel
from .inspect_model import SVDQuantInspect
from .load_model import SVDQuantLoadModel
from .load_text_encoder import SVDQuantLoadTextEncoder
from .quantize_model import SVDQuantQuantizeModel
from .quantize_text_encoder import SVDQuantQuantizeTextEncoder
from .save_model import SVDQuantSaveModel
from .save_text_encoder import SVDQuantSaveTextEncoder
from .several_gpus import SVDQuantSeveralGPUs


class SVDQuantExtension(ComfyExtension):
    async def get_node_list(self):
        return [SVDQuantDownloadModel, SVDQuantLoadModel, SVDQuantQuantizeModel, SVDQuantSaveModel, SVDQuantInspect,
                SVDQuantCompare, SVDQuantCompareModels, SVDQuantDoctor, SVDQuantSeveralGPUs, SVDQuantQuantizeTextEncoder,
                SVDQuantSaveTextEncoder, SVDQuantLoadTextEncoder]
