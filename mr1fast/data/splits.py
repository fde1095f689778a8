"""Which rows of local data are its train, validation and test split."""

from __future__ import annotations

import random
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from mr1fast.data.identity import Place, connected, image_keys, shared
from mr1fast.data.tables import Table

HELD_OUT = ("test", "validation")  # in the order in which they get their shares


@dataclass(frozen=True)
class Share:
    """The rows of a split, and how it came to be these."""

    places: list[Place]
    tables: list[Table]  # to which these rows belong, or from which they were cut
    cut_from: str = ""  # "train" or "the unnamed rows", if the split is a tenth of these
    # Held-out split -> rows with an image that is in it too, and rows without images whose question is in it too.
    shared: dict[str, tuple[set[Place], set[Place]]] = field(default_factory=dict)


def share_of(tables: Sequence[Table], split: str, used: Collection[str]) -> Share:
    """The rows of "train", "validation", "test" or "all"; `used`: the splits that training must not learn from.

    If tables are named after "validation" or "test", that split is all of their rows. If none is, it is a tenth of the
    other rows, by one fixed permutation of their images, so that rows which share an image, or which others connect by
    the images they share, stay together. "train" is the other rows without the tenths of the splits that are used.
    """
    if split == "all":
        return Share(all_places(tables), list(tables))
    named = [name for name in HELD_OUT if any(table.split == name for table in tables)]
    if split in named:
        return Share(_places_of(tables, split), [table for table in tables if table.split == split])
    others = [table for table in tables if table.split not in HELD_OUT]
    rest = _places_of(tables, None, "train")
    watched = {name: _places_of(tables, name) for name in named if split == "train" and name in used}
    if split == "train" and not watched and all(name in named or name not in used for name in HELD_OUT):
        return Share(rest, others)  # nothing is cut, and no image need be looked at
    keys = image_keys(tables, [*rest, *(place for places in watched.values() for place in places)])
    groups = connected({place: keys[place] for place in rest})
    cuts = _cut(list(dict.fromkeys(groups[place] for place in rest)), named)
    if split in HELD_OUT:
        cut_from = "train" if any(table.split == "train" for table in tables) else "the unnamed rows"
        return Share(_of_groups(cuts[split], rest, groups), others, cut_from)
    kept = [group for name, cut in cuts.items() if name == "train" or name not in used for group in cut]
    places = _of_groups(kept, rest, groups)
    return Share(places, others, shared={name: shared(keys, places, theirs) for name, theirs in watched.items()})


def _cut(groups: list[Hashable], named: Collection[str]) -> dict[str, list[Hashable]]:
    """A tenth of the groups for each held-out split that no table is named after; nothing if there are fewer than 3."""
    groups = groups.copy()
    random.Random("split/0").shuffle(groups)
    size = max(1, round(len(groups) / 10)) if len(groups) >= 3 else 0
    unnamed = [name for name in HELD_OUT if name not in named]
    cuts = {name: groups[size * i : size * (i + 1)] for i, name in enumerate(unnamed)}
    return {**cuts, "train": groups[size * len(unnamed) :]}


def _of_groups(groups: Sequence[Hashable], rest: Sequence[Place], group_of: dict[Place, Hashable]) -> list[Place]:
    """The rows of these groups, in the groups' order."""
    rows: dict[Hashable, list[Place]] = {group: [] for group in groups}
    for place in rest:
        if group_of[place] in rows:
            rows[group_of[place]].append(place)
    return [place for places in rows.values() for place in places]


def all_places(tables: Sequence[Table]) -> list[Place]:
    return _places_of(tables, *{table.split for table in tables})


def _places_of(tables: Sequence[Table], *splits: str | None) -> list[Place]:
    return [(t, r) for t, table in enumerate(tables) if table.split in splits for r in range(len(table.rows))]
