"""Convert a quantized model from one layout to another: python convert.py IN OUT --to native|nunchaku [--overwrite]."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

PACK = "svdquant_pack"


def load_pack():
    """Import the folder of this file as a package, as ComfyUI does, whatever the folder's name is."""
    root = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(PACK, root / "__init__.py", submodule_search_locations=[str(root)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)


def modules(program, *names):
    """The pack's modules `names`. Exits with a one-sentence message if this Python lacks a package that they import."""
    load_pack()
    try:
        return [importlib.import_module(f"{PACK}.{name}") for name in names]
    except ModuleNotFoundError as error:
        if str(error.name).startswith(PACK):
            raise
        sys.exit(f"{program}: this Python has no {error.name}; run it with ComfyUI's Python, which in the portable version for Windows is "
                 "python_embeded\\python.exe.")


def unreadable(path, error):
    """One sentence that says why the file at `path` can't be read. error: OSError or CheckpointError; the latter's message is returned."""
    error = getattr(error, "os_error", error)
    if not isinstance(error, OSError):
        return str(error)
    if os.path.isdir(path):
        return f"{path} is a folder; name a .safetensors file."
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return f"There is no file {path}; check its name and its folder."
    return f"{path} can't be read: {error.strerror}; check its permissions and its disk, or choose another file."


def main():
    convert, formats, header = modules("convert", "quant.checkpoint.convert", "quant.checkpoint.formats", "quant.checkpoint.header")
    parser = argparse.ArgumentParser(description="Convert a quantized model from one layout to another.")
    parser.add_argument("source", metavar="IN", help="the .safetensors file to convert, from this pack, Nunchaku or comfy-kitchen")
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--to", choices=formats.WRITERS, required=True,
                        help="the layout to write: native, this pack's own, or nunchaku, Nunchaku's INT4 layout, for FLUX.1 only")
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
