"""Divided forwards (sequence.py), and their CUDA graphs with the exchanges between the GPUs in them.

Without a graph a divided step takes at least as long as the processor takes to launch it. Process 0 decides for all: it announces each
forward as an ordinary one, one to record, or the replay of a recorded one, whose inputs it sends from within the graph. Its conditions for
a replay are those of step_graphs.py. The other processes change their model only when process 0 sends them other patches, which forgets all
graphs. A forward is recorded by all processes or by none.

Where process 0 records (SVDQUANT_STEP_GRAPHS is not 0), attention is exchanged in more pieces than the processor could launch without a
graph.
"""

import itertools
import weakref

from ..parallel import ranks
from . import sequence, step_graphs

ORDINARY, RECORD, REPLAY = range(3)
GROUPS = 4  # at most, of peer_attention.attend, where forwards are recorded: in the ordinary ones among them, too, for the same bits


class DividedSteps:
    """The divided forwards of one model in one process. every: the run's parallel.ranks.Ranks."""

    def __init__(self, every, family):
        self.every, self.family = every, family
        self.numbers, self.live = itertools.count(1), weakref.WeakValueDictionary()  # in process 0: of the graphs, and {number: Step}
        self.patches, self.groups = None, 1  # the LoRAs, and the groups of heads, of the next forward
        self.recordings = {}                 # in the other processes: {number: what `recorded` returns}

    # --- Process 0

    def draw(self, model, forward, arguments, patches=None):
        """The result of a forward with {name: argument}. forward: the model's; patches: weight patches for the other processes' models,
        None if they have them."""
        records = step_graphs.can_record(model) and step_graphs.allowed(arguments)
        self.patches, self.groups = patches, GROUPS if records else 1
        if patches is not None:
            step_graphs.release(model)
        run = self.divided(model, forward, self.groups)
        if not records:
            return self.call(run, arguments)
        return step_graphs.graphs_of(model).run(model, run, arguments, step_graphs.Ways(self.call, self.record, self.replay, self))

    def call(self, run, arguments):
        self.announce(ORDINARY, 0, arguments)
        return step_graphs.call(run, arguments)

    def record(self, step, run, arguments, tensors):
        number = next(self.numbers)
        self.announce(RECORD, number, arguments)
        recording = self.recorded(run, arguments, tensors)
        if recording is None:
            step.pays = False
            return step_graphs.call(run, arguments)
        (step.graph, step.output, step.inputs), step.number, self.live[number] = recording, number, step
        return step_graphs.replayed(step, tensors)

    def replay(self, step, tensors):
        self.every.numbers(REPLAY, step.number, 0)
        return step_graphs.replayed(step, tensors)

    def announce(self, what, number, arguments):
        """Have the other processes take part in a forward that is no replay."""
        self.every.numbers(what, number, self.groups)
        # The transformer options have code in them, and stay here.
        sent = {name: value for name, value in arguments.items() if name != "transformer_options"}
        self.every.exchanged(dict.fromkeys(range(1, self.every.size), (sent, self.patches, list(self.live))))
        self.patches = None

    # --- The other processes

    def followed(self):
        """Take part in process 0's next forward if that is a replay; else its (what, number, groups), and the (arguments, patches, live
        numbers) that process 0 sends."""
        what, number, groups = self.every.numbers(0, 0, 0)
        if what == REPLAY:
            graph, *_ = self.recordings[number]
            graph.replay()
            return None
        return (what, number, groups), self.every.exchanged({})[0]

    def follow(self, announced, model, arguments, live):
        """Take part in a forward with {name: argument} that is no replay. announced, live: of `followed`."""
        what, number, groups = announced
        self.recordings = {each: recording for each, recording in self.recordings.items() if each in live}
        arguments, run = arguments | {"transformer_options": {}}, self.divided(model, model, groups)
        if what == RECORD:
            tensors = []
            step_graphs.described(arguments, tensors)
            fit = step_graphs.has_room(tensors[0].device) and step_graphs.ModelState(model).can_be_recorded()
            recording = self.recorded(run, arguments, tensors, fit)
            if recording is not None:
                graph, *_ = self.recordings[number] = recording
                return graph.replay()
        return step_graphs.call(run, arguments)

    # --- All

    def divided(self, model, forward, groups):
        """A divided forward as a function of its arguments. Its result in process 0, None in the others."""
        def run(**arguments):
            with sequence.divided(model, self.family, arguments, self.every, groups):
                try:
                    return forward(**arguments)
                except sequence.Finished:
                    return None
        return run

    def recorded(self, run, arguments, tensors, fit=True):
        """(the graph of run(arguments), its result, the inputs that process 0 sends from within), or None if one of the processes could
        not record it. fit: whether this one may."""
        if not all(self.every.gathered(fit)):
            return None
        device = tensors[0].device
        message, inputs = ranks.empty_message([(tensor.shape, tensor.dtype) for tensor in tensors], device)
        self.every.send_from_first(message)  # NCCL connects the processes at the first message of a kind

        def launches():
            self.every.send_from_first(message)
            return step_graphs.call(run, step_graphs.rebuilt(arguments, iter(inputs)))

        found = step_graphs.captured(launches, device)
        if found is not None:
            self.every.graphs.add(found[0])
        return (*found, inputs) if all(self.every.gathered(found is not None)) else None
