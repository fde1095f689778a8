"""`mr1fast reproduce`: the arms that are compared, what their differences say, and what is drawn from them."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from mr1fast import reproduce
from mr1fast.errors import UserError
from mr1fast.losses.kl_weight import kl_weight
from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.parse import parse_arguments
from mr1fast.options.preset import PRESETS
from mr1fast.reproduction import experiments, runner, train
from mr1fast.reproduction.arms import ARMS, BETA_MAX, SETTING, STEPS, TESTS, VEHICLES, label, mean_weight, rated_weight
from mr1fast.reproduction.encoded import Recent, RunOnce
from mr1fast.reproduction.experiments import BASE_RUN, DEFAULT, EXPERIMENTS, Comparison, Run, runs_of
from mr1fast.reproduction.full_scale import DRAWN, FullScale
from mr1fast.reproduction.records import Records
from mr1fast.reproduction.results import Results
from mr1fast.reproduction.seconds import Estimate
from mr1fast.reproduction.statistics import binomial_error, holm, paired, t_quantile
from mr1fast.reproduction.tables import report
from mr1fast.reproduction.waiting import Waiting
from mr1fast.training.trainer import Trainer

FEW = [replace(test, problems=6) for test in TESTS]


# ---- arms and experiments --------------------------------------------------------------------------------------------


def test_arms_differ_in_what_their_names_say():
    for arm in ARMS.values():
        for task in ("vc", "gr"):
            config = train.config_of(Run(task, arm.name, 3))
            assert config.seed == 3
            changed = {name for name, value in SETTING.items() if getattr(config, name) != value}
            assert changed <= {*arm.options}, arm.name
    learnt = [train.config_of(Run("gr", name, 0)) for name in ARMS if not ARMS[name].is_sft]
    assert len({config.learning_rate for config in learnt}) == 1
    assert len({(arm.twist, *map(str, arm.options.items())) for arm in ARMS.values()}) == len(ARMS)


def test_the_constants_that_eq_3_is_compared_with():
    weights = [kl_weight(step, STEPS, beta_min=0, beta_max=BETA_MAX) for step in range(STEPS)]
    assert mean_weight() == pytest.approx(sum(weights) / STEPS) == pytest.approx(0.2104, abs=1e-4)
    trainer = object.__new__(Trainer)
    trainer.config = train.config_of(Run("gr", "grpo-d", 0))
    rates = []
    for trainer.finished_steps in range(STEPS):
        rates.append(trainer.learning_rate)
    assert rated_weight() == pytest.approx(np.average(weights, weights=rates)) == pytest.approx(0.143, abs=2e-3)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_compares_what_it_runs(name):
    experiment = EXPERIMENTS[name]
    runs = experiment.runs([4, 7, 9, 2])
    assert runs[0] == BASE_RUN
    assert len(set(runs)) == len(runs)
    assert all(run.arm in ARMS for run in runs[1:])
    for one in experiment.comparisons:
        assert {*one.left, *one.right} <= {"base", *experiment.arms[one.task]}
        assert all(label(arm) in one.title for arm in one.left)


def test_runs_are_made_once_and_seed_by_seed():
    runs = runs_of(DEFAULT, [2, 0])
    assert len(set(runs)) == len(runs)
    assert [run.seed for run in runs[1:]] == [2] * (len(runs) // 2) + [0] * (len(runs) // 2)
    assert {run.arm for run in runs_of(["table1"], [0], ["sft"])} == {"base", "sft"}
    assert "beyond" not in DEFAULT


def test_processes_stay_with_their_prompts():
    runs = runs_of(["table1"], [2, 0], ["sft", "sft-reasoning", "grpo-d"])
    waiting, last, order = Waiting(runs, Estimate()), {"a": None, "b": None}, {"a": [], "b": []}
    until = {"a": 0.0, "b": 0.0}
    while waiting.runs:
        free = min(until, key=until.__getitem__)
        busy = [run for name, run in last.items() if run is not None and name != free]
        run = waiting.take(last[free], busy)
        last[free] = run
        until[free] += Estimate().seconds(run)
        order[free].append(run.name)
    assert order == {
        "a": ["base", "gr-grpo-d-2", "gr-sft-2", "gr-sft-reasoning-2", "gr-grpo-d-0", "gr-sft-0"],
        "b": ["vc-grpo-d-2", "vc-sft-2", "vc-sft-reasoning-2", "vc-grpo-d-0", "vc-sft-0", "vc-sft-reasoning-0"]
        + ["gr-sft-reasoning-0"],
    }


def test_a_process_without_prompts_of_its_own_helps_where_most_is_left():
    runs = [Run("gr", "sft", 0), Run("vc", "grpo-d", 0), Run("vc", "grpo-1", 0)]
    waiting = Waiting(runs, Estimate())
    assert waiting.take(None, [Run("gr", "grpo-d", 0), Run("vc", "grpo-mean", 0)]) == runs[1]
    assert waiting.take(Run("gr", "grpo-d", 0), [Run("vc", "grpo-mean", 0)]) == runs[0]
    assert waiting.take(Run("gr", "sft", 0), [Run("vc", "grpo-d", 0)]) == runs[2]


def test_what_is_tested():
    names = {task: {test.name for test in Run(task, "sft", 0).tests} for task in ("vc", "gr")}
    assert names == {"vc": {test.name for test in TESTS}, "gr": {"gr/test", "vc/vehicles"}}
    assert BASE_RUN.tests == TESTS


# ---- what differences say --------------------------------------------------------------------------------------------


def test_t_intervals_are_those_of_the_tables():
    known = {1: 12.706, 4: 2.776, 9: 2.262, 30: 2.042}
    assert {df: round(t_quantile(0.975, df), 3) for df in known} == known


def test_a_paired_difference():
    left, right = {0: 50.0, 1: 53.0, 2: 52.0, 5: 9.0}, {0: 48.0, 1: 49.0, 2: 51.0, 7: 99.0}
    found = paired(left, right)  # of 2, 4, 1
    error = np.std([2, 4, 1], ddof=1) / 3**0.5
    assert (found.n, found.mean, found.error) == (3, pytest.approx(7 / 3), pytest.approx(error))
    half = 4.3027 * error
    assert (found.low, found.high) == (pytest.approx(7 / 3 - half, abs=1e-3), pytest.approx(7 / 3 + half, abs=1e-3))
    assert found.p == pytest.approx(0.1181, abs=1e-3)
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert math.isnan(paired({0: 3.0}, {0: 1.0}).p)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.9, math.nan, 0.6])
    assert corrected[::2] == [1.0, 1.0]
    assert math.isnan(corrected[1])


def test_binomial_error():
    assert binomial_error(41.3, 300) == pytest.approx(2.84, abs=0.01)


# ---- an arm ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Two steps of a watched arm, from the embedded model."""
    return train.result_of_run(Run("gr", "grpo-mean", 0), str(EMBEDDED), steps=2, tests=FEW)


