"""Training in two processes on the CPU (gloo): the same numbers as in one, the same files, and one end for both."""

import json
import signal

import pytest
import torch
from launching import TESTS, free_ports, launch, outcome
from safetensors.torch import load_file
from train_program import main, metrics
from two_processes import EXACT, MISTAKES, PROGRAM, RUNS, SHARDED, steps

from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig
from mr1fast.training.processes import ALONE, Processes, check_same, equal_pieces, share_weights


def sayings(folder):
    """What each process has said: [(exit code, output, errors) of each run of the program]."""
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Starts two processes for what two of the tests look at. Returns a function that waits for them."""
    folder = tmp_path_factory.mktemp("both")
    processes = launch(TESTS / "two_processes.py", "steps", folder, *free_ports(len(MISTAKES) + 1))
    ended = []

    def wait():
        ended.extend(() if ended else outcome(processes))
        for code, _, errors in ended:
            assert code == 0, errors
        return folder

    yield wait
    for process in processes:
        process.kill()


def test_two_processes_take_the_steps_of_one(both, one_thread):
    """Divided by prompts alone, by weights as well (FSDP), and with gradients added up in float64.

    Float32 sums depend on their order. AdamW divides a gradient by itself, and makes of the last bits of one near 0
    some thousandths of a step; steps are of 1e-3 here. In float64 it comes out that nothing else is different.
    """
    alone = {name: steps(settings, ALONE) for name, settings in RUNS.items()}
    alone |= {f"{name}, exact": steps(settings, ALONE, exact=True) for name, settings in EXACT.items()}
    together = torch.load(both() / "steps.pt")
    assert together.keys() == {*alone, *(f"{name}, sharded" for name in SHARDED)}
    for name, (found, found_weights, found_state) in together.items():
        wanted, weights, state = alone[name.removesuffix(", sharded")]
        lengths = {row["completions/max_length"] - row["completions/min_length"] for row in wanted}
        assert max(lengths) > 0 or "sft" in name, "completions of different lengths are the point"
        for step, (mine, theirs) in enumerate(zip(wanted, found, strict=True)):
            assert set(mine) == set(theirs)
            for metric, value in mine.items():
                if "sampling_logp" not in metric:  # that is rounding alone
                    assert theirs[metric] == pytest.approx(value, rel=1e-6, abs=1e-6), (name, step, metric)
        apart = max((one - other).abs().max() for one, other in zip(weights, found_weights, strict=True))
        assert apart < (1e-9 if "exact" in name else 5e-6), name
        slots = [(one["adamw"]["state"][i], len(one["masters"])) for one in (state, found_state) for i in (0, 5)]
        for (mine, number), (theirs, other) in zip(slots[:2], slots[2:]):
            assert number == other == len(weights)
            assert mine["step"] == theirs["step"] == state["adamw"]["state"][0]["step"]
            torch.testing.assert_close(theirs["exp_avg"], mine["exp_avg"], rtol=0, atol=1e-6)


def test_shares_are_whole_groups_and_come_back_in_order():
    first, second = Processes(0, 2), Processes(1, 2)
    assert (first.share(range(5)), second.share(range(5))) == ([0, 2, 4], [1, 3])
    config = TrainConfig(task="vc", prompts_per_step=12, gradient_accumulation_steps=4).for_task("vc")
    assert [equal_pieces(config, Processes(0, n)) for n in (1, 2, 3, 4, 6, 12)] == [4, 2, 2, 1, 1, 1]
    with pytest.raises(UserError, match="multiple of the number of processes, got 12 and 5"):
        equal_pieces(config, Processes(0, 5))
    assert ALONE.whole(["a", "b"]) == ["a", "b"]
    assert Processes(0, 2).device("cpu") == "cpu"
    with pytest.raises(UserError, match="--device cuda:1 is one device, and 2 processes each need their own"):
        Processes(0, 2).device("cuda:1")


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_by_one(tmp_path):
    """The two share weights and optimizer (FSDP)."""
    two, one, options = tmp_path / "two", tmp_path / "one", [*PROGRAM, "--max-steps=3"]
    (code, output, errors), (second_code, *second_said) = outcome(
        launch("-m", "mr1fast.train", *options, "--output-dir", two, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    )
    assert (code, second_code) == (0, 0), errors
    assert second_said == ["", ""]
    assert "2 processes, which share the weights (FSDP), each on cpu" in output
    assert main(*options, "--output-dir", one) == 0
    results = [json.loads((run / "result.json").read_text()) for run in (two, one)]
    assert [result["processes"] for result in results] == [2, 1]
    assert results[0]["before"] == results[1]["before"]
    assert [row["step"] for row in metrics(two)] == list(range(4))
    answers = [(run / "answers" / "before-training" / "vc.jsonl").read_text().splitlines() for run in (two, one)]
    assert sorted(answers[0]) == sorted(answers[1])
    wanted = load_file(one / "vc" / "model" / "model.safetensors")
    for resumed in (two / "vc" / "checkpoint-000002", None):
        if resumed is not None:
            assert main("--resume", resumed) == 0
        found = load_file(two / "vc" / "model" / "model.safetensors")
        assert max((wanted[name] - found[name]).abs().max() for name in wanted) < 2e-6
    assert json.loads((two / "result.json").read_text())["processes"] == 1


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[message for *_, message in MISTAKES])
def test_a_mistake_is_one_sentence_of_the_first_process(number, both):
    folder = both()
    (code, output, errors), second = (said[number] for said in sayings(folder))
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert MISTAKES[number][-1] in errors
    assert errors.count("\n") == 1
    assert second == [2, "", ""]
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_both_end_where_one_does(tmp_path, signals_as_in_a_terminal):
    """Ctrl-C, which only one of them notices; and one that is killed."""
    run = tmp_path / "run"
    ended = outcome(launch(TESTS / "two_processes.py", "ends", tmp_path, *free_ports(2)))
    assert [code for code, *_ in ended] == [0, -signal.SIGKILL], ended
    (interrupted, alone), (second,) = sayings(tmp_path)
    code, _, errors = interrupted
    assert (code, second[0]) == (130, 130), errors
    assert "stopped by SIGINT\nto continue: python -m mr1fast.train --resume" in errors
    assert (run / "vc" / "checkpoint-000002" / "trainer_state.pt").exists()
    code, _, errors = alone
    assert code == 1
    assert "error: another process has ended without a word, so this one ends as well\nto continue" in errors
    assert "Traceback" not in errors
    assert metrics(run)[-1]["step"] == 3


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([(None, "c0 x"), (None, "c0 x"), (None, "c1 x")], "process 2 was started with other code than process 0"),
        ([(None, "c0 x"), (None, "c0 y"), (None, "c1 x")], "process 1 was started with other options than process 0"),
        ([(None, "c0 x"), ("--engine trl: trl is not installed", "c0 x")], "--engine trl: trl is not installed"),
    ],
)
def test_what_processes_must_agree_on(said, message):
    with pytest.raises(UserError, match=message):
        check_same(said)
    check_same([(None, "c0 x"), (None, "c0 x")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FSDP_VERSION": "1"}, "asks for FSDP 1; write fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params in accelerate's fsdp_config must be false here"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "must be false here; use --gradient-checkpointing on"),
    ],
)
def test_what_of_fsdp_cannot_be_done(changes, message, monkeypatch):
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | changes).items():
        monkeypatch.setenv(name, value)
    assert not share_weights(ALONE)
    with pytest.raises(UserError, match=message):
        share_weights(Processes(0, 2))


def test_processes_that_nobody_connects_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main("--task=vc", "--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: WORLD_SIZE is 4, but the processes cannot be connected (")
    assert error.endswith("start them by accelerate launch or torchrun, or unset WORLD_SIZE\n")
    assert error.count("\n") == 1
