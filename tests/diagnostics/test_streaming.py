"""Streaming moments against the same statistics of draws that were kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lib.checks import within_se
from lib.counted import Counted, Stops
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyroebm import MALA, MCMC
from pyroebm.core.statistics import arviz
from pyroebm.diagnostics import StreamingMoments
from pyroebm.targets import Exponential


def autoregression(chains: int, draws: int, phi: float = 0.6, seed: int = 0) -> Tensor:
    """Chains of two entries, variance 1 and mean 1000, with starting states far apart."""
    noise = torch.randn(
        chains, draws, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    x = noise.clone()
    x[:, 0] *= 5.0
    for t in range(1, draws):
        x[:, t] = phi * x[:, t - 1] + (1 - phi**2) ** 0.5 * noise[:, t]
    return 1000.0 + x


def streamed(x: Tensor) -> StreamingMoments:
    moments = StreamingMoments.start(x[:, 0])
    for draw in x.unbind(1):
        moments = moments.update(draw)
    return moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_the_draws(dtype: torch.dtype) -> None:
    x = autoregression(12, 50).to(dtype)
    moments, x = streamed(x), x.double()
    torch.testing.assert_close(moments.mean, x.mean(1))
    torch.testing.assert_close(moments.squares, x.var(1) * 49, rtol=1e-9, atol=0)
    torch.testing.assert_close(moments.means(), x.mean((0, 1)))
    torch.testing.assert_close(
        moments.variances(), x.var((0, 1), unbiased=False), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(moments.draws, torch.full((12,), 50.0, dtype=torch.float64))
    halves = StreamingMoments.joined([streamed(x[:5]), streamed(x[5:])])
    torch.testing.assert_close(halves.squares, moments.squares, rtol=1e-6, atol=0)


def test_r_hat_is_arvizs_of_chains_neither_split_nor_ranked() -> None:
    x = autoregression(12, 20)
    theirs = [float(arviz().rhat(x[..., k].numpy(), method="identity")) for k in range(2)]
    np.testing.assert_allclose(streamed(x).r_hat().numpy(), theirs, rtol=1e-9)


def direct_nested(x: Tensor, superchains: int) -> Tensor:
    """The paper's definition, sum by sum."""
    chains, draws = x.shape[:2]
    each = chains // superchains
    means, withins = [], []
    for k in range(superchains):
        members = [x[k * each + m] for m in range(each)]
        own = [member.sum(0) / draws for member in members]
        mean = sum(own) / each
        between = sum((a - mean) ** 2 for a in own) / (each - 1) if each > 1 else torch.zeros(2)
        inner = (
            sum(
                ((member - a) ** 2).sum(0) / (draws - 1)
                for member, a in zip(members, own, strict=True)
            )
            / each
        )
        means.append(mean)
        withins.append(between + inner)
    grand = sum(means) / superchains
    b = sum((mean - grand) ** 2 for mean in means) / (superchains - 1)
    return torch.sqrt(1 + b / (sum(withins) / superchains))


@pytest.mark.parametrize("superchains", [2, 4, 12])
def test_nested_r_hat_is_that_of_the_paper(superchains: int) -> None:
    x = autoregression(12, 20)
    torch.testing.assert_close(
        streamed(x).nested_r_hat(superchains), direct_nested(x, superchains), rtol=1e-9, atol=0
    )


def test_nested_r_hat_of_single_chains_is_r_hat_up_to_one_draw() -> None:
    x = autoregression(12, 20)
    theirs = torch.tensor(
        [float(arviz().rhat(x[..., k].numpy(), method="identity")) for k in range(2)]
    ).double()
    torch.testing.assert_close(
        streamed(x).nested_r_hat(12), torch.sqrt(theirs**2 + 1 / 20), rtol=1e-6, atol=0
    )
    for bad in (1, 5, 24):
        with pytest.raises(
            ValueError, match="superchains must be at least 2 and divide the 12 chains"
        ):
            streamed(x).nested_r_hat(bad)


