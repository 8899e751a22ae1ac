"""The program of a worker of SVDQuant Several GPUs:  python draw.py OPTIONS RANK SIZE PORT

OPTIONS is JSON: {"comfyui": ComfyUI's folder, "options": those of its command line, "path", "compute_dtype", "act_bits": the model's}.
"""

import importlib
import json
import sys
from pathlib import Path


def main():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from convert import PACK, load_pack

    load_pack()
    crew, entry = (importlib.import_module(f"{PACK}.quant.parallel.{name}") for name in ("crew", "entry"))
    crew.end_with_parent()
    options, (rank, size, port) = json.loads(sys.argv[1]), map(int, sys.argv[2:5])
    entry.enter_comfyui("SVDQuant Several GPUs", options["comfyui"], options["options"])
    importlib.import_module(f"{PACK}.quant.host.several_gpus").serve(options, rank, size, port)


if __name__ == "__main__":
    main()
