"""What TRL's GRPOTrainer does under the faults of docs/reliability.md: `python -m tests.trl_faults`, as root.

It trains the embedded Qwen2-VL for a few steps, each time in a process of its own, and prints how that ended.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import torch

from mr1fast.data.tasks import TASKS
from mr1fast.model.load import EMBEDDED, load_processor
from mr1fast.options.prompt import PROMPT_SUFFIX
from tests.fault_places import FILE, fill_disk, install, kill
from tests.fault_reward import letters

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.trl_faults_preload"])

SAVING = {"a checkpoint": ("transformers.trainer", "Trainer._save_checkpoint")}


def reward(completions, **_):
    return letters([completion[0]["content"] for completion in completions], None)


def nan_reward(completions, **_):
    return [float("nan"), *reward(completions)[1:]]


def infinite_reward(completions, **_):
    return [float("inf"), *reward(completions)[1:]]


def trainer(folder, reward_function=reward, broken_image=False):
    from datasets import Dataset, Image
    from trl import GRPOConfig, GRPOTrainer

    examples = [TASKS["vc"].example("train", i) for i in range(4)]
    files = []
    for number, example in enumerate(examples):
        files.append(str(Path(folder) / f"{number}.png"))
        example.image.save(files[-1])
    if broken_image:
        Path(files[0]).write_bytes(Path(files[0]).read_bytes()[:150])
    prompts = [[{"role": "user", "content": f"{example.problem} {PROMPT_SUFFIX}"}] for example in examples]
    data = Dataset.from_dict({"prompt": prompts, "image": files}).cast_column("image", Image())
    settings = {
        "output_dir": str(Path(folder) / "run"), "max_steps": 4, "save_steps": 1, "logging_steps": 1,
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "temperature": 1.5,
        "learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "disable_tqdm": True, "logging_nan_inf_filter": False,
    }  # fmt: skip
    return GRPOTrainer(
        model=str(EMBEDDED),
        reward_funcs=reward_function,
        args=GRPOConfig(**settings),
        train_dataset=data,
        processing_class=load_processor(),
    )


def _train(folder, out, harm, resume, keywords):
    torch.set_num_threads(1)
    output = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    ready = trainer(folder, **keywords)
    if harm is not None:
        harm()
    try:
        ready.train(resume_from_checkpoint=resume)
    except BaseException as error:
        traceback.print_exc()
        print(f"ENDED BY {type(error).__name__}: {str(error).strip().splitlines()[-1:]}", flush=True)
        os._exit(1)
    broken = sum(int(not torch.isfinite(weight).all()) for weight in ready.model.parameters())
    steps = [{name: row[name] for name in ("loss", "grad_norm", "reward")} for row in ready.state.log_history[:-1]]
    print(f"FINISHED, {broken} weights of {len(list(ready.model.parameters()))} with NaN or inf; {json.dumps(steps)}")


def run(title, folder, harm=None, resume=False, **keywords):
    out = str(Path(folder) / "out.txt")
    process = FORKS.Process(target=_train, args=(folder, out, harm, resume, keywords))
    process.start()
    process.join(200)
    said = Path(out).read_text(errors="replace").splitlines()
    last = [line for line in said if line.startswith(("ENDED", "FINISHED"))]
    checkpoints = {path.name: sorted(one.name for one in path.iterdir()) for path in Path(folder).glob("run/check*")}
    newest = max(checkpoints, default="none")
    print(f"{title}: exit code {process.exitcode}, {len(said)} lines; {last or said[-1:]}", flush=True)
    print(f"    {len(checkpoints)} checkpoints; {newest}: {' '.join(checkpoints.get(newest, []))}", flush=True)


def main():
    with tempfile.TemporaryDirectory() as folder:
        places = Path(folder) / "places.json"
        run_folder = Path(folder) / "run"
        run("left alone", folder, partial(install, run_folder, record=places, places=SAVING))
        operations = json.loads(places.read_text())[FILE]
    print(operations)
    third = [index for index, name in enumerate(operations) if name.startswith("checkpoint-3")]
    for call in (third[0] + 1, third[len(third) // 2], third[-1]):
        with tempfile.TemporaryDirectory() as folder:
            harm = partial(install, Path(folder) / "run", place=FILE, call=call, harm=kill)
            run(f"kill -9 before {operations[call]}", folder, harm)
            run("    resumed", folder, resume=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], check=True)
        try:
            full = partial(fill_disk, left=1_000_000)
            run("disk full", folder, partial(install, Path(folder) / "run", place=FILE, call=third[0], harm=full))
            (Path(folder) / "filler").unlink()
            run("    resumed", folder, resume=True)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    for title, keywords in (
        ("a NaN reward", {"reward_function": nan_reward}),
        ("an infinite reward", {"reward_function": infinite_reward}),
        ("a broken image", {"broken_image": True}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            run(title, folder, **keywords)


if __name__ == "__main__":
    sys.exit(main())
