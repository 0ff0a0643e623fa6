"""The bridge to Pyro: energies as distributions, models as energies, flows as guides."""

from pyroebm.ppl.distribution import Boltzmann, initial_states
from pyroebm.ppl.guide import FlowGuide
from pyroebm.ppl.kernel import PyroKernel
from pyroebm.ppl.model import ModelEnergy
from pyroebm.ppl.svi import flow_guide, flow_model

__all__ = [
    "Boltzmann",
    "FlowGuide",
    "ModelEnergy",
    "PyroKernel",
    "flow_guide",
    "flow_model",
    "initial_states",
]
