"""The progress of a run on a terminal, or in a log."""

import sys
import time

SECONDS = 10  # between two lines in a log


class Terminal:
    """A node's progress as one line of standard error, or as a line now and then where that is no terminal. shown: whether this process
    shows anything."""

    def __init__(self, shown=True, stream=None):
        self.stream, self.shown, self.steps, self.done, self.last, self.width = stream or sys.stderr, shown, 0, 0, 0.0, 0

    def total(self, steps):
        self.steps = steps

    def step(self, text):
        self.done += 1
        now = time.monotonic()
        if self.stream.isatty():
            self._line(f"\r{self._percent()} {text}")
        elif now - self.last >= SECONDS:
            self.last = now
            self.say(f"{self._percent()} {text}")

    def say(self, text):
        """A line that stays."""
        self.end()
        if self.shown:
            print(text, file=self.stream, flush=True)

    def end(self):
        """Leave the line that is rewritten."""
        if self.width:
            print(file=self.stream, flush=True)
            self.width = 0

    def check(self):
        """Called often; an interrupted process gets its KeyboardInterrupt from Python."""

    def _percent(self):
        return f"{100 * self.done // max(self.steps, 1):3d} %"

    def _line(self, text):
        if self.shown:
            print(text.ljust(self.width), end="", file=self.stream, flush=True)
            self.width = len(text)
