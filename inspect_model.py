"""Describe a model file without loading it: python inspect_model.py FILE [--json]."""

import argparse
import json
import sys
from pathlib import Path

from convert import modules, unreadable


def main():
    inspection, header = modules("inspect", "quant.checkpoint.inspection", "quant.checkpoint.header")
    parser = argparse.ArgumentParser(description="Show the format, sizes, ranks, recipe and errors of a model file; verify its checksums.")
    parser.add_argument("file", metavar="FILE", help="a .safetensors file, quantized or not")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--header", action="store_true", help="read the header only, and verify no checksum")
    args = parser.parse_args()
    try:
        describe = inspection.inspect if args.header else inspection.inspect_body
        description = describe(header.read_header(str(Path(args.file).resolve())))
    except (header.CheckpointError, OSError) as error:
        sys.exit(f"inspect: {unreadable(args.file, error)}")
    print(json.dumps(description, indent=1) if args.json else inspection.text(description))


if __name__ == "__main__":
    main()
