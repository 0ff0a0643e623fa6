"""What can be asked of a run: its draws, their statistics, ArviZ's tables and a verdict."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.infer.mcmc.util import select_samples
from torch import Tensor

from pyroebm import diagnostics
from pyroebm.block import Block, Layout, Plan
from pyroebm.record import Record
from pyroebm.stein import stein_residual
from pyroebm.streaming import StreamingMoments
from pyroebm.stuck import describe_stuck, stuck_chains
from pyroebm.views import Unconstrained, eval_mode

__all__ = ["Results", "named"]


def named(target: Unconstrained, site: str, x: Tensor) -> dict[str, Tensor]:
    """Unconstrained states ``(*batch, *event)`` as the variables that results show."""
    return target.energy.named(target.constrain(x), site)


def _joined(states: list[Any]) -> Any:
    parts = ([getattr(state, name) for state in states] for name in states[0]._fields)
    return type(states[0])(*(torch.cat(part) if isinstance(part[0], Tensor) else _joined(part) for part in parts))


class Results(AbstractMCMC):
    """The half of :class:`pyroebm.MCMC` that looks at a run; chains are in order over the blocks.

    Where blocks have been drawn to different lengths (a run that was interrupted), results are of the draws that all have.
    """

    num_chains: int
    seed: int
    site: str
    keep: str
    plan: Plan
    layout: Layout
    _blocks: list[Block]
    _target: Unconstrained

    @property
    def state(self) -> Any:
        """Where the chains stand: the states of all blocks as one.

        Raises:
            ValueError: if there was no run.
        """
        if not self._blocks:
            raise ValueError("nothing was drawn yet: call run(energy) first")
        return _joined([block.state for block in self._blocks])

    def _records(self, warmup: bool = False) -> list[Record]:
        if not self._blocks:
            raise ValueError("nothing was drawn yet: call run(energy) first")
        if self.keep == "moments":
            raise ValueError('keep="moments" keeps no draws: get_moments() has their means, variances and R-hat')
        if not warmup and min(block.count for block in self._blocks) == 0:
            raise ValueError(
                "the run ended before its first draw (its warm-up is in get_samples(warmup=True)): resume() or run(energy) again"
            )
        return [block.warmup if warmup else block.record for block in self._blocks]

    def _draws(self, warmup: bool = False) -> Tensor:
        records = self._records(warmup)
        common = min(record.count for record in records)
        return torch.cat([record.draws()[:, :common] for record in records])

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False, warmup: bool = False
    ) -> dict[str, Tensor]:
        """Draws in the energy's own space.

        Args:
            num_samples: so many, drawn again with replacement by torch's global generator (as in Pyro); None gives all.
            group_by_chain: keep the chain axis: ``(chains, draws, *event)``, else ``(chains * draws, *event)``.
            warmup: the warm-up's draws instead.
        """
        draws = self._draws(warmup)
        samples: dict[str, Tensor] = select_samples(named(self._target, self.site, draws), num_samples, group_by_chain)
        return samples

    def get_stats(self, warmup: bool = False) -> dict[str, Tensor]:
        """Statistics of each draw, ``(chains, draws)``: ``lp``, ``energy`` (the Hamiltonian), ``acceptance_rate``, ..."""
        records = self._records(warmup)
        common = min(record.count for record in records)
        stats = [record.stats() for record in records]
        return {name: torch.cat([each[name][:, :common] for each in stats]) for name in stats[0]}

    def get_moments(self) -> dict[str, StreamingMoments]:
        """Means, variances, R-hat and nested R-hat of each variable and statistic, of a run with ``keep="moments"``.

        Raises:
            ValueError: if nothing was drawn, or if the run keeps its draws.
        """
        kept = [block.moments for block in self._blocks]
        if not kept or not all(kept):
            raise ValueError(f'get_moments is for runs with keep="moments" that have draws, got keep={self.keep!r}')
        return {name: StreamingMoments.joined([each[name] for each in kept]) for name in kept[0]}

    def to_arviz(self) -> Any:
        """Draws and statistics, warm-up included, as ArviZ's InferenceData (DataTree from ArviZ 1.0 on)."""
        samples, stats = self.get_samples(group_by_chain=True), self.get_stats()
        warm = all(record.count for record in self._records(warmup=True))
        return diagnostics.to_arviz(
            samples,
            stats,
            self.get_samples(group_by_chain=True, warmup=True) if warm else None,
            self.get_stats(warmup=True) if warm else None,
            self._facts(),
        )

    def stuck_chains(self) -> list[int]:
        """Numbers of the chains (of this process) that never moved after warm-up; see :func:`pyroebm.stuck.stuck_chains`."""
        if not self._blocks:
            raise ValueError("nothing was drawn yet: call run(energy) first")
        moves, first = torch.cat([block.moves for block in self._blocks]), self.layout.chains(self.layout.blocks[0]).start
        return [first + chain for chain in stuck_chains(moves, min(block.count for block in self._blocks))]

    def _warn_of_stuck_chains(self, stacklevel: int) -> None:
        energies, first = self.state.energy, self.layout.chains(self.layout.blocks[0]).start
        stuck = [number - first for number in self.stuck_chains()]
        if said := describe_stuck(stuck, len(energies), energies, first, self.num_chains):
            warnings.warn(said, RuntimeWarning, stacklevel=stacklevel)

    def _facts(self) -> dict[str, Any]:
        facts = {"kernel": type(self.plan.kernel).__name__, "seed": str(self.seed), "thinning": self.plan.thinning}
        return facts | {"num_chains": self.num_chains, "chain_batch_size": self.layout.size}

    def summary(self, **options: Any) -> Any:
        """ArviZ's summary table (a DataFrame) of the draws; options go to ``arviz.summary``. Warns of chains that never moved."""
        self._warn_of_stuck_chains(stacklevel=3)
        return diagnostics.summary(self.to_arviz(), **options)

    def verdict(self, max_r_hat: float = 1.01, min_ess: float = 400.0) -> diagnostics.Verdict:
        """Whether the chains mixed, in plain words; see :func:`pyroebm.diagnostics.verdict`."""
        draws, kernel = self._draws(), self.plan.kernel
        with eval_mode(self._target):
            residual = float("nan") if kernel.discrete else stein_residual(self._target, draws)
        return diagnostics.verdict(draws, self.get_stats(), max_r_hat, min_ess, kernel, residual)

    def diagnostics(self) -> dict[str, Any]:
        """As Pyro's: effective sample size and R-hat of each site, divergences and acceptance rates of each chain."""
        samples, stats = self.get_samples(group_by_chain=True), self.get_stats()
        chains = [f"chain {c}" for c in range(len(stats["diverging"]))]
        return {
            **{
                site: {
                    "n_eff": torch.as_tensor(diagnostics.ess_bulk(draws)),
                    "r_hat": torch.as_tensor(diagnostics.r_hat(draws)),
                }
                for site, draws in samples.items()
            },
            "divergences": {name: row.nonzero().flatten().tolist() for name, row in zip(chains, stats["diverging"], strict=True)},
            "acceptance rate": {name: float(row.mean()) for name, row in zip(chains, stats["acceptance_rate"], strict=True)},
        }
