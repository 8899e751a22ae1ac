"""Names in parsed sources."""

import ast


def dotted(node):
    """The text of a name such as a.b.c; "" for other expressions."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
