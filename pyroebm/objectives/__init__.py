"""Objectives: losses that train an energy on data, or a flow on an energy."""

from pyroebm.objectives.adversarial import Adversarial, AdversarialFlow, DeepDirected
from pyroebm.objectives.base import HasLosses, Objective
from pyroebm.objectives.centering import Centering, Sparsity
from pyroebm.objectives.classification import CrossEntropy
from pyroebm.objectives.contrastive import ContrastiveDivergence
from pyroebm.objectives.denoising import DenoisingScoreMatching
from pyroebm.objectives.discrete import MinimumProbabilityFlow, Pseudolikelihood, RatioMatching
from pyroebm.objectives.fisher import fisher_divergence, sliced_fisher_divergence
from pyroebm.objectives.flow_contrastive import FlowContrastive
from pyroebm.objectives.hybrid import Hybrid
from pyroebm.objectives.improved import ImprovedCD
from pyroebm.objectives.likelihood import ExactLikelihood, MeanFieldLikelihood
from pyroebm.objectives.noise import gaussian_noise
from pyroebm.objectives.noise_contrastive import ConditionalNCE, NoiseContrastive, RankingNCE
from pyroebm.objectives.persistent import PersistentCD, ReplayBufferCD
from pyroebm.objectives.score_matching import NonNegativeScoreMatching, ScoreMatching
from pyroebm.objectives.short_run import ShortRun, langevin
from pyroebm.objectives.sliced import SlicedScoreMatching
from pyroebm.objectives.variational.base import FlowObjective
from pyroebm.objectives.variational.bootstrap import AlphaBootstrap
from pyroebm.objectives.variational.compiled_kl import CompiledKL
from pyroebm.objectives.variational.divergences import ForwardKL, LogVariance
from pyroebm.objectives.variational.flow_matching import match_flow
from pyroebm.objectives.variational.reverse_kl import ReverseKL, estimate_augmented_kl
from pyroebm.objectives.variational.reweighting import AnnealedReweighting
from pyroebm.objectives.variational.symmetric import SymmetrizedKL
from pyroebm.objectives.vera import VERA

__all__ = [
    "Adversarial",
    "AdversarialFlow",
    "AlphaBootstrap",
    "AnnealedReweighting",
    "Centering",
    "CompiledKL",
    "ConditionalNCE",
    "ContrastiveDivergence",
    "CrossEntropy",
    "DeepDirected",
    "DenoisingScoreMatching",
    "ExactLikelihood",
    "FlowContrastive",
    "FlowObjective",
    "ForwardKL",
    "HasLosses",
    "Hybrid",
    "ImprovedCD",
    "LogVariance",
    "MeanFieldLikelihood",
    "MinimumProbabilityFlow",
    "NoiseContrastive",
    "NonNegativeScoreMatching",
    "Objective",
    "PersistentCD",
    "ReplayBufferCD",
    "Pseudolikelihood",
    "RankingNCE",
    "RatioMatching",
    "ReverseKL",
    "ScoreMatching",
    "ShortRun",
    "SlicedScoreMatching",
    "Sparsity",
    "SymmetrizedKL",
    "VERA",
    "estimate_augmented_kl",
    "fisher_divergence",
    "gaussian_noise",
    "langevin",
    "match_flow",
    "sliced_fisher_divergence",
]
