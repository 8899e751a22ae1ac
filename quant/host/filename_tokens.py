"""The tokens in a filename that stand for the time, as in ComfyUI's own save nodes.

The page replaces %date:...% and %node.widget% before it sends a workflow (web/svdquant.js); what reaches the node are the tokens that
ComfyUI's own nodes replace when they save, and, in workflows that other programs send, %date:...%.
"""

import re
import time

TOKEN = re.compile(r"%(year|month|day|hour|minute|second|date:[^%]+)%")
NUMBERS = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}
LETTERS = re.compile("yyyy|yy|MM?|dd?|hh?|mm?|ss?")  # as the page reads them: one letter for the number, two for two digits
FIELDS = {"y": "tm_year", "M": "tm_mon", "d": "tm_mday", "h": "tm_hour", "m": "tm_min", "s": "tm_sec"}


def resolve(filename, now=None):
    """A filename with its tokens replaced. now: a time.struct_time; None for the present."""
    now = now or time.localtime()

    def number(match):
        letters = match[0]
        text = str(getattr(now, FIELDS[letters[0]]))
        return text[-2:] if letters == "yy" else text.zfill(min(len(letters), 2))

    def replaced(match):
        kind, _, form = match[1].partition(":")
        return LETTERS.sub(number, form) if kind == "date" else time.strftime(NUMBERS[kind], now)

    return TOKEN.sub(replaced, filename)
