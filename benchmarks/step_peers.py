"""TRL's trainers, a step at a time, for `step`. Imported there, and TRL only when one of them is measured."""

from __future__ import annotations

import random
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from benchmarks.cases import Call
from benchmarks.timing import now


def remark(times: dict[str, float]) -> str:
    """How the time of a step divides."""
    total = sum(times.values())
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in times.items())


def call(name: str, x: Any) -> Call:
    """A step of a trainer of TRL's or ours; x: the Inputs of cases_step."""
    import transformers
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from mr1fast.integrations.trl import GRPODConfig, GRPODTrainer

    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    classes: dict[str, tuple[Any, Any, dict[str, float]]] = {
        "GRPOTrainer": (GRPOConfig, GRPOTrainer, {"beta": 0.04}),
        "GRPODTrainer": (GRPODConfig, GRPODTrainer, {"beta_min": 0.04, "beta_max": 0.04}),
    }
    config_class, trainer_class, kl = classes[name]
    shape = x.shape
    on_cpu = shape.device == "cpu"
    output = tempfile.mkdtemp(dir=x.folder.name)
    args = config_class(
        output_dir=output,
        per_device_train_batch_size=shape.P * shape.G // shape.pieces,
        gradient_accumulation_steps=shape.pieces,
        num_generations=shape.G,
        max_completion_length=shape.L,
        max_steps=10_000,
        learning_rate=1e-6,
        loss_type="grpo",
        temperature=1.0,
        **kl,
        model_init_kwargs={"dtype": str(shape.dtype).removeprefix("torch.")},
        bf16=not on_cpu,
        use_cpu=on_cpu,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    rows = [{"prompt": [{"role": "user", "content": one.problem}], "image": one.image} for one in x.examples()]
    trainer = trainer_class(
        model=x.folder.name,
        reward_funcs=_random_rewards,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=x.processor(),
    )
    trainer.remove_callback(PrinterCallback)
    _force(trainer, x.lengths)
    steps = _Steps(trainer, sum(x.lengths) / len(x.lengths))
    return Call(steps.run, remark=lambda: remark(steps.shares), whole=True)


def _random_rewards(completions: list[Any], **_: Any) -> list[float]:
    return [random.random() for _ in completions]


def _force(trainer: Any, lengths: list[int]) -> None:
    """Make `generate` end completions at these lengths, and at no other."""
    from transformers import LogitsProcessor, LogitsProcessorList

    end = trainer.processing_class.tokenizer.eos_token_id
    wanted = torch.tensor(lengths, device=trainer.accelerator.device)

    class ForcedLength(LogitsProcessor):
        def __init__(self) -> None:
            self.prompt = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.prompt = self.prompt or input_ids.shape[1]
            ends = wanted == input_ids.shape[1] - self.prompt + 1
            scores[:, end] = torch.where(ends, 1e4, -1e4)
            return scores

    generate = trainer.model.generate
    trainer.model.generate = lambda *args, **kw: generate(
        *args, **kw, logits_processor=LogitsProcessorList([ForcedLength()])
    )
    trainer.eos_token_ids = [end]


class _Steps:
    """A trainer that waits after each step, in a thread of its own: its loop cannot be entered from outside."""

    def __init__(self, trainer: Any, length: float):
        """length: of its completions, on average."""
        from transformers import TrainerCallback

        self.trainer, self.length = trainer, length
        self.times: defaultdict[str, float] = defaultdict(float)  # of the step so far, in seconds
        self.shares: dict[str, float] = {}
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        steps = self

        class Wait(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                steps.go.acquire()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                steps.done.release()

        trainer.add_callback(Wait())
        for name, method in (
            ("rollout", "_generate"),
            ("collected", "_generate_and_score_completions"),
            ("collected and policy", "training_step"),
        ):
            setattr(trainer, method, self._timed(name, getattr(trainer, method)))
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _timed(self, name: str, method: Callable) -> Callable:
        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = now()
            result = method(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times[name] += now() - began
            return result

        return timed

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:  # whatever it is, `run` waits for it
            self.error = error
        self.done.release()

    def run(self) -> None:
        began = now()
        self.times.clear()
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        found = self.trainer._metrics["train"]["completions/mean_length"][-1]
        assert abs(found - self.length) < 1e-3, f"completions of {found} tokens, not {self.length}"
        times = self.times
        self.shares = {
            "rollout": times["rollout"],
            "reference": times["collected"] - times["rollout"],
            "policy": times["collected and policy"] - times["collected"],
            "optimizer": now() - began - times["collected and policy"],
        }
