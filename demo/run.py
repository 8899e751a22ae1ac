"""The demo: set up a ComfyUI, run the demo's workflow in it, write demo/out/contact_sheet.png.

    python demo/run.py              about five minutes the first time; Python 3.11 or newer and pip are all it needs
    python demo/run.py --serve      the same ComfyUI, left running; opens the workflow in the browser
"""

import sys
from pathlib import Path

from host import setup

if __name__ == "__main__":
    sys.exit(setup.run([str(Path(__file__).with_name("show.py")), *sys.argv[1:]], tests=False))
