"""Which rows of local data are its train, validation and test split. No image of a held-out split is trained on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from mr1fast.data.identity import Place, image_keys
from mr1fast.data.tables import Table

HELD_OUT = ("test", "validation")  # in the order in which they get their shares


@dataclass(frozen=True)
class Share:
    """The rows of a split, and how it came to be these."""

    places: list[Place]
    tables: list[Table]  # that these rows are of, or are cut from
    cut_from: str = ""  # "train" or "the unnamed rows", if the split is a tenth of these
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> number of rows


def share_of(tables: Sequence[Table], split: str, used: Collection[str]) -> Share:
    """The rows of "train", "validation", "test" or "all"; `used`: the splits that training must not learn from.

    Where tables are named after "validation" or "test", that split is their rows, all of them. Where none is, it is a
    tenth of the other rows, by one fixed permutation of their images: questions about one image stay together. "train"
    is what `used` leaves of the other rows, see `_not_trained_on`.
    """
    if split == "all":
        return Share(all_places(tables), list(tables))
    named = {name: _places_of(tables, name) for name in HELD_OUT if any(table.split == name for table in tables)}
    if split in named:
        return Share(named[split], [table for table in tables if table.split == split])
    others = [table for table in tables if table.split not in HELD_OUT]
    rest = _places_of(tables, None, "train")
    keys = image_keys(tables, [*rest, *(place for places in named.values() for place in places)])
    groups: dict[Hashable, list[Place]] = {}
    for place in rest:
        groups.setdefault(keys[place], []).append(place)
    shown_in = {name: {keys[place] for place in places} for name, places in named.items()}
    cuts = _cut([key for key in groups if not any(key in shown for shown in shown_in.values())], named)
    if split == "train":
        away, left_out = _not_trained_on(groups, cuts, shown_in, used)
        # In the order of the permutation: the first so many rows are then a fair sample.
        order = dict.fromkeys([*cuts["train"], *(key for cut in cuts.values() for key in cut), *groups])
        return Share([place for key in order if key not in away for place in groups[key]], others, left_out=left_out)
    cut_from = "train" if any(table.split == "train" for table in tables) else "the unnamed rows"
    return Share([place for key in cuts[split] for place in groups[key]], others, cut_from)


def _cut(keys: list[Hashable], named: Collection[str]) -> dict[str, list[Hashable]]:
    """A tenth of the images for each held-out split without a name; none of fewer than three."""
    keys = keys.copy()
    random.Random("split/0").shuffle(keys)
    size = max(1, round(len(keys) / 10)) if len(keys) >= 3 else 0
    unnamed = [name for name in HELD_OUT if name not in named]
    cuts = {name: keys[size * i : size * (i + 1)] for i, name in enumerate(unnamed)}
    return {**cuts, "train": keys[size * len(unnamed) :]}


def _not_trained_on(
    groups: dict[Hashable, list[Place]],
    cuts: dict[str, list[Hashable]],
    shown_in: dict[str, set[Hashable]],
    used: Collection[str],
) -> tuple[set[Hashable], Counter[str]]:
    """The images of the held-out splits that are used, and how many rows that leaves out that were not cut away."""
    away = {key for name in HELD_OUT if name in used for key in cuts.get(name, ())}
    left_out: Counter[str] = Counter()
    for key, places in groups.items():
        name = next((name for name, shown in shown_in.items() if name in used and key in shown), None)
        if name is not None:
            away.add(key)
            left_out[f"image is also in the {name} split"] += len(places)
    return away, left_out


def all_places(tables: Sequence[Table]) -> list[Place]:
    return _places_of(tables, *{table.split for table in tables})


def _places_of(tables: Sequence[Table], *splits: str | None) -> list[Place]:
    return [(t, r) for t, table in enumerate(tables) if table.split in splits for r in range(len(table.rows))]
