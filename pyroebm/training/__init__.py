"""Train energies on data: the loop, checkpoints, guards, logs, several processes; pretraining,
fine-tuning, imputation."""

from pyroebm.training.batches import Batches
from pyroebm.training.distributed import (
    average_gradients,
    connected_ranks,
    process_group,
    ranks,
    same_start,
)
from pyroebm.training.finetuning import Classifier, fine_tune
from pyroebm.training.guards import Guard
from pyroebm.training.imputation import complete
from pyroebm.training.log import TrainingLog, read_log
from pyroebm.training.loop import fit
from pyroebm.training.pretraining import pretrain_belief_network, pretrain_boltzmann_machine

__all__ = [
    "Batches",
    "Classifier",
    "Guard",
    "TrainingLog",
    "average_gradients",
    "complete",
    "connected_ranks",
    "fine_tune",
    "fit",
    "pretrain_belief_network",
    "pretrain_boltzmann_machine",
    "process_group",
    "ranks",
    "read_log",
    "same_start",
]
