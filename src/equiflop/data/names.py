"""The names of the built-in data sets, to be read without PyTorch."""

from __future__ import annotations

#: Names of the built-in sets, and what they are.
BUILT_IN = {
    "fashion-mnist": "70,000 grey pictures of clothing, 28x28 pixels, 10 classes",
    "fashion-mnist-part": "17,000 of them that come with equiflop, as many of every class",
    "digits": "1,797 handwritten digits inside scikit-learn, 8x8 pixels enlarged to 28x28, 10 classes",
}
#: What stands before a name or a folder, and what follows it.
PREFIXES = {
    "torch/": "NAME, a set of torchvision",
    "hfds/": "NAME[,image=COLUMN][,label=COLUMN], a set of Hugging Face",
    "wds/": "FOLDER, WebDataset's tar files",
}


class DataNotFoundError(ValueError):
    """A data set is nowhere to be found (as opposed to: found, but damaged)."""
