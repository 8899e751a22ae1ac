"""Microseconds of the stages around one block's attention over divided tokens, for several_gpus.py. The processes run it together."""

import flux_model
import torch
from machine import synchronize

CALLS, REPEATS, HEAD = 10, 7, 128


def microseconds(ranks, run):
    """Of one run(), in a CUDA graph of CALLS of them; None if it can't be recorded, or without a GPU. Every process gets its own."""
    from comfyui_svdquant.quant.host import step_graphs

    run()  # NCCL connects the processes at the first message
    found = step_graphs.captured(lambda: [run() for _ in range(CALLS)], torch.device("cuda")) if torch.cuda.is_available() else None
    if not all(ranks.gathered(found is not None)):
        return None
    graph, times = found[0], []
    ranks.graphs.add(graph)
    for _ in range(REPEATS):
        synchronize()
        ranks.gathered(None)  # the processes begin together
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        synchronize()
        times.append(start.elapsed_time(end))
    graph.reset()
    return sorted(times)[REPEATS // 2] * 1e3 / CALLS


def stages(ranks, size, hidden, groups):
    """{stage: microseconds} at size x size pixels: of one group of heads, and "attend" of all, by writes into the other GPUs' memory where
    they can and by messages; and which of the two the GPUs can."""
    from comfyui_svdquant.quant.parallel import all_to_all, peer_attention

    image = (size // flux_model.LATENT_PIXELS // flux_model.DEV["patch_size"]) ** 2
    division = all_to_all.Division((flux_model.TEXT_TOKENS, image), ranks.rank, ranks.size)
    heads, own, device = hidden // HEAD, division.tokens[ranks.rank], flux_model.device()

    def attention(q, k, v, _own=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    q, k, v = (torch.randn(1, own, heads, HEAD, device=device).bfloat16().transpose(1, 2) for _ in range(3))
    plan = ranks.peers.plan(ranks, q, division, groups)
    groups = all_to_all.fitting_groups(heads // ranks.size, groups) if plan is None else len(plan.arrivals)
    step = heads // ranks.size // groups
    parts = [x.unflatten(1, (ranks.size, groups, step))[:, :, 0] for x in (q, k, v)]
    whole = all_to_all._to_heads(parts, division, None)()
    out = attention(*whole)
    returned = out.new_empty(groups, ranks.size, 1, own, out.shape[2])
    runs = {"attention": lambda: attention(*whole),
            "before_by_messages": lambda: all_to_all._to_heads(parts, division, None)(),
            "after_by_messages": lambda: all_to_all._to_tokens(out, returned[0], division, None).wait(),
            "attend_by_messages": lambda: all_to_all.attend(q, k, v, division, attention, groups)}
    if plan is not None:
        runs |= by_plan(plan, (q, k, v), out, lambda: peer_attention.by_plan(plan, q, k, v, division, attention))
    return {"writes": plan is not None, "groups": groups} | {name: microseconds(ranks, run) for name, run in runs.items()}


def by_plan(plan, qkv, out, attend):
    """{stage: what runs it} of one group's writes."""
    return {"before": lambda: plan.send_heads(qkv, 0), "after": lambda: plan.send_output(out, len(plan.arrivals) - 1, 1), "attend": attend}
