"""Convert a quantized FLUX.1 between layouts: python convert.py IN OUT --to native|nunchaku [--overwrite]."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

PACK = "svdquant_pack"


def load_pack():
    """Import the folder this file is in as a package; ComfyUI does it the same way, whatever the folder is called."""
    root = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(PACK, root / "__init__.py", submodule_search_locations=[str(root)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)


def modules(program, *names):
    """The pack's modules `names`. Ends `program` with one sentence under a Python that lacks what they import."""
    load_pack()
    try:
        return [importlib.import_module(f"{PACK}.{name}") for name in names]
    except ModuleNotFoundError as error:
        if str(error.name).startswith(PACK):
            raise
        sys.exit(f"{program}: this Python has no {error.name}; run it with ComfyUI's Python, which in the portable version for Windows is "
                 "python_embeded\\python.exe.")


def unreadable(path, error):
    """A sentence: why the file at `path` can't be read. error: an OSError, or a CheckpointError, which is such a sentence."""
    if not isinstance(error, OSError):
        return str(error)
    if os.path.isdir(path):
        return f"{path} is a folder; name a .safetensors file."
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return f"There is no file {path}; check its name and its folder."
    return f"{path} can't be read: {error.strerror}; check its permissions and its disk, or choose another file."


def main():
    convert, formats, header = modules("convert", "quant.checkpoint.convert", "quant.checkpoint.formats", "quant.checkpoint.header")
    parser = argparse.ArgumentParser(description="Convert a quantized FLUX.1 from one layout into another.")
    parser.add_argument("source", metavar="IN", help="a .safetensors file: Nunchaku's, ours or comfy-kitchen's names")
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--to", choices=formats.WRITERS, required=True,
                        help="the layout to write: native, which this pack's nodes save by default, or nunchaku, Nunchaku's INT4 file")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args()

    def progress(done, total):
        if sys.stderr.isatty():
            print(f"\r{100 * done // total:3d} %", end="" if done < total else "\n", file=sys.stderr, flush=True)

    try:
        convert.convert(str(Path(args.source).resolve()), str(Path(args.target).resolve()), args.to, args.overwrite, progress)
    except (header.CheckpointError, OSError) as error:
        sys.exit(f"convert: {unreadable(args.source, error)}")


if __name__ == "__main__":
    main()
