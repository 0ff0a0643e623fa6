"""``pyroebm zoo``; it exits with 1 if a verification or a file fails, and with 2 on wrong usage."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["Export", "List", "Sample", "Show", "Verify", "run_zoo"]

#: Number of chains where an entry has no exact draws.
NUM_CHAINS = 4

Name = Annotated[str, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class List:
    """List the entries.

    Args:
        pattern: of their names, such as "rbm*".
    """

    pattern: Annotated[str, tyro.conf.Positional] = "*"

    def run(self) -> int:
        """Print names and titles; return 1 if none matches."""
        from pyroebm import zoo

        names = zoo.list(self.pattern)
        for name in names:
            print(f"{name:<26} {zoo.card(name).title}")
        if not names:
            print(f"no entry matches {self.pattern!r}", file=sys.stderr)
        return 0 if names else 1


@dataclasses.dataclass(frozen=True)
class Show:
    """Show the card of an entry.

    Args:
        name: of the entry, or a folder that export wrote.
    """

    name: Name

    def run(self) -> int:
        """Print the card."""
        from pyroebm import zoo

        print(zoo.card_markdown(zoo.card(self.name)))
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compute the numbers of an entry's card again and compare them.

    Args:
        name: of the entry, or a folder that export wrote.
        data: path of data that does not come with the package, such as MNIST.
        seed: of all random numbers.
    """

    name: Name
    data: Path | None = None
    seed: int = 1

    def run(self) -> int:
        """Print the comparison; return 1 if a number fails."""
        from pyroebm import zoo
        from pyroebm.core import seeded_generator

        found = zoo.verify(self.name, data=self.data, generator=seeded_generator(self.seed))
        print(found)
        return 0 if found.passed else 1


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw from an entry, and write an .npz file with the array "draws".

    Draws are exact where the entry has exact draws, else those of Markov chains: NUTS, or Gibbs
    sampling for discrete states.

    Args:
        name: of the entry, or a folder that export wrote.
        out: the file.
        num_samples: number of draws.
        warmup_steps: number of warm-up steps of chains.
        seed: of all random numbers.
        progress: show progress; by default after one second.
    """

    name: Name
    out: Path = Path("draws.npz")
    num_samples: int = 1000
    warmup_steps: int = 1000
    seed: int = 0
    progress: bool | None = None

    def run(self) -> int:
        """Write the draws."""
        from pyroebm import MCMC, NUTS, Gibbs, zoo
        from pyroebm.core import seeded_generator
        from pyroebm.core.files import write_arrays
        from pyroebm.core.supports import is_discrete

        energy = zoo.target(self.name)
        if energy.has_exact_draws:
            draws = energy.sample(self.num_samples, seeded_generator(self.seed))
        else:
            mcmc = MCMC(
                Gibbs() if is_discrete(energy.support) else NUTS(),
                num_samples=-(-self.num_samples // NUM_CHAINS),
                warmup_steps=self.warmup_steps,
                num_chains=NUM_CHAINS,
                seed=self.seed,
                progress=self.progress,
            )
            mcmc.run(energy)
            print(mcmc.diagnose(), file=sys.stderr)
            draws = mcmc.get_samples()["x"][: self.num_samples]
        write_arrays(self.out, {"draws": draws.numpy()})
        print(f"{self.out}: draws of shape {tuple(draws.shape)}")
        return 0


@dataclasses.dataclass(frozen=True)
class Export:
    """Write an entry as a folder in the form of Hugging Face.

    Args:
        name: of the entry.
        folder: written to; it must be empty or not exist.
    """

    name: Name
    folder: Annotated[Path, tyro.conf.Positional]

    def run(self) -> int:
        """Write the folder."""
        from pyroebm import zoo

        print(zoo.export(self.name, self.folder))
        return 0


def run_zoo(
    action: Annotated[List | Show | Verify | Sample | Export, tyro.conf.arg(name="")],
) -> None:
    """List, show, verify, sample and export the trained models that ship with the package."""
    from pyroebm.core.files import FileError

    try:
        code = action.run()
    except (FileError, OSError) as error:
        print(error, file=sys.stderr)
        code = 1
    except ValueError as error:
        print(error, file=sys.stderr)
        code = 2
    sys.exit(code)
