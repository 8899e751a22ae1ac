"""Read and write Nunchaku's checkpoints."""
