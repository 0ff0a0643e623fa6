"""Names of sites that ArviZ's containers cannot hold are refused before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest

from pyroebm import MALA, MCMC, ModelEnergy


def model(name: str) -> Callable[[], None]:
    def sites() -> None:
        pyro.sample(name, dist.Normal(0.0, 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    return sites


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", ["draw", "chain", "other_dim_0"])
def test_names_of_dimensions_are_refused(name: str, stored: bool, tmp_path: Any) -> None:
    mcmc = MCMC(MALA(), 5, 5, 2, seed=0, progress=False)
    store = tmp_path / "run" if stored else None
    with pytest.raises(ValueError, match=f"site '{name}' must not have the name of a dimension"):
        mcmc.run(ModelEnergy(model(name)), store=store)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_slash_is_refused_in_a_store(tmp_path: Any) -> None:
    mcmc = MCMC(MALA(), 5, 5, 2, seed=0, progress=False)
    with pytest.raises(ValueError, match="site 'a/b' must not have a slash in a run with a store"):
        mcmc.run(ModelEnergy(model("a/b")), store=tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    mcmc.run(ModelEnergy(model("a/b")))
    assert set(mcmc.get_samples()) == {"a/b", "other"}


@pytest.mark.parametrize("name", ["a_dim_0", "other_dim_1", "lp", "draws"])
def test_other_names_are_kept(name: str) -> None:
    mcmc = MCMC(MALA(), 5, 5, 2, seed=0, progress=False)
    mcmc.run(ModelEnergy(model(name)))
    assert set(mcmc.to_arviz().posterior.data_vars) == {name, "other"}
