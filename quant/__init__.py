"""What SVDQuant is: the layers, the quantizer and the checkpoints. Knows models, not graphs."""
