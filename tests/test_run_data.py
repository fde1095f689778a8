"""Which problems a run trains on and is tested on: --test-data, --train-samples, --epochs."""

import json

import pytest
from data_files import ANYWHERE, picture, row, shown, write_jsonl
from train_program import SMALL, main

from mr1fast.data.dataset import load_split
from mr1fast.errors import UserError
from mr1fast.options.parse import parse_arguments, printed_config
from mr1fast.training.run_data import load_data


def config(*arguments):
    """With images beside the folder of the data, if there is such."""
    outside = ["--allow-outside"] * ("--data" in arguments or "--test-data" in arguments)
    return parse_arguments([*map(str, arguments), *outside]).config


@pytest.fixture
def lists(folder):
    """shapes/, which is not split, and two lists for tests, of which one has other names."""
    write_jsonl(folder / "shapes" / "rows.jsonl", [row(n, image=f"../{n}.png") for n in range(20)])
    others = [{"image_path": f"./{n}.png", "question": "How many?", "ground_truth": n} for n in range(20, 30)]
    write_jsonl(folder / "superclevr.jsonl", others)
    write_jsonl(folder / "geoqa" / "list.jsonl", [row(n, image=f"../{n}.png") for n in range(5)])
    return folder


def test_test_data_is_whole_and_nothing_is_cut_for_it(lists):
    tested = ["--test-data", lists / "superclevr.jsonl", "--test-data", f"{lists / 'geoqa'},gr"]
    data = load_data(config("--data", lists / "shapes", *tested, "--eval-steps", 0))
    assert {name: (len(one), one.split) for name, one in data.tests.items()} == {
        "superclevr": (10, "all"), "geoqa": (5, "all"), "gr": (200, "test"),
    }  # fmt: skip
    assert shown(data.train["shapes"]) == set(range(20))
    assert data.names == ["shapes"]
    assert data.sizes(own=True) == [
        "shapes: train 20",
        "superclevr: 10 problems to test on",
        "geoqa: 5 problems to test on",
    ]
    fewer = load_data(config("--data", lists / "shapes", *tested, "--eval-samples", 3))
    assert [len(one) for one in fewer.tests.values()] == [3, 3, 3]
    assert len(fewer.train["shapes"]) == 18  # validation is cut, in which training looks


def test_the_data_itself_may_be_among_the_test_data(lists):
    tested = f"{lists / 'superclevr.jsonl'},{lists / 'shapes'}"
    data = load_data(config("--data", lists / "shapes", "--test-data", tested, "--eval-steps", 0))
    assert [(name, len(one), one.split) for name, one in data.tests.items()] == [
        ("superclevr", 10, "all"), ("shapes", 2, "test"),
    ]  # fmt: skip
    assert shown(data.train["shapes"]) == set(range(20)) - shown(data.tests["shapes"])


def test_named_test_splits_and_names_that_are_taken(lists):
    for number, name in enumerate(("one", "two")):
        write_jsonl(lists / name / "test.jsonl", [row(number, image=f"../{number}.png")])
        write_jsonl(lists / name / "train.jsonl", [row(9, image="../9.png")])
    write_jsonl(lists / "more" / "shapes.jsonl", [row(n, image=f"../{n}.png") for n in range(10)])
    tested = [
        lists / "one" / "test.jsonl",
        lists / "two" / "test.jsonl",
        lists / "two",
        lists / "more" / "shapes.jsonl",
    ]
    options = ["--data", lists / "shapes", *(f"--test-data={one}" for one in tested)]
    data = load_data(config(*options, "--image-root", lists / "shapes"))  # all of them start with ../
    assert {name: len(one) for name, one in data.tests.items()} == {
        "one/test": 1, "two/test": 1, "two": 1, "more/shapes": 10,
    }  # fmt: skip
    write_jsonl(lists / "two.jsonl", [row(1)])
    write_jsonl(lists / lists.name / "two.jsonl", [row(1, image="../1.png")])
    same = ["--test-data", lists / "two.jsonl", "--test-data", lists / lists.name / "two.jsonl"]
    with pytest.raises(UserError, match=r"two data sets are called .*/two; rename one of them"):
        load_data(config("--data", lists / "shapes", *same))


