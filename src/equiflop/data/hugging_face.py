"""Which columns of a data set of Hugging Face hold images and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equiflop.data.names import DataNotFoundError

#: What a name may say about columns, and how the datasets library calls the kind of column that is looked for.
_KINDS = {"image": "Image", "label": "ClassLabel"}


def split_name(source: str) -> tuple[str, dict[str, str]]:
    """Take ``hfds/NAME,image=COLUMN,label=COLUMN`` apart.

    Raises:
        DataNotFoundError: if something else stands behind a comma.

    >>> split_name("hfds/uoft-cs/cifar100,label=fine_label")
    ('hfds/uoft-cs/cifar100', {'label': 'fine_label'})
    """
    name, *rest = source.split(",")
    columns = {}
    for part in rest:
        key, _, column = part.partition("=")
        if key not in _KINDS or not column:
            raise DataNotFoundError(f"data={source!r}: {part!r} is neither image=COLUMN nor label=COLUMN")
        columns[key] = column
    return name, columns


def find_columns(features: Mapping[str, Any], named: Mapping[str, str], source: str) -> dict[str, str]:
    """The columns of images and labels: those named, else ``image`` and ``label``, else the only ones of their kind.

    Args:
        features: the columns with their types, as the datasets library lists them.
        named: what :func:`split_name` found.
        source: what the user gave, for messages.

    Returns:
        the columns, as timm's keywords.

    Raises:
        DataNotFoundError: if there is no such column, or several may be meant; it says how to name one.
    """
    found = {}
    for key, kind in _KINDS.items():
        known = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if key in named:
            if named[key] not in features:
                raise DataNotFoundError(
                    f"data={source!r}: there is no column {named[key]!r}; there are {', '.join(features)}"
                )
            found[key] = named[key]
        elif key in features:
            found[key] = key
        elif len(known) == 1:
            found[key] = known[0]
        else:
            which = known or list(features)
            raise DataNotFoundError(
                f"data={source!r}: which column holds the {key}s, {' or '.join(which)}? "
                f"Say it like this: {source},{key}={which[0]}"
            )
    return {"input_key": found["image"], "target_key": found["label"]}
