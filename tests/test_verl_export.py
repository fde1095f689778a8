"""`python -m mr1fast.integrations.verl export`: the layout that verl reads.

verl itself is no part of the test environment; where it is, `python -m mr1fast.integrations.verl check DIR` reads an
export with its own classes.
"""

import io
import runpy

import pyarrow.parquet as pq
import pytest
import yaml
from data_files import row, write_jsonl
from PIL import Image

from mr1fast.data.tasks import TASKS
from mr1fast.integrations.verl_check import overrides
from mr1fast.integrations.verl_export import main
from mr1fast.options.prompt import PROMPT_SUFFIX
from mr1fast.rewards import accuracy_reward, format_reward

TASK = ["--task=vc", "--max-steps=5", "--prompts-per-step=4", "--eval-samples=3", "--eval-validation-samples=2"]


def exported(folder, *arguments):
    assert main(["export", "--output", str(folder), *map(str, arguments)]) == 0
    script = (folder / "run.sh").read_text()
    told = dict(option.partition("=")[::2] for option in overrides(script, folder))
    return pq.read_table(folder / "train.parquet").to_pylist(), told


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    return folder, *exported(folder, *TASK, "--num-iterations=2", "--reward-weights=accuracy=1,format=0.25")


def test_problems_in_verls_layout(export):
    folder, rows, _ = export
    assert len(rows) == 12  # three batches of four, each used twice but for the last
    example = TASKS["vc"].example("train", 0)
    first = rows[0]
    assert first["prompt"] == [{"role": "user", "content": f"<image>{example.problem} {PROMPT_SUFFIX}"}]
    assert first["reward_model"] == {"style": "rule", "ground_truth": example.solution}
    assert (first["data_source"], first["extra_info"]["split"], first["extra_info"]["index"]) == ("vc", "train", 0)
    assert Image.open(io.BytesIO(first["images"][0]["bytes"])).tobytes() == example.image.tobytes()
    tested = pq.read_table(folder / "test.parquet").to_pylist()
    assert [(one["data_source"], one["extra_info"]["split"]) for one in tested] == [
        *[("vc", "validation")] * 2,
        *[("vc", "test")] * 3,
        *[("gr", "test")] * 3,
    ]


def test_options_of_the_run(export):
    folder, _, told = export
    assert told["data.train_files"] == str(folder / "train.parquet")
    assert told["actor_rollout_ref.actor.policy_loss.loss_mode"] == "grpo_d"
    schedule = {name: told[f"+actor_rollout_ref.actor.policy_loss.{name}"] for name in ("kl_schedule", "beta_max")}
    assert schedule == {"kl_schedule": "paper", "beta_max": "0.04"}
    assert (told["trainer.total_training_steps"], told["actor_rollout_ref.actor.ppo_epochs"]) == ("3", "2")
    assert told["actor_rollout_ref.actor.clip_ratio_c"] == "null"
    assert told["actor_rollout_ref.actor.loss_agg_mode"] == "seq-mean-token-mean"
    assert int(told["data.max_prompt_length"]) == 36


@pytest.mark.parametrize("form", ["<think>a</think><answer>{}</answer>", "<answer>{}</answer>", "{}", "<answer>x"])
def test_the_reward_is_ours(form, export):
    folder, rows, _ = export
    compute_score = runpy.run_path(str(folder / "reward.py"))["compute_score"]
    for one in rows[:3]:
        solution = one["reward_model"]["ground_truth"]
        text = form.format(solution)
        score = compute_score("vc", text, solution, extra_info=one["extra_info"], router=None)
        right, formed = accuracy_reward(text, solution), format_reward(text)
        assert score == {
            "score": right + 0.25 * formed,
            "accuracy_reward": right,
            "format_reward": formed,
            "absent": 0.0,
        }


OWN = """
def hinted(completions, solutions, hint, **columns):
    return [None if one == "none" else len(text) + len(one) for text, one in zip(completions, hint)]
"""


def test_own_data_rewards_and_adapter(folder, tmp_path, monkeypatch, capsys):
    """From a file of options; a text that verl would take for a sound is left out, and an absent reward is no NaN."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownverl.py").write_text(OWN)
    data = [row(n) | {"hint": "none" if n % 3 else "abc"} for n in range(12)]
    for one in data[1::3]:
        one["problem"] = "What is <audio>?"
    write_jsonl(folder / "data.jsonl", data)
    options = {"data": str(folder / "data.jsonl"), "reward_weights": "ownverl:hinted=0.5", "eval_samples": 0}
    options |= {"eval_steps": 0, "epochs": 2, "prompts_per_step": 2, "method": "grpo", "beta": 0.0}
    options |= {"lora_rank": 4, "lora_targets": "q_proj,v_proj", "system_prompt": "Look."}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    rows, told = exported(tmp_path / "out", "--config", tmp_path / "run.yaml")
    said = capsys.readouterr().out
    assert 7 <= len(rows) <= 8  # one row of the twelve is a test
    assert f"left out {11 - len(rows)}, whose text has one of <image>, <video>, <audio>" in said
    assert "the learning rate falls as a cosine" in said
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Look."}
    assert told["data.val_files"] == told["data.train_files"]
    assert told["actor_rollout_ref.actor.use_kl_loss"] == "False"
    assert told["actor_rollout_ref.model.target_modules"] == "[q_proj,v_proj]"
    assert f"export PYTHONPATH={tmp_path}:" in (tmp_path / "out" / "run.sh").read_text()
    compute_score = runpy.run_path(str(tmp_path / "out" / "reward.py"))["compute_score"]
    scores = {one["extra_info"]["columns"]: compute_score("data", "four", "1", one["extra_info"]) for one in rows}
    absent = {"none" in columns: (score["score"], score["absent"]) for columns, score in scores.items()}
    assert absent == {False: (3.5, 0.0), True: (0.0, 1.0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=sft", "--task=vc"], "--method sft has none"),
        ([], "an export is of one model; choose a task"),
        (["--task=vc", "--freeze=vision"], "verl cannot honour --freeze vision; leave it out"),
        (["--task=vc", "--reference-model=."], "verl cannot honour --reference-model"),
        (["--task=vc", "--kl-schedule=adaptive", "--target-kl=0.1"], "verl cannot honour --target-kl 0.1"),
        (["--task=vc", "--lora-rank=4"], "give --lora-targets, such as q_proj,v_proj"),
        (["--data=missing"], "--data missing does not exist"),
        (["--task=vc", "--max-stps=3"], "unknown option --max-stps (did you mean '--max-steps'?)"),
        (["--resume"], "--resume is for a run of our own"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path, capsys):
    assert main(["export", "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_check_says_what_is_missing(export, tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "is not an export: there is no run.sh in it" in capsys.readouterr().err
    assert main(["check", str(export[0])]) == 2
    assert "verl is not installed here" in capsys.readouterr().err
    assert main(["chek"]) == 2
    assert "export" in capsys.readouterr().err