def test_images_of_test_data_among_those_trained_on_are_counted(lists):
    options = ["--data", lists / "shapes", "--eval-steps", 0, "--test-data", lists / "superclevr.jsonl"]
    train = load_data(config(*options, "--test-data", lists / "geoqa")).train["shapes"]
    assert train.shown_in == {"geoqa": 5}
    assert train.summary() == "shapes/train: 20 examples; warning: 5 of them show an image of geoqa"
    few = load_data(config(*options, "--test-data", lists / "geoqa", "--train-samples", 15)).train["shapes"]
    assert 0 < few.shown_in["geoqa"] == len(shown(few) & set(range(5))) < 5
    write_jsonl(lists / "shapes" / "test.jsonl", [row(n, image=f"../{n}.png") for n in range(10, 20)])
    few = load_data(config("--data", lists / "shapes", "--train-samples", 8)).train["shapes"]
    assert 0 < few.shown_in["test"] == len(shown(few) & set(range(10, 20)))


def test_with_tasks_test_data_is_added(lists):
    data = load_data(config("--task", "vc", "--test-data", lists / "geoqa", "--eval-samples", 2))
    assert list(data.tests) == ["vc", "gr", "geoqa"]
    assert list(data.train) == ["vc"]


def test_given_columns_hold_for_test_data_only_where_it_has_them(lists):
    write_jsonl(lists / "mine" / "rows.jsonl", [{"image": f"../{n}.png", "ask": "?", "gold": n} for n in range(9)])
    options = ["--columns", "problem=ask,solution=gold", "--eval-steps", 0, "--test-data", lists / "superclevr.jsonl"]
    data = load_data(config("--data", lists / "mine", *options))
    assert data.tests["superclevr"][0].problem == "How many?"
    assert data.train["mine"][0].problem == "?"
    with pytest.raises(UserError, match=r"--columns problem=ask: data .* has no column 'ask'"):
        load_data(config("--data", lists / "shapes", *options))


