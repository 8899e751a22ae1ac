"""What a user sees: one module a node, and the extension that offers them."""