def test_an_arm_says_what_the_tables_need(trained):
    assert [row["step"] for row in trained["curve"]] == [1, 2]
    assert {row["beta"] for row in trained["curve"]} == {round(mean_weight(), 5)}
    assert set(trained["tests"]) == {test.name for test in TESTS}
    assert all(figures["n"] == 6 and "anyhow_accuracy" in figures for figures in trained["tests"].values())
    assert [point["step"] for point in trained["watched"]] == [2]
    assert json.loads(json.dumps(trained)) == trained


def test_tests_on_the_way_do_not_change_the_training(trained, monkeypatch):
    monkeypatch.setattr(train, "WATCH_STEPS", 1)
    watched = train.result_of_run(Run("gr", "grpo-mean", 0), str(EMBEDDED), steps=2, tests=FEW)
    assert len(watched["watched"]) == 2
    assert all({*point} == {"step", "vc/vehicles", "gr/test"} for point in watched["watched"])
    assert (watched["curve"], watched["completions"]) == (trained["curve"], trained["completions"])


def test_twists():
    config = train.config_of(Run("gr", "grpo-d-constant-rate", 0))
    trainer = object.__new__(train.ConstantRate)
    trainer.config, rates = config, []
    for trainer.finished_steps in range(STEPS):
        rates.append(trainer.learning_rate)
    assert rates[: SETTING["warmup_steps"]] == sorted(rates[: SETTING["warmup_steps"]])
    assert set(rates[SETTING["warmup_steps"] :]) == {config.learning_rate}
    result = train.result_of_run(Run("gr", "closed-loop", 0), str(EMBEDDED), steps=2, tests=FEW[:1])
    for row in result["curve"]:
        assert row["beta"] == pytest.approx(BETA_MAX * row["rewards/accuracy_reward/mean"], abs=1e-4)
    problems = [train._problems(VEHICLES)[index] for index in range(300)]
    noisy = train.Noisy(problems)
    wrong = [index for index in range(300) if noisy[index].solution != problems[index].solution]
    assert 0.1 < len(wrong) / 300 < 0.25  # some of the fifth come by the right answer
    assert noisy[wrong[0]] == noisy[wrong[0]]
    assert replace(noisy[wrong[0]], solution=problems[wrong[0]].solution) == problems[wrong[0]]


