"""Training of energies, flows and classifiers; pretraining, fine-tuning and imputation."""

from pyroebm.training.data import Batches
from pyroebm.training.distributed import (
    ProcessError,
    average_gradients,
    connected_ranks,
    process_group,
    ranks,
    same_start,
)
from pyroebm.training.finetuning import Classifier
from pyroebm.training.fit import fit, fit_steps
from pyroebm.training.guards import Guard, StepError
from pyroebm.training.history import History
from pyroebm.training.imputation import impute
from pyroebm.training.log import TrainingLog, read_log
from pyroebm.training.pretraining import pretrain_belief_network, pretrain_boltzmann_machine
from pyroebm.training.selection import TotalDimSelection, select_total_dim
from pyroebm.training.trainer import Step, Trainer

__all__ = [
    "Batches",
    "Classifier",
    "Guard",
    "History",
    "ProcessError",
    "Step",
    "StepError",
    "TotalDimSelection",
    "Trainer",
    "TrainingLog",
    "average_gradients",
    "connected_ranks",
    "fit",
    "fit_steps",
    "impute",
    "pretrain_belief_network",
    "pretrain_boltzmann_machine",
    "process_group",
    "ranks",
    "read_log",
    "same_start",
    "select_total_dim",
]
