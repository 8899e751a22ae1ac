"""Quantize a model to 4 bits from the command line:  python quantize.py IN OUT --prompts FILE --text-encoder FILE FILE

`python quantize.py --help` lists the options; quant/batch/options.py has them. Started by torchrun, the processes share one model.
"""

import importlib
import os
import sys

from convert import PACK, modules, unreadable


def main():
    own, _, theirs = (list(part) for part in _partition(sys.argv[1:], "--"))
    options_module, header, ranks, entry = modules("quantize", "quant.batch.options", "quant.checkpoint.header", "quant.parallel.alone",
                                                   "quant.parallel.entry")
    options = options_module.parsed(own)
    if options.jobs:
        [jobs] = modules("quantize", "quant.batch.jobs")
        sys.exit(jobs.run(options, own, theirs))
    import torch

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        if several:
            [shared] = modules("quantize", "quant.parallel.ranks")
            shared.own_gpu()
            shared.end_when_told()
        entry.enter_comfyui("quantize", options.comfyui, theirs + ([] if torch.cuda.is_available() or "--cpu" in theirs else ["--cpu"]))
        _run(options, shared if several else None)
    except (header.CheckpointError, OSError, ValueError, MemoryError, ranks.Lost) as error:
        _end(f"quantize: {unreadable(options.source, error) if isinstance(error, OSError) else error}", 1, several)
    except KeyboardInterrupt:
        _end("quantize: interrupted; no file was written. The same command goes on from the blocks that are finished.", 130, several)


def _run(options, shared):
    relied_on = importlib.import_module(f"{PACK}.quant.host.relied_on")
    try:
        relied_on.check(in_server=False)
        relied_on.check_feature(relied_on.COMMAND_LINE)
    except relied_on.HostError as error:
        _end(f"quantize: {error}", 1, shared is not None)
    offline, terminal = (importlib.import_module(f"{PACK}.quant.{name}") for name in ("host.offline", "batch.terminal"))
    if shared is None:
        return offline.run(options, terminal.Terminal())
    with shared.joined_run() as ranks:
        return offline.run(options, terminal.Terminal(ranks.rank == 0), ranks)


def _partition(items, mark):
    place = items.index(mark) if mark in items else len(items)
    return items[:place], items[place:place + 1], items[place + 1:]


def _end(message, code, at_once):
    """End the program with a message. at_once: without the clean-up of torch.distributed, which would wait for processes that are gone."""
    print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)
    if at_once:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
