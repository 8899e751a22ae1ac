"""How SVDQuant is computed: the 4-bit format, every op as mathematics, and the ops that the model calls."""
