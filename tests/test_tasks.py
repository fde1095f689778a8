"""The embedded tasks: answers recomputed from the drawing's parameters, splits that share nothing, stable drawings."""

import hashlib
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageChops

from mr1fast.data import scenes
from mr1fast.data.scenes import draw_scene
from mr1fast.data.tasks import SPLITS, TASKS, angle_pairs, draw_triangle, wording
from mr1fast.evaluation import curves
from mr1fast.evaluation.curves import Series
from mr1fast.options.config import TrainConfig


@pytest.mark.parametrize("split", TASKS["vc"].splits)
def test_the_count_is_what_was_drawn(split):
    vc = TASKS["vc"]
    for index in range(100):
        scene, example = vc.scene(split, index), vc.example(split, index)
        assert example.solution == str(len(scene.items))
        assert 1 <= len(scene.items) <= scenes.MAX_ITEMS
        assert example.columns == {"reasoning": f"{len(scene.items)} items"}
        assert example.name == f"vc/{split}/{index}"
        assert example.image.size == (scenes.SIZE, scenes.SIZE)
        assert example.image.mode == "RGB"


def test_every_item_can_be_seen_and_stands_alone():
    """Connected regions that are not background are as many as the answer says: counted without knowing the scene."""
    for split, index in itertools.product(("train", "vehicles", "far"), range(60)):
        scene = TASKS["vc"].scene(split, index)
        drawn = np.array(draw_scene(scene))
        ink = (drawn != np.array(scene.background)).any(-1)
        assert regions(ink) == len(scene.items), (split, index)


def regions(ink: np.ndarray) -> int:
    """The number of 8-connected regions."""
    left = {(int(y), int(x)) for y, x in zip(*ink.nonzero())}
    count = 0
    while left:
        count += 1
        frontier = [left.pop()]
        while frontier:
            y, x = frontier.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            frontier.extend(near)
    return count


def looks_of(split: str) -> scenes.Looks:
    """What is seen in 300 scenes, all counts among them."""
    drawn = [TASKS["vc"].scene(split, index) for index in range(300)]
    items = [item for scene in drawn for item in scene.items]
    assert {len(scene.items) for scene in drawn} == set(range(1, scenes.MAX_ITEMS + 1))
    return scenes.Looks(
        tuple({item.kind for item in items}),
        {item.colour: () for item in items},
        tuple({item.radius for item in items}),
        tuple({scene.background for scene in drawn}),
    )


@pytest.mark.parametrize(
    ("split", "looks"), [("train", scenes.SHAPES), ("vehicles", scenes.VEHICLES), ("far", scenes.FAR_VEHICLES)]
)
def test_a_split_has_all_of_its_looks_and_no_other(split, looks):
    seen = looks_of(split)
    for name in ("kinds", "colours", "radii", "backgrounds"):
        assert set(getattr(seen, name)) == set(getattr(looks, name))


def test_vehicles_share_nothing_but_their_ground_with_shapes():
    assert not set(scenes.VEHICLES.kinds) & set(scenes.SHAPES.kinds)
    assert not set(scenes.VEHICLES.colours.values()) & set(scenes.SHAPES.colours.values())
    assert scenes.VEHICLES.backgrounds == scenes.SHAPES.backgrounds
    assert not set(scenes.FAR_VEHICLES.backgrounds) & set(scenes.SHAPES.backgrounds)


@pytest.mark.parametrize("split", SPLITS)
def test_the_third_angle_completes_the_triangle(split):
    gr = TASKS["gr"]
    for index in range(100):
        triangle, example = gr.triangle(split, index), gr.example(split, index)
        assert sum(triangle.angles) + int(example.solution) == 180
        assert int(example.solution) > 0
        assert tuple(sorted(triangle.angles)) in angle_pairs(split)


def test_the_splits_of_geometry_share_no_problem():
    pairs = {split: set(angle_pairs(split)) for split in SPLITS}
    assert sum(map(len, pairs.values())) == len(set.union(*pairs.values()))
    assert all(a <= b for split in SPLITS for a, b in pairs[split])
    assert {split: len(pairs[split]) for split in SPLITS} == {"train": 460, "validation": 80, "test": 200}
    # What is trained on is drawn anew each time, and has no end.
    assert TASKS["gr"].splits == {"train": None, "validation": 80, "test": 200}


