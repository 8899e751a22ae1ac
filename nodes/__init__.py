"""The nodes, one module each, and the extension that registers them."""