def test_few_shot_is_drawn_by_the_seed(lists):
    def drawn(*arguments):
        return load_data(config("--train-samples", 6, *arguments)).train

    shapes = ["--data", lists / "shapes"]
    first, again, other = (shown(drawn(*shapes, "--seed", seed)["shapes"]) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 6
    assert first <= shown(load_split(lists / "shapes", "train", reading=ANYWHERE)), "no row of a held-out split"
    first, other = ([one["vc"][i].name for i in range(6)] for one in (drawn(), drawn("--seed", 1)))
    assert len({*first, *other}) == 12
    with pytest.raises(UserError, match="--train-samples 19: shapes has only 16 examples to train on"):
        load_data(config(*shapes, "--train-samples", 19))


@pytest.mark.parametrize(
    ("arguments", "steps"), [("--epochs 2", 3), ("--epochs 2 --num-iterations 2", 6), ("--epochs 0.01", 1)]
)
def test_epochs_become_steps(lists, arguments, steps):
    chosen = config("--data", lists / "shapes", "--prompts-per-step", 12, *arguments.split())
    assert "max_steps" not in chosen.resolved()
    run = chosen.with_steps({"shapes": 16})
    assert (run.for_task("shapes").max_steps, run.epochs) == (steps, None)
    assert config("--seed", 1).with_steps({"vc": 5}) == config("--seed", 1)


def test_epochs_of_tasks_and_of_files(tmp_path):
    chosen = config("--epochs", 4, "--train-samples", 100).with_steps({"vc": 100, "gr": 100})
    assert chosen.max_steps == {"vc": 25, "gr": 13}
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 7\n")
    assert config("--config", file, "--epochs", 2, "--data", "x").max_steps is None
    file.write_text("epochs: 2\ndata: x\ntest_data: [a, vc]\n")
    chosen = config("--config", file, "--max-steps", 7)
    assert (chosen.max_steps, chosen.epochs, len(chosen.test_sources)) == (7, None, 2)
    assert "\nepochs: 2.0\n" in printed_config(config("--config", file))


MISTAKES = [
    ("--epochs 2 --max-steps 3 --data x", "--epochs and --max-steps exclude each other; give one"),
    ("--epochs 2", "--epochs needs --data or --train-samples: the drawings of a task never end"),
    ("--epochs 0 --data x", "--epochs must be at least 1e-06, got 0.0"),
    ("--train-samples 0", "--train-samples must be at least 1, got 0"),
    ("--test-data gr,./x --test-data gr", "--test-data gr,./x,gr names the same data twice"),
    ("--columns problem=q", "--columns is about your own data, and there is no --data"),
    ("--allow-outside --task vc", "--allow-outside is about your own data, and there is no --data"),
    ("--image-root x", "--image-root is about your own data, and there is no --data"),
    ("--columns q --data x", "--columns must be of the form problem=question,solution="),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_mistakes_are_one_sentence(arguments, says):
    with pytest.raises(UserError) as error:
        parse_arguments(arguments.split())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_with_test_data(lists, capsys):
    """Trained on few of one data set for so many epochs, tested on two others, cross-task; mistakes leave nothing."""
    picture(22, (112, 112)).save(lists / "22.png")
    data, tested = lists / "shapes", [lists / "superclevr.jsonl", lists / "geoqa"]
    options = ["--data", data, "--allow-outside", *SMALL, "--eval-steps=0", "--output-dir", lists / "run"]
    for mistake, says in (
        (["--test-data", lists / "none.jsonl"], "none.jsonl does not exist"),
        (["--test-data", "vcc"], "vcc does not exist"),
        (["--image-root", lists / "none"], "is not a folder"),
    ):
        assert main(*options, *mistake) == 2
        assert says in capsys.readouterr().err
    run = [*options, "--test-data", ",".join(map(str, tested)), "--train-samples=10", "--epochs=0.5"]
    assert main(*run) == 0
    output = capsys.readouterr().out
    assert "\nshapes: train 10\nsuperclevr: 4 problems to test on\n" in output
    assert output.count("1 image has more than 3136 pixels (--max-pixels), and is scaled down to that\n") == 1
    assert "columns: question as problem, ground_truth as solution, image_path as image" in output
    result = json.loads((lists / "run" / "result.json").read_text())
    assert set(result["before"]) == set(result["cross_task"]["shapes"]) == {"superclevr", "geoqa"}
    assert result["steps"] == {"shapes": 3}  # of 2 prompts
    recorded = json.loads((lists / "run" / "config.json").read_text())
    assert (recorded["max_steps"], recorded["train_samples"]) == (3, 10)
    assert recorded["test_data"] == ",".join(map(str, tested))
    assert "epochs" not in recorded
    assert output.count("greedy accuracy") == 2
    assert (lists / "run" / "samples.png").exists()
    for more, says in (([], "has finished"), (["--epochs=0.5"], "recorded there as --max-steps 3; give that instead")):
        assert main("--resume", lists / "run", *more) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_runs_on_rows_with_three_images_with_one_and_with_none(lists):
    """All kinds together, in pieces of one prompt each; and rows without images alone, as a whole."""
    three = row(1, image=["../1.png", "../2.png", "../3.png"], problem="Is <image> like <image> or <image>?")
    one, text = row(4, image="../4.png"), {"problem": "How many?", "solution": "3"}
    texts = [text, {**text, "problem": "How many more?"}]
    for name, rows, pieces in (("mixed", [three, one, text, texts[1]], 2), ("texts", texts, 1)):
        for split in ("train", "test"):
            write_jsonl(lists / name / f"{split}.jsonl", rows)
        steps = ["--allow-outside", "--max-steps=2", "--eval-steps=0", f"--gradient-accumulation-steps={pieces}"]
        assert main("--data", lists / name, *SMALL, *steps, "--output-dir", lists / f"{name}-run") == 0
        assert json.loads((lists / f"{name}-run" / "result.json").read_text())["after"][name]["n"] == len(rows)
