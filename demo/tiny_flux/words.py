"""The captions of the embedded small FLUX: a closed vocabulary in place of CLIP and T5.

FLUX gives its text tokens no positions (their ids are all zero), so a token is the concatenation of the word's one-hot vector and the
position's. Without the position "red circle left of blue star" and "blue circle left of red star" are the same set of tokens.
"""

import torch

SIZES = ("small", "medium", "large")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond", "hexagon", "moon")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
GROUNDS = ("white", "cream", "gray", "sky", "mint", "rose", "navy", "black")
ARTICLES = frozenset(("a", "an", "the"))

PAD = ""
VOCABULARY = tuple(dict.fromkeys((PAD, *SIZES, *COLOURS, *SHAPES, *" ".join(RELATIONS + PLACES).split(), *GROUNDS, "and", "on")))
INDEX = {word: index for index, word in enumerate(VOCABULARY)}

LENGTH = 16         # tokens per caption; the longest sentence of the grammar has 15 words
WORD_SLOTS = 64     # VOCABULARY fits, and K stays a multiple of the 4-bit group
CONTEXT_DIM = 128   # WORD_SLOTS of the word, WORD_SLOTS of the position
POOLED_DIM = WORD_SLOTS


def word_ids(caption: str) -> list[int]:
    """The vocabulary indices of a caption's words, without articles and commas, padded to LENGTH.

    Raises ValueError for a word outside the vocabulary, or a caption of more than LENGTH words.
    """
    found = [word for word in caption.lower().replace(",", " ").replace(".", " ").split() if word not in ARTICLES]
    for word in found:
        if word not in INDEX:
            raise ValueError(f"The small FLUX does not know the word '{word}'. It knows: {', '.join(VOCABULARY[1:])}.")
    if len(found) > LENGTH:
        raise ValueError(f"The caption has {len(found)} words; the small FLUX reads at most {LENGTH}.")
    return [INDEX[word] for word in found] + [0] * (LENGTH - len(found))


def sentence(ids: torch.Tensor) -> str:
    """The caption that ids (LENGTH,) spell."""
    return " ".join(VOCABULARY[index] for index in ids.tolist() if index)


def embed(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (n, LENGTH) -> context (n, LENGTH, CONTEXT_DIM) and pooled (n, POOLED_DIM), float32, both of unit RMS.

    pooled is the bag of words without the padding; an empty caption has a pooled vector of zeros.
    """
    one_hot = torch.nn.functional.one_hot
    word = one_hot(ids, WORD_SLOTS).float()
    position = one_hot(torch.arange(LENGTH, device=ids.device), WORD_SLOTS).float().expand_as(word)
    context = torch.cat((word, position), dim=-1) * (CONTEXT_DIM / 2) ** 0.5
    bag = word[..., 1:].sum(dim=1)
    pooled = torch.nn.functional.pad(torch.nn.functional.normalize(bag, dim=-1), (1, 0)) * POOLED_DIM ** 0.5
    return context, pooled


def encode(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """caption -> context (1, LENGTH, CONTEXT_DIM) and pooled (1, POOLED_DIM), FLUX's inputs `context` and `y`."""
    return embed(torch.tensor([word_ids(caption)]))