def test_batches_encoded_once_are_those_that_a_policy_encodes(monkeypatch):
    policy = train._policy(str(EMBEDDED))
    problems = [one for test in TESTS[:2] for one in train._problems(test)[:5]]  # of several lengths
    batches = problems, problems[::-1], problems[6:7]
    for _ in range(2):
        for batch in batches:
            expected, found = Policy.encode(policy, batch), policy.encode(batch)
            assert found.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    reworded = [replace(problems[6], problem="How many?")]
    assert policy.encode(reworded)["input_ids"].shape != policy.encode(problems[6:7])["input_ids"].shape
    monkeypatch.setattr(Policy, "encode", None)
    for batch in batches:
        policy.encode(list(batch))


@torch.no_grad()
def test_batches_that_ran_once_have_the_hidden_states_of_those_that_run(monkeypatch):
    base, runs = RunOnce(load_model(), load_processor()), []
    base.base.model.visual.register_forward_hook(lambda _, given, __: runs.append(len(given[0]) // 64))  # images
    problems = [one for test in TESTS[:2] for one in train._problems(test)[:5]]  # of several lengths
    for batch, new in ((problems[:6], 6), (problems[::-1], 10), (problems[:6], 0)):
        inputs = base.encode(batch)
        ids, mask = base.encode_completions([one.solution for one in batch for _ in range(2)])
        runs.clear()
        found = base.completion_hidden(inputs, ids, mask)
        assert sum(runs) == new
        torch.testing.assert_close(found, Policy.completion_hidden(base, inputs, ids, mask), rtol=1e-4, atol=1e-4)


def test_the_batches_that_were_asked_for_last_are_kept(monkeypatch):
    monkeypatch.setattr("mr1fast.reproduction.encoded.MOST", 2)
    recent, computed = Recent(), []

    def get(key):
        return recent.get(key, None, lambda: computed.append(key) or 10 * key)

    assert [get(key) for key in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert computed == [1, 2, 3, 2]


@pytest.mark.slow
def test_the_fingerprint_is_of_what_is_computed(monkeypatch):
    model = str(EMBEDDED)
    monkeypatch.setattr(train, "TESTS", TESTS[:1])
    first = runner.fingerprint(model)
    assert runner.fingerprint(model) == first
    monkeypatch.setattr(Trainer, "learning_rate", 1e-3)
    assert runner.fingerprint(model) != first


run_an_arm = runner._run


def run_an_arm_on_few_problems(*arguments):
    train.result_of_run = partial(train.result_of_run, tests=FEW)  # in the arm's process
    return run_an_arm(*arguments)


@pytest.mark.slow
def test_arms_run_in_processes_and_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "_run", run_an_arm_on_few_problems)
    runs = [BASE_RUN, Run("vc", "sft", 0)]
    records = Records(tmp_path, "this")
    with runner.processes(2) as executor:
        runner.run_arms(executor, runs, records, str(EMBEDDED), steps=1)
        assert "[2/2] " in capsys.readouterr().out
        before = {file: file.stat().st_mtime_ns for file in (tmp_path / "arms").iterdir()}
        runner.run_arms(executor, runs, records, str(EMBEDDED), steps=1)
    assert "2 of 2 arms have been run before" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "arms").iterdir()} == before


