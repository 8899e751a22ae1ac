"""ComfyUI-SVDQuant: FLUX.1 and Chroma in 4 bits. The entry point that ComfyUI imports; it registers the nodes, nothing else."""

WEB_DIRECTORY = "web"


async def comfy_entrypoint():
    # Imported here, not above, so that quant/ and cuda/ can be used where no ComfyUI is installed.
    from .quant.host import relied_on

    relied_on.check()
    from .nodes.extension import SVDQuantExtension

    return SVDQuantExtension()
