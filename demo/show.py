"""The demo's main program, which run.py runs in the prepared environment: it runs the workflow and writes the contact sheet."""

import argparse
import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path

import torch
from PIL import Image

import contact_sheet
from host import setup, workflow
from host.client import NodeFailed, PromptRejected
from host.page import open_page
from host.server import DEMO_NODES, Server, ServerError

HERE = Path(__file__).parent
OUT = HERE / "out"
TEMPLATE = HERE / "custom_node" / "workflows" / "SVDQuant_demo.json"
TITLES = {"bf16": "bf16", "naive": "naive 4-bit", "svdquant": "SVDQuant"}  # by the last part of the SaveImage prefix


class Progress:
    """Prints a line for each node as it starts; on a terminal also its steps."""

    def __init__(self, prompt: dict):
        self.prompt = prompt
        self.start = time.monotonic()

    def __call__(self, node: str, value: int, total: int) -> None:
        name = f"[{time.monotonic() - self.start:5.1f} s] {self.prompt[node]['_meta']['title']}"
        if total == 0:
            print(f"\n{name}", end="", flush=True)
        elif sys.stdout.isatty():
            print(f"\r{name}  {value}/{total} ", end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo/run.py", description=__doc__)
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI running, and open the workflow in the browser")
    arguments = parser.parse_args()
    try:
        with Server(setup.locate(), setup.STATE / "base") as server:
            if arguments.serve:
                serve(server)
            else:
                show(server)
    except (ServerError, PromptRejected, NodeFailed) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.")
    return 0


def serve(server: Server) -> None:
    print(open_page(f"{server.client.url}/?template={TEMPLATE.stem}&source={DEMO_NODES}"), "  (Ctrl-C stops ComfyUI)", flush=True)
    server.process.wait()
    raise ServerError(f"ComfyUI ended:\n{server.tail()}")


def show(server: Server) -> None:
    """Run the workflow and write the contact sheet, the table, the report and the pictures under demo/out."""
    prompt = workflow.to_prompt(json.loads(TEMPLATE.read_text(encoding="utf-8")), server.client.object_info())
    progress = Progress(prompt)
    print("ComfyUI is up; running the demo workflow", end="")
    outputs = server.client.post(prompt, progress)
    print(f"\n[{time.monotonic() - progress.start:5.1f} s] done\n")
    rows = collect_rows(server, prompt, outputs)
    captions = [line.strip() for line in find(prompt, "SVDQuantDemoWords")["text"].splitlines() if line.strip()]
    OUT.mkdir(exist_ok=True)
    contact_sheet.compose(rows, captions).save(OUT / "contact_sheet.png")
    figures = machine() | contact_sheet.table(rows, captions)
    (OUT / "table.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")
    for node, output in outputs.items():
        if "text" in output:
            name = prompt[node]["_meta"]["title"].replace(" ", "_")
            (OUT / f"{name}.txt").write_text("\n".join(output["text"]), encoding="utf-8")
    print(contact_sheet.text_table(rows, captions))
    print(f"\nThe pictures, side by side: {OUT / 'contact_sheet.png'}")


def machine() -> dict:
    """The machine and the versions that a table's figures belong to."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {cpu()}"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}


def cpu() -> str:
    """The processor's name, or its architecture where the system does not say more."""
    known = Path("/proc/cpuinfo")
    names = [line for line in known.read_text().splitlines() if line.startswith("model name")] if known.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor() or platform.machine()


def find(prompt: dict, class_type: str) -> dict:
    """The inputs of the prompt's first node of a class."""
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == class_type)


def collect_rows(server: Server, prompt: dict, outputs: dict) -> list[contact_sheet.Row]:
    """One row for each SaveImage node, in the order of TITLES; its pictures are copied to demo/out too."""
    rows = {}
    for node, output in outputs.items():
        if prompt[node]["class_type"] != "SaveImage":
            continue
        name = prompt[node]["inputs"]["filename_prefix"].rsplit("/", 1)[-1]
        pictures = []
        for number, image in enumerate(output["images"], 1):
            path = OUT / "pictures" / f"{name}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(server.client.picture(image))
            pictures.append(Image.open(path).convert("RGB"))
        rows[name] = contact_sheet.Row(TITLES[name], model_size(server.base, name), pictures)
    return [rows[name] for name in TITLES]


def model_size(base: Path, name: str) -> int:
    """Bytes of a row's model file."""
    file = "tiny_flux.safetensors" if name == "bf16" else f"tiny_flux_{name}.safetensors"
    return (base / "models" / "diffusion_models" / file).stat().st_size


if __name__ == "__main__":
    sys.exit(main())
