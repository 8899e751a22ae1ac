"""Run a program of this pack as a user does, on the tests' ComfyUI:  python on_host.py PROGRAM ARGS...

KILLED_AT=N kills the last process of a run, as the system does when memory is short, at its N-th message to another.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "demo"))

from host import launch

sys.path.pop(0)
launch.define_torchvision_ops()
launch.define_torchaudio()

if os.environ.get("KILLED_AT") and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
    import torch.distributed

    send, left = torch.distributed.batch_isend_irecv, iter(range(int(os.environ["KILLED_AT"]), 0, -1))

    def counted(messages):
        if next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return send(messages)

    torch.distributed.batch_isend_irecv = counted

sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