def test_short_chains_from_few_points_mix_for_the_nested_and_not_for_the_plain() -> None:
    """What it is for: 1,024 chains of 5 draws, converged, but each too short for the plain R-hat to
    say so."""
    x = torch.randn(
        1024, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ) + 0.5 * autoregression(1024, 5)
    moments = streamed(x)
    assert float(moments.r_hat().min()) > 1.5
    assert float(moments.nested_r_hat(8).max()) < 1.02
    apart = x + 3.0 * torch.arange(8.0).repeat_interleave(128).reshape(-1, 1, 1)
    assert float(streamed(apart).nested_r_hat(8).min()) > 2


def test_errors_know_of_autocorrelation() -> None:
    """Effective draws of an autoregression: n (1 - phi) / (1 + phi)."""
    phi = 0.6
    chains = 2000
    draws = 100
    x = autoregression(chains, draws + 20, phi)[:, 20:]
    moments = streamed(x)
    truth = (
        chains
        * draws
        / ((1 + phi) / (1 - phi) - 2 * phi * (1 - phi**draws) / (draws * (1 - phi) ** 2))
    )
    within_se(moments.ess(), torch.full((2,), truth), torch.full((2,), truth * (2 / chains) ** 0.5))
    within_se(moments.means(), torch.full((2,), 1000.0), moments.mcse())


def test_a_run_that_keeps_moments_keeps_no_draw_and_has_the_same_ones(tmp_path: Path) -> None:
    settings = {
        "num_samples": 30,
        "warmup_steps": 20,
        "num_chains": 10,
        "seed": 0,
        "chain_batch_size": 4,
    }
    kept, lean = MCMC(MALA(), **settings), MCMC(MALA(), keep="moments", **settings)  # type: ignore[arg-type]
    kept.run(Exponential(2.0).double())
    lean.run(Exponential(2.0).double())
    x = kept.get_samples(group_by_chain=True)["x"]
    stats = kept.get_stats()
    moments = lean.get_moments()
    torch.testing.assert_close(moments["x"].mean, x.mean(1))
    torch.testing.assert_close(moments["x"].variances(), x.var((0, 1), unbiased=False))
    for name in ("lp", "acceptance_rate", "diverging", "n_steps"):
        torch.testing.assert_close(moments[name].mean, stats[name].double().mean(1))
    assert all(block.record.x.numel() == block.warmup.x.numel() == 0 for block in lean._batches)
    with pytest.raises(ValueError, match='keep="moments" keeps no draws'):
        lean.get_samples()
    with pytest.raises(ValueError, match='get_moments requires a run with keep="moments"'):
        kept.get_moments()
    with pytest.raises(ValueError, match="keep must be"):
        MCMC(MALA(), 5, keep="means")  # type: ignore[arg-type]


def test_moments_are_resumed_too(tmp_path: Path) -> None:
    def lean() -> MCMC:
        return Counted(MALA(), 30, 20, num_chains=6, seed=0, chain_batch_size=4, keep="moments")

    whole = lean()
    broken = lean()
    other = lean()
    counted = Stops()
    whole.run(counted)
    with pytest.warns(RuntimeWarning, match="interrupted during sampling"):
        broken.run(Stops(counted.calls - 30), store=tmp_path / "run")
    save_file(broken.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"), Stops())
    again = lean()
    again.resume(Stops(), tmp_path / "run")
    other.resume()
    for mcmc in (other, again):
        for name, moments in whole.get_moments().items():
            assert all(
                torch.equal(a, b) for a, b in zip(moments, mcmc.get_moments()[name], strict=True)
            )


def test_one_draw_of_each_chain_has_the_moments_of_the_definition() -> None:
    """Variances within chains are 0: between chains of a superchain is all there is."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = StreamingMoments.start(x).update(x)
    torch.testing.assert_close(moments.variances(), x.var(0, unbiased=False))
    torch.testing.assert_close(moments.mcse(), x.std(0) / 8.0)
    super_means = x.reshape(8, 8, 3).mean(1)
    within = x.reshape(8, 8, 3).var(1).mean(0)
    expected = torch.sqrt(1.0 + super_means.var(0) / within)
    torch.testing.assert_close(moments.nested_r_hat(8), expected)
    assert bool(moments.r_hat().isnan().all())  # which has no variance within
    more = moments.update(x + 1.0)
    torch.testing.assert_close(more.variances(), torch.cat([x, x + 1.0]).var(0, unbiased=False))
