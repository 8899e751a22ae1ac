"""Text of users, files and servers within messages: printable, on one line, and of bounded length."""

import reprlib

SENTENCE = 800  # characters of a message
_values = reprlib.Repr()
_values.maxstring = _values.maxother = _values.maxlong = 80  # characters of a value
_values.maxlevel = 2


def bounded(text, most=SENTENCE):
    """`text` on one line: cut in the middle if it has more than `most` characters, since a sentence begins with its file and ends with the
    remedy. Characters that can't be printed, among them lone surrogates, which no stream takes, become U+FFFD."""
    if len(text) > most:
        text = f"{text[:most * 2 // 3]} ... {text[-(most // 3 - 5):]}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shown_name(name):
    """A file's name that a user or another program has given, which may be anything."""
    return bounded(name, 300) if isinstance(name, str) else quoted(name)


def alternatives(words):
    """"A, B or C"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def quoted(value):
    """repr(value) of a value that a user or a file has given, cut in the middle if it is long."""
    return bounded(_values.repr(value))
