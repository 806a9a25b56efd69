"""Train and evaluate linen models with batch statistics; for nnx models, see bnjax.nnx."""

from typing import TYPE_CHECKING

from bnjax._names import front
from bnjax.models.batches import pad_batch
from bnjax.training.averaging import Average
from bnjax.training.history import history
from bnjax.training.logging import scalars
from bnjax.training.state import TrainState, commit, init_state
from bnjax.training.steps import Step, eval_step, evaluate, train_step

__all__ = [
    "Average",
    "Step",
    "TrainState",
    "commit",
    "eval_step",
    "evaluate",
    "history",
    "init_state",
    "pad_batch",
    "scalars",
    "train_step",
]

if not TYPE_CHECKING:  # else every name would seem to exist
    __getattr__, __dir__ = front(__name__, __all__)
