"""Data whose columns have other names, and rows with several images or none."""

import json
from itertools import chain

import datasets
import pytest
from data_files import ANYWHERE, as_csv, as_jsonl, encoded, picture, row, solutions, write_jsonl

from mr1fast.data.columns import Reading, parse_columns
from mr1fast.data.dataset import load_split
from mr1fast.errors import UserError


def parts(dataset):
    """Of each example, the question, the answer and the numbers of its images, which `picture` has painted."""
    examples = [dataset[i] for i in range(len(dataset))]
    return [(e.problem, e.solution, [image.getpixel((0, 0))[0] for image in e.images]) for e in examples]


# ---- usual names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["image", "images", "image_path", "file_name"])
@pytest.mark.parametrize("problem", ["problem", "question", "query", "prompt"])
@pytest.mark.parametrize("solution", ["solution", "answer", "ground_truth"])
def test_usual_names_need_no_option(folder, image, problem, solution):
    file = write_jsonl(folder / "data.jsonl", [{image: "7.png", problem: "How many?", solution: 3}])
    assert parts(load_split(file, "all")) == [("How many?", "3", [7])]


def test_a_csv_whose_quotes_are_wrong_is_one_sentence(folder):
    """A column is named after several lines."""
    file = folder / "data.csv"
    file.write_text('"image,question\n0.png,How many?",solution\n1.png,3\n')
    with pytest.raises(UserError, match=r"its columns are image,question 0\.png,How many\?, solution; say") as error:
        load_split(file, "all")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [as_jsonl, as_csv])
def test_the_first_name_that_is_not_empty_counts_and_is_said(folder, write):
    rows = [
        {"image_path": "1.png", "solution": "1", "answer": "9", "question": "a"},
        {"image_path": "2.png", "solution": "", "answer": "2", "question": "b"},
    ]
    dataset = load_split(write(folder, rows), "all")
    assert parts(dataset) == [("a", "1", [1]), ("b", "2", [2])]
    said = "columns: question as problem, solution or else answer as solution, image_path as image"
    assert dataset.summary().endswith(said)
    assert load_split(as_jsonl(folder, [row(1)]), "all").columns == ""


def sharegpt(question, *answers, human="human", gpt="gpt"):
    turns = [{"from": "system", "value": "Count."}, {"from": human, "value": question}]
    return turns + [{"from": gpt, "value": answer} for answer in answers]


def openai(*content, answer="<answer> 3 </answer>"):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": [text(answer)]}]


def text(words):
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
CHATS = [
    ({"image": "5.png", "conversations": sharegpt("<image>\nHow many?", "3")}, ("How many?", "3", [5])),
    ({"image": "5.png", "conversations": json.dumps(sharegpt("How many?", "3"))}, ("How many?", "3", [5])),
    ({"image": "5.png", "conversations": sharegpt("How many?", "3"), "solution": "4"}, ("How many?", "4", [5])),
    ({"image": "5.png", "conversations": sharegpt("How many?"), "answer": "4"}, ("How many?", "4", [5])),
    ({"image": "5.png", "conversations": sharegpt("Q?", "3", "4", human="user", gpt="assistant")}, ("Q?", "3", [5])),
    ({"images": ["5.png"], "messages": openai(IMAGE, text("How many?"))}, ("How many?", "3", [5])),
    (
        {"images": ["5.png", "6.png"], "messages": openai(text("Is "), IMAGE, text(" like "), IMAGE)},
        ("Is <image> like <image>", "3", [5, 6]),
    ),
    ({"messages": openai({**IMAGE, "image": "5.png"}, text("How many?"))}, ("How many?", "3", [5])),
    ({"messages": openai({"type": "image_url", "image_url": {"url": "5.png"}}, text("Many?"))}, ("Many?", "3", [5])),
    ({"messages": [{"role": "user", "content": "Many?"}, {"role": "assistant", "content": "3"}]}, ("Many?", "3", [])),
    ({"image": "5.png", "prompt": [{"role": "user", "content": "Many?"}], "solution": "3"}, ("Many?", "3", [5])),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), CHATS)