def test_evaluation_visits_every_problem_of_geometry_before_it_repeats_one():
    gr = TASKS["gr"]
    count = gr.splits["test"]
    assert {tuple(sorted(gr.triangle("test", i).angles)) for i in range(count)} == set(angle_pairs("test"))
    again = gr.triangle("test", count)
    assert sorted(again.angles) == sorted(gr.triangle("test", 0).angles)


def test_the_labels_name_the_angles():
    """A label is the only thing below the base, and another angle is another label there."""
    triangle = replace(TASKS["gr"].triangle("train", 3), angles=(36, 80))
    below = (0, scenes.SIZE - 12, scenes.SIZE, scenes.SIZE)
    moved = replace(triangle, angles=triangle.angles[::-1])
    assert ImageChops.difference(draw_triangle(triangle).crop(below), draw_triangle(moved).crop(below)).getbbox()
    assert not ImageChops.difference(draw_triangle(triangle), draw_triangle(replace(triangle))).getbbox()


def test_drawings_are_a_function_of_task_split_and_index():
    def digest(task: str, split: str, index: int) -> str:
        return hashlib.sha256(TASKS[task].example(split, index).image.tobytes()).hexdigest()

    everything = [(name, split, index) for name, task in TASKS.items() for split in task.splits for index in range(20)]
    first = [digest(*which) for which in everything]
    assert first == [digest(*which) for which in reversed(everything)][::-1]
    assert len(set(first)) == len(first), "two drawings are equal"


def test_a_task_carries_all_that_is_said_of_it():
    for name, task in TASKS.items():
        assert task.name == name
        assert tuple(task.splits)[: len(SPLITS)] == SPLITS
        assert {task.example("train", i).problem for i in range(20)} == {task.questions[0]}
        assert TrainConfig(task=name).for_task(name).learning_rate == task.recipe["learning_rate"]
        assert curves._labels([Series(Path("run"), name, [], {})]) == [task.title]


def test_adding_a_task_touches_one_place():
    """A task that only the registry knows: options, help texts, programs and data loading all know it from there."""
    code = """
from mr1fast.data import tasks
class Other(tasks.VisualCounting):
    name, title = "other", "another task"
    splits = {"train": None, "validation": 3, "test": 7}
    recipe = {"prompts_per_step": 4, "learning_rate": 5e-5, "max_steps": 6, "max_completion_length": 7}
tasks.TASKS["other"] = Other()
import sys
from mr1fast import evaluate
from mr1fast.data.dataset import load_split
from mr1fast.options.config import TrainConfig
from mr1fast.options.recipes import RECIPES
from mr1fast.options.parse import build_parser
assert TrainConfig().tasks == ("vc", "gr", "other")
assert TrainConfig(task="other").for_task("other").max_steps == 6
assert len(load_split("other", "test", count=400)) == 7
text = " ".join(build_parser().format_help().split())
assert "other: 5e-05)" in text and "gr has 200; other has 7" in text, text
assert "other (another task); vc,gr,other trains a separate model on each" in text, text
text = " ".join(evaluate.build_parser().format_help().split())
assert "other (another task)" in text and "other has 7 to test" in text, text
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", TASKS)
def test_a_reworded_problem_is_the_same_problem(name):
    task, asked = TASKS[name], set()
    for index in range(-20, 20):
        usual, reworded = task.example("train", index), task.example("train", index, reworded=True)
        assert reworded.problem == task.questions[wording(task, "train", index)]
        assert replace(reworded, problem=usual.problem, image=usual.image) == usual
        asked.add(reworded.problem)
    assert asked == set(task.questions)


@pytest.mark.parametrize(("name", "split"), [("vc", "tset"), ("gr", "vehicles")])
def test_an_unknown_split_is_refused(name, split):
    with pytest.raises(ValueError, match="train, validation, test"):
        TASKS[name].example(split, 0)
