"""Which process quantizes which layers. The assignment decides the time, never the bytes."""

import heapq


def cost(out_features, in_features):
    """The time of a W4A4 layer in arbitrary units. Measured on an H100 it grows with the weight's size, and GPTQ's part of it with one more
    power of the inputs."""
    return out_features * in_features * (1 + in_features / 8192)


def batches(blocks, size):
    """[[block names]]: `size` blocks in a row are quantized together, so that each process gets a whole block's work of them."""
    return [blocks[start:start + size] for start in range(0, len(blocks), size)]


def owners(costs, size):
    """{name: rank}: the dearest goes first, always to the process with the least so far. costs: {name: cost}; of equal ones, neighbours go
    to different processes."""
    loads, found = [(0.0, rank) for rank in range(size)], {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        load, rank = heapq.heappop(loads)
        found[name] = rank
        heapq.heappush(loads, (load + costs[name], rank))
    return found
