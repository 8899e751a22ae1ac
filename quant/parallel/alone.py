"""A run of one process, which is what every run is unless several were asked for. ranks.Ranks has the same methods for several."""


class Lost(RuntimeError):
    """Raised in the remaining processes when another process of the run has ended. The message is one sentence."""


class Alone:
    """The only process of a run.

    rank: this process's number, from 0; size: the number of processes. All processes of a run call the methods in the same order. They
    raise Lost if another process has ended.
    """

    rank, size = 0, 1

    def share(self, items):
        """The items that fall to this process when they are dealt out in turn."""
        return items[self.rank::self.size]

    def gathered(self, value):
        """[the value of each process]. value: anything that pickle takes, without large tensors."""
        return [value]

    def from_first(self, value):
        """The value of process 0."""
        return value

    def numbers(self, *numbers):
        """The whole numbers of process 0; the others pass as many."""
        return list(numbers)

    def exchanged(self, outgoing):
        """[what each process sends to this one, or None]. outgoing: {rank: value}. Tensors in a value travel from GPU to GPU where
        possible, and arrive on the device of the communication."""
        return [outgoing.get(0)]


ALONE = Alone()
