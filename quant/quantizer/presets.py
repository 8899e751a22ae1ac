"""The settings of a quantization run: the presets, and the user's exceptions."""

from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase

from ..text import quoted
from .calibration import TOKENS_PER_INPUT

MIN_RANK, MAX_RANK, RANK_STEP = 16, 256, 16
DEFAULT_RANK, DEFAULT_BRANCH_BITS = 64, 8  # as many bytes as rank 32 in 16 bits, which other quantizers take
INT8 = "int8"  # in place of an exception's rank
RANK_DIGITS = 9  # more are no rank, and Python refuses to read thousands


@dataclass(frozen=True)
class Recipe:
    """The settings of a quantization run.

    rank: of the branch of each layer in published SVDQuant files; a linear that combines two of them gets one branch of twice the rank.
    smooth: how the smoothing factor is found: "search" (calibrated), "weights" (without calibration) or "none"; learned: whether gradient
    descent improves it further. rounds: how often branch and codes are fitted to each other; scales: "integer" (c_n * i), "free" or
    "absmax". gptq, refit: whether these stages run; passes: how often both run, each time on the branch of the pass before; quiet: whether
    the codes account for the activation's rounding.
    """

    preset: str
    rank: int
    smooth: str
    learned: bool = False
    rounds: int = 5
    scales: str = "integer"
    gptq: bool = False
    refit: bool = False
    passes: int = 1
    quiet: bool = False
    keep: tuple = ()  # patterns of the names of layers that stay in 16 bits
    ranks: tuple = ()  # (pattern, rank) of layers with a rank of their own; the last match counts
    int8: tuple = ()  # patterns of layers whose activations have 8 bits even where 4 are faster
    tokens: int = TOKENS_PER_INPUT  # per input channel of a layer, for GPTQ and refit
    largest_error: float = 0.5  # relative error of a layer in 4 bits; a layer with a larger one stays in 16 bits
    branch_bits: int = 16  # bits of the branches of W4A4 layers, 16 or 8
    propagate: str = "exact"  # or "quantized": whether the earlier blocks run in 16 or in 4 bits while a block is calibrated

    def as_dict(self):
        return asdict(self)

    def keeps(self, name):
        """Whether layer `name` stays in 16 bits."""
        return any(fnmatchcase(name, pattern) for pattern in self.keep)

    def rank_of(self, name, branches=1):
        """The rank of layer `name`, which combines `branches` layers of published files."""
        return next((rank for pattern, rank in reversed(self.ranks) if fnmatchcase(name, pattern)), branches * self.rank)

    def act_bits_of(self, name):
        """LayerSpec.act_bits of layer `name`."""
        return 8 if any(fnmatchcase(name, pattern) for pattern in self.int8) else 0

    def needs_gram(self):
        """Whether the stages need the inputs' Gram matrix."""
        return self.gptq or self.refit


PRESETS = {
    "best": {"smooth": "search", "gptq": True, "refit": True},
    "slow": {"smooth": "search", "learned": True, "gptq": True, "refit": True, "passes": 2, "quiet": True},
    "fast": {"smooth": "search", "refit": True},  # round to nearest instead of GPTQ
    "data-free": {"smooth": "weights"},  # without calibration
    "naive": {"smooth": "none", "rounds": 1, "scales": "absmax"},  # plain rounding, no branch: the baseline to compare with
}


def entries(exceptions):
    """The exceptions in the text of a node's input, one per line or separated by commas."""
    return [entry for line in exceptions.splitlines() for entry in map(str.strip, line.split(",")) if entry]


def make_recipe(preset, rank=DEFAULT_RANK, exceptions="", branch_bits=DEFAULT_BRANCH_BITS):
    """The Recipe of a preset.

    exceptions: `entries` of patterns of layer names: `pattern` keeps its layers in 16 bits, `pattern = rank` gives them another rank,
    `pattern = int8` activations of 8 bits; * stands for any text. branch_bits: as in Recipe; naive has no branch. Raises ValueError on an
    unknown preset, a rank outside 16..256 in steps of 16, or an exception that can't be read.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"The input preset is {quoted(preset)}, which this version of SVDQuant does not offer; choose "
                         f"{', '.join(PRESETS)}.")
    keep, ranks, int8 = [], [], []
    for entry in entries(exceptions):
        pattern, equals, value = map(str.strip, entry.partition("="))
        if equals and value.lower() == INT8:
            int8.append(pattern)
            continue
        if equals and not (value.isdecimal() and len(value) <= RANK_DIGITS):
            raise ValueError(f"The exception {quoted(entry)} can't be read; write a layer pattern, pattern = rank, or pattern = int8.")
        if equals:
            ranks.append((pattern, _checked_rank(int(value))))
        else:
            keep.append(pattern)
    chosen = Recipe(preset, _checked_rank(rank), **PRESETS[preset])
    if preset == "naive":
        return replace(chosen, rank=0, keep=tuple(keep), int8=tuple(int8))
    return replace(chosen, keep=tuple(keep), ranks=tuple(ranks), int8=tuple(int8), branch_bits=branch_bits)


def check_inputs(preset, exceptions, positive, latent):
    """Raise ValueError for inputs that can't start a run. preset, exceptions: as in make_recipe, or None if they are still unknown;
    positive, latent: whether the inputs of calibration are connected."""
    recipe = make_recipe("best" if preset is None else preset, MIN_RANK, exceptions or "")
    if preset is not None:
        check_calibrated(recipe, positive, latent)


def check_calibrated(recipe, positive, latent):
    """Raise ValueError unless there are the inputs of calibration that the recipe needs. positive, latent: whether each is there."""
    if recipe.smooth == "search" and not (positive and latent):
        missing = " and ".join(name for name, there in (("positive", positive), ("latent", latent)) if not there)
        raise ValueError(f"The preset {recipe.preset} calibrates on images that the model samples: connect {missing}, or choose the preset "
                         "data-free.")


def _checked_rank(rank):
    if not MIN_RANK <= rank <= MAX_RANK or rank % RANK_STEP:
        raise ValueError(f"Rank {rank} is not possible; choose {MIN_RANK} to {MAX_RANK} in steps of {RANK_STEP}.")
    return rank