def test_chats(folder, given, expected):
    assert parts(load_split(write_jsonl(folder / "data.jsonl", [given]), "all")) == [expected]


def test_what_is_left_out_of_a_chat_is_counted(folder):
    rows = [
        {"conversations": sharegpt("How many?", "3")},
        {"conversations": sharegpt("How many?", "3", "4")},
        {"conversations": [{"from": "gpt", "value": "3"}]},
        {"conversations": sharegpt("How many?")},
        {"conversations": sharegpt("<image>How many?", "3")},
        {"messages": openai({"type": "audio", "audio": "a.wav"}, text("How many?"))},
    ]
    dataset = load_split(write_jsonl(folder / "data.jsonl", rows), "all")
    assert dataset.notes["turns before a chat's question left out"] == 2
    assert dataset.notes["turns after a chat's first answer left out"] == 1
    assert dataset.skipped == {
        "chat has no turn of a user": 1,
        "no answer": 1,
        "question marks the place of an image, but the row has none": 1,
        "chat has a part that is neither text nor an image": 1,
    }


def test_messages_in_parquet_with_images_in_a_column_and_in_the_messages(folder):
    parts_of = datasets.Features(type=datasets.Value("string"), text=datasets.Value("string"), image=datasets.Image())
    turn = {"role": datasets.Value("string"), "content": datasets.List(dict(parts_of))}
    inside = [{"type": "text", "text": "How many?", "image": None}]
    outside = [{"type": "image", "text": None, "image": None}, *inside]
    inside = [*inside, {"type": "image", "text": None, "image": {"bytes": encoded(picture(6)), "path": None}}]
    rows = {
        "messages": [[{"role": "user", "content": content}] for content in (outside, inside)],
        "images": [[{"bytes": encoded(picture(5)), "path": None}], []],
        "answer": ["3", "4"],
    }
    features = datasets.Features(
        messages=datasets.List(turn), images=datasets.List(datasets.Image()), answer=datasets.Value("string")
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(folder / "data.parquet")
    data.save_to_disk(folder / "saved")
    for source in ("data.parquet", "saved"):
        dataset = load_split(folder / source, "all")
        assert parts(dataset) == [("How many?", "3", [5]), ("How many?<image>", "4", [6])]
        assert not dataset.skipped


# ---- names that are given -------------------------------------------------------------------------------------------


def test_given_names_and_an_image_root(folder):
    rows = [{"img": f"./{n}.png", "q": "How many?", "gold": n, "solution": "a long one", "level": 1} for n in range(3)]
    file = write_jsonl(folder / "lists" / "test.jsonl", rows)
    reading = Reading(parse_columns("problem=q, solution=gold,image=img", "--columns"), folder)
    dataset = load_split(file, None, reading=reading)
    assert parts(dataset) == [("How many?", str(n), [n]) for n in range(3)]
    assert dataset.columns == "q as problem, gold as solution, img as image"
    assert dataset[0].columns == {"gold": 0, "level": 1, "q": "How many?"}
    usual = write_jsonl(folder / "usual.jsonl", [row(7)])
    assert solutions(load_split(usual, None, reading=Reading(reading.columns, strict=False))) == ["7"]


MISTAKES = [
    ("solution=gold", "--columns solution=gold: data '{}' has no column 'gold'; its columns are answer, img, question"),
    ("solution=anser", "has no column 'anser' (did you mean 'answer'?); its columns are answer, img, question"),
    ("", "has no column 'image', but 'img' seems to hold images: say so with --columns image=img"),
    ("image=img,problem=", "--columns must be of the form problem=question,"),
    ("image=img,image=x", "--columns names image twice"),
    ("imge=img", "what stands before the = must be one of image, problem, solution, choices, got 'imge' (did you"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "says"), MISTAKES)
def test_mistakes_in_names_are_one_sentence(folder, columns, says):
    file = write_jsonl(folder / "data.jsonl", [{"img": "1.png", "question": "How many?", "answer": "1"}])
    with pytest.raises(UserError) as error:
        load_split(file, None, reading=Reading(parse_columns(columns, "--columns") if columns else {}))
    assert says.format(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_column_that_is_named_is_not_made_up_for_by_a_chat(folder):
    rows = [{"q": q, "messages": openai(text("Why?")), "answer": "3"} for q in ("How?", "")]
    dataset = load_split(write_jsonl(folder / "data.jsonl", rows), "all", reading=Reading({"problem": "q"}))
    assert parts(dataset) == [("How?", "3", [])]
    assert dataset.skipped == {"no question": 1}


def test_bytes_that_are_not_called_image_are_not_left_out_in_silence(folder):
    rows = {"photo": [encoded(picture(1))], "question": ["How many?"], "answer": ["1"]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "data.parquet")
    with pytest.raises(UserError, match="'photo' seems to hold images: say so with --columns image=photo"):
        load_split(folder / "data.parquet", "all")
    dataset = load_split(folder / "data.parquet", "all", reading=Reading({"image": "photo"}))
    assert parts(dataset) == [("How many?", "1", [1])]


# ---- several images, and none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "asked", "note"),
    [
        ("Which is larger?", "Which is larger?", None),
        ("<image><image>\nWhich is larger?", "Which is larger?", "image marker removed from the question"),
        ("Is <image> larger than <image>?", "Is <image> larger than <image>?", None),
        ("Is it <image>?", "Is it ?", "images put first, because the question marks another number of them"),
    ],
)
def test_several_images(folder, problem, asked, note):
    dataset = load_split(as_jsonl(folder, [row(1, image=["4.png", "2.png"], problem=problem)]), "all")
    assert parts(dataset) == [(asked, "1", [4, 2])]
    assert note is None or dataset.notes[note] == 1
    assert list(dataset.pixels) == [96, 96]


def test_a_list_of_images_in_csv(folder):
    file = as_csv(folder, [row(1, image='["4.png", "2.png"]'), row(2, image="")])
    assert parts(load_split(file, "all")) == [("question 1?", "1", [4, 2]), ("question 2?", "2", [])]


def test_data_without_an_image_column_is_asked_in_text_alone(folder):
    rows = [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(10)]
    dataset = load_split(as_jsonl(folder, rows), "test")
    assert len(dataset) == 1
    assert dataset[0].image is None
    assert dataset.notes["no image, asked in text alone"] == 1


def test_rows_that_share_an_image_stay_together(folder):
    """0 and 1 share one, 1 and 2 another, 0 and 2 none: all three are in one split."""
    chained = [row(n, image=[f"{n}.png", f"{n - n % 3 + (n + 1) % 3}.png"][: 1 + (n % 3 < 2)]) for n in range(30)]
    file = as_jsonl(folder, chained)
    splits = [solutions(load_split(file, split)) for split in ("train", "validation", "test")]
    assert sorted(map(len, splits)) == [3, 3, 24]
    assert all(len({int(n) // 3 for n in found}) * 3 == len(found) for found in splits)
    assert sorted(chain(*splits), key=int) == [str(n) for n in range(30)]


def test_text_only_rows_are_known_by_their_question(folder):
    rows = [{"question": f"What is {n % 10} + 1?", "answer": n % 10 + 1} for n in range(30)]
    file = as_jsonl(folder, rows)
    asked = [{e[0] for e in parts(load_split(file, split))} for split in ("train", "validation", "test")]
    assert [len(questions) for questions in asked] == [8, 1, 1]
    assert len(set.union(*asked)) == 10


def test_rows_of_train_that_the_test_split_has_too(folder):
    same = {"problem": "text?", "solution": "1"}
    both = row(1, image=["../1.png", "../2.png"])
    write_jsonl(folder / "d" / "train.jsonl", [both, row(3, image="../3.png"), same, row(4, image="../4.png")])
    write_jsonl(folder / "d" / "test.jsonl", [row(2, image="../2.png"), same])
    train = load_split(folder / "d", "train", used=("train", "test"), reading=ANYWHERE)
    assert (train.shown_in, train.asked_in) == ({"test": 1}, {"test": 1})
    assert train.summary().endswith(
        "warning: 1 of them show an image of the test split; warning: 1 of them ask a question of the test split"
    )
