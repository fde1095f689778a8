"""Parts of verl to test with, which is not installed."""

from dataclasses import FrozenInstanceError, dataclass, field


@dataclass
class ActorConfig:
    """The part of verl's ActorConfig that matters, frozen as there, and readable as a mapping."""

    clip_ratio: float = 0.2
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    clip_ratio_c: float | None = 3.0
    kl_loss_coef: float = 0.001
    global_batch_info: dict = field(default_factory=dict)

    def __setattr__(self, name, value):
        if name in self.__dict__:
            raise FrozenInstanceError(name)
        super().__setattr__(name, value)

    def get(self, name, default=None):
        return getattr(self, name, default)