# ---- records, tables and figures -------------------------------------------------------------------------------------


def figures(accuracy: float, anyhow: float) -> dict:
    return {"greedy_accuracy": accuracy, "anyhow_accuracy": anyhow, "format_accuracy": 0.8, "n": 300}


def fake(run: Run) -> dict:
    """A result in which GRPO-D is 10 points ahead of the others, and every other difference is the seeds'."""
    ahead = 0.1 if run.arm == "grpo-d" else 0.0
    accuracy = 0.4 if run == BASE_RUN else 0.5 + ahead + 0.01 * ((run.seed * 7 + len(run.arm)) % 3)
    tests = {test.name: figures(accuracy, accuracy + 0.2) for test in TESTS}
    rewards = {"rewards/accuracy_reward/mean": accuracy, "rewards/format_reward/mean": 0.9}
    steps = range(0 if run == BASE_RUN else 10, 61, 10)
    return {
        "curve": [{"step": step, **rewards} for step in range(1, 61)],
        "watched": [{"step": step, **tests} for step in steps],
        "tests": tests,
        "completions": {test.name: ["<answer>4</answer>", "4 items, so 4"] * 4 for test in TESTS},
        "seconds": 10.0,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    records = Records(folder, "this")
    for run in runs_of(DEFAULT, range(5)):
        records.write(run, runner.settings_of(run), fake(run))
    return folder


@pytest.mark.slow
def test_all_is_drawn(folder, capsys):
    assert reproduce.main(["all", "--redraw", "--output-dir", str(folder)]) == 0
    written = capsys.readouterr().out.split()
    pictures = [file for file in written if file.endswith(".png")]
    assert len(pictures) == 6
    for file in pictures:
        assert np.asarray(Image.open(file).convert("L")).std() > 5, file
    text = (folder / "results.md").read_text(encoding="utf-8")
    for line in (
        "| base, not trained | 40.0 (60.0) | 40.0 (60.0) | 40.0 (60.0) | 40.0 (60.0) | 80 |  | 42.5 / 76.0 |",
        "| VC | VC | GRPO-D, Eq. 3 − base, not trained | +20.8 ± 0.4 | +19.8 to +21.8 |",
        "not resolved, 5 seeds",
        "+63.5 %",
    ):
        assert line in text, line
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert len(content["arms"]) == len(runs_of(DEFAULT, range(5)))
    assert content["experiments"]["fig6"][0]["n"] == 5


def test_what_was_not_run_is_said(folder):
    records = Records(folder).all([BASE_RUN, Run("vc", "sft", 0), Run("vc", "grpo-mean", 0)])
    text = report(Results(records), [EXPERIMENTS["table1"], EXPERIMENTS["fig4"]], {})
    assert "Not run." in text
    assert "one seed: nothing can be said" in text


def test_means_of_several_arms_are_compared(folder):
    results = Results(Records(folder).all(runs_of(["fig6"], range(5))))
    one = Comparison("gr", ("grpo-d", "grpo-1"), ("base",), VEHICLES)
    sides = [results.values("gr", arm, VEHICLES) for arm in ("grpo-d", "grpo-1")]
    wanted = np.mean([(sides[0][seed] + sides[1][seed]) / 2 for seed in range(5)]) - 40
    assert results.difference(one).mean == pytest.approx(wanted)


def test_results_never_mix(folder, tmp_path):
    run = Run("vc", "sft", 0)
    settings = {run: runner.settings_of(run)}
    assert set(Records(folder, "this").finished([run], settings)) == {run}
    for records, wanted in ((Records(folder, "other"), settings), (Records(folder, "this"), {run: {"steps": 61}})):
        with pytest.raises(UserError, match=r"1 of the 1 finished arms .*vc-sft-0.* --redraw"):
            records.finished([run], wanted)
    Records(tmp_path, "this").write(BASE_RUN, {}, fake(BASE_RUN))
    Records(tmp_path, "other").write(run, {}, fake(run))
    with pytest.raises(UserError, match="different versions"):
        Records(tmp_path).all([BASE_RUN, run])
    Records(tmp_path).file(run).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is damaged; move it away"):
        Records(tmp_path).all([BASE_RUN, run])


# ---- the program -----------------------------------------------------------------------------------------------------


def test_dry_run(capsys):
    assert reproduce.main(["fig4", "fig6", "--seeds", "0,2-3", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "seeds 0, 2, 3" in text
    assert f"{1 + 3 * len({*experiments.ALPHAS, *experiments.WEIGHTS, 'grpo-d'})} arms" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig2"], "the experiment must be one of table1"),
        (["all", "--seeds", "4-0"], "--seeds: 4-0 is no range of at most 1000 seeds"),
        (["all", "--seeds", "x"], "--seeds must be seeds such as 0-4 or 0,2, got 'x'"),
        (["all", "--seeds", "1,1"], "--seeds 1,1 names a seed twice"),
        (["fig4", "--arms", "sft"], "--arms: an arm must be one of alpha-0"),
        (["fig4", "--data", "x"], "--data needs --preset"),
        (["fig4", "--model", "nowhere"], "--model nowhere is not a small model; for others, give --preset as well"),
        (["fig4", "--redraw", "--output-dir", "nowhere"], "nowhere has no finished arms to draw"),
        (["fig4", "--preset", "gr-3b"], "--preset must be one of gr-2b"),
        (["fig6", "--preset", "gr-2b"], "--test-data must name two data sets: the task's own first"),
        (["fig3", "--preset", "gr-2b"], "with --preset there are table1, fig4, fig5, fig6, fig7, and not fig3"),
        ([], "the following arguments are required"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert reproduce.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_full_scale_dry_run_prints_commands_of_the_trainer(preset, capsys):
    assert reproduce.main([*DRAWN, "--preset", preset, "--seeds", "0", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split()[3:] for line in lines if line.lstrip().startswith("python -m mr1fast.train")]
    configs = [parse_arguments(command).config for command in commands]
    alphas = {config.rewards.get("format", 0) for config in configs}
    betas = {config.beta for config in configs if config.method == "grpo"}
    assert alphas == {0, 0.25, 0.5, 0.75, 1}
    assert {0, 0.01, 0.02, 0.03, 0.04, 0.05} < betas
    assert len(betas) == 7  # Eq. 3's mean
    assert {config.method for config in configs} == {"sft", "grpo", "grpo-d"}
    assert "hours of one H100 in all. Estimated, not measured" in lines[-1]


def test_a_finished_run_at_full_scale_as_the_tables_read_it(tmp_path):
    from mr1fast.reproduction.full_scale import record_of

    full = FullScale.of("gr-2b", None, None, None)
    config = parse_arguments(full.arguments({}, 0, tmp_path)).config
    before = {"geoqa": figures(0.1, 0.2), "superclevr": figures(0.3, 0.4)}
    after = {"data": {}, "geoqa": figures(0.5, 0.6), "superclevr": figures(0.7, 0.8)}
    result = {"before": before, "after": after, "seconds": 1.0, "versions": {"mr1fast": "1"}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "beta": 0.1}\n')
    record = record_of(tmp_path, Run("gr", "grpo-d", 0), config)
    assert record["tests"] == {"gr/test": after["geoqa"], "vc/vehicles": after["superclevr"]}
    assert record["before"] == {"gr/test": before["geoqa"], "vc/vehicles": before["superclevr"]}
    assert [row["step"] for row in record["curve"]] == [1]
