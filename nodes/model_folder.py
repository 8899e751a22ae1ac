"""Where the nodes that write models put them: models/diffusion_models."""

import os

import folder_paths

EXTENSIONS = (".safetensors", ".sft")


def target_path(filename):
    """(absolute path, name within the folder) for a filename given by the user. Raises ValueError outside the folder."""
    folders = folder_paths.get_folder_paths("diffusion_models")
    # ComfyUI lists models/unet, the old name of the same kind, first.
    folder = next((path for path in folders if os.path.basename(path) == "diffusion_models"), folders[0])
    name = filename.strip().replace("\\", "/")
    name = name if name.endswith(EXTENSIONS) else name + EXTENSIONS[0]
    path = os.path.abspath(os.path.join(folder, name))
    inside = path.startswith(os.path.join(os.path.abspath(folder), ""))
    if not inside or os.path.basename(name) in EXTENSIONS:
        raise ValueError(f"The filename {filename!r} does not name a file within models/diffusion_models; write a plain "
                         "name such as my_model, or folder/my_model.")
    return path, os.path.relpath(path, folder)
