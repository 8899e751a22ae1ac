"""What a benchmark's child process tells its parent: entries, as lines that begin with MARK. It imports no PyTorch, since a child may have
to start as ComfyUI's main.py does."""

import json
import subprocess

MARK = "entry: "


def entries_of(command, environment=None):
    """Yield the entries that a child process measures, and print its other lines. environment: as of subprocess. Raises CalledProcessError
    if it fails."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            else:
                print(line, end="")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
