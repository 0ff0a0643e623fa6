"""Energies of the systems that the field works with."""

from pyroebm.energies.lattice import Ising, Potts

__all__ = ["Ising", "Potts"]
