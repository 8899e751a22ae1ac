"""Runs of several processes, one a GPU, through torch.distributed. Nothing of it is imported unless asked for."""
