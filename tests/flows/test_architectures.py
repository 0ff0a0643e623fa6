"""What is particular to each architecture of flows: bases, symmetry, zuko's layers inside stock
Pyro, and mutants of all three.

The property tests that every transform and flow inherits are in test_flows.py.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from lib.checks import mean_and_se, within_se
from lib.flow_cases import noise, stirred
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor, nn
from torch.distributions.transforms import ComposeTransform

from pyroebm import Energy
from pyroebm.core.rng import seeded_generator
from pyroebm.flows import (
    NICE,
    AffineCoupling,
    AutoregressiveFlow,
    ContinuousFlow,
    Flow,
    Loft,
    MixtureBase,
    Permutation,
    PLULinear,
    RealNVP,
    RedundantNICE,
    SplineFlow,
    StandardNormal,
    StudentBase,
    Symmetrized,
    ZukoTransform,
    generated_group,
    importance_sample,
    permutations,
    sign_flips,
)
from pyroebm.flows.affine import coupling_mask
from pyroebm.flows.groups import multiplication_table
from pyroebm.objectives import ReverseKL, SymmetrizedKL
from pyroebm.objectives.variational.reverse_kl import kl_summands
from pyroebm.targets import Gaussian
from pyroebm.training import fit

F64 = torch.float64
CPU = torch.device("cpu")
M = TypeVar("M", bound=nn.Module)


# --------------------------------------------------------------------------------------------------
# Affine couplings, permutations, LOFT


def test_no_layer_stretches_by_more_than_the_clamp() -> None:
    layer = stirred(AffineCoupling(4, hidden_sizes=(8,), dtype=F64), scale=30.0)
    log_det = layer.with_log_det(10.0 * noise(200, 4))[1].detach()
    assert float(log_det.abs().max()) <= 2 * 2.0 + 1e-12
    assert float(log_det.abs().max()) > 2.0  # it is reached
    gentle = AffineCoupling(2, nn.Linear(1, 2).double())
    nn.init.constant_(gentle.net.bias, 1e-3)  # small scales are not changed
    s = gentle.net(z := torch.zeros(1, dtype=F64))[0]
    torch.testing.assert_close(gentle.with_log_det(torch.cat((z, z)))[1], s, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Linear(2, 3), r"\(4, 6\) and torch.float64, but it gave \(4, 3\)"),
        # would broadcast, and report a third of the log-determinant
        (nn.Linear(2, 2), r"but it gave \(4, 2\)"),
    ],
)
def test_affine_coupling_refuses_a_net_that_would_broadcast(net: nn.Module, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AffineCoupling(5, net.double())(noise(4, 5))
    with pytest.raises(ValueError, match=r"but it gave .* torch.float32"):
        AffineCoupling(5, nn.Sequential(_Single(), nn.Linear(2, 6)))(noise(4, 5))


class _Single(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_every_entry_of_a_realnvp_depends_on_every_other_and_without_shuffles_some_do_not() -> None:
    flow = stirred(RealNVP(6, 6, (16,), dtype=F64))
    jacobian = torch.autograd.functional.jacobian(
        lambda z: flow.forward_and_log_prob(z)[0], noise(6)
    )
    assert bool((jacobian.abs() > 1e-6).all())
    # two couplings without permutation: what passed first has seen no neighbour of its own half
    pair = [
        stirred(AffineCoupling(6, hidden_sizes=(16,), mask=mask, dtype=F64))
        for mask in (torch.arange(6) >= 3, torch.arange(6) < 3)
    ]
    jacobian = torch.autograd.functional.jacobian(
        lambda z: Flow(pair, 6, 6).forward_and_log_prob(z)[0], noise(6)
    )
    assert bool((jacobian[:3, :3][~torch.eye(3, dtype=torch.bool)] == 0).all())


def test_loft_is_the_identity_inside_and_logarithmic_outside() -> None:
    layer = Loft(3, threshold=2.0)
    z = torch.tensor([1.5, -2.0, 2.0 + math.e - 1.0], dtype=F64)
    torch.testing.assert_close(layer(z), torch.tensor([1.5, -2.0, 3.0], dtype=F64))
    torch.testing.assert_close(layer.with_log_det(z)[1], torch.tensor(-1.0, dtype=F64))
    assert bool(layer(torch.tensor([math.nan, 1.0, 1.0])).isnan()[0])
    wide = Flow([PLULinear(torch.tensor([[50.0]], dtype=F64)), Loft(1, 4.0)], 1, 1)
    assert float(
        wide.forward_and_log_prob(wide.rsample_base(1000, seeded_generator(0)))[0]
        .detach()
        .abs()
        .max()
    ) < 4.0 + math.log(400.0)


def test_loft_has_the_slope_of_its_identity_at_the_threshold() -> None:
    """Both pieces meet there with slope 1, and the log-determinant leaves 0 with slope 0 on the
    side of the identity."""
    z = torch.tensor([-2.0, 2.0, -3.0, 3.0], dtype=F64, requires_grad=True)
    for there in (Loft(4, threshold=2.0).with_log_det, Loft(4, threshold=2.0).inverse_with_log_det):
        x, log_det = there(z)
        slopes = torch.autograd.grad(x.sum(), z, retain_graph=True)[0]
        assert slopes[:2].tolist() == [1.0, 1.0]
        assert float(slopes.log().sum()) == pytest.approx(2 * float(slopes[2].log()))
        assert torch.autograd.grad(log_det, z)[0][:2].tolist() == [0.0, 0.0]


def test_refusals_of_layers() -> None:
    with pytest.raises(ValueError, match=r"dim must be at least 2.*dim=1"):
        AffineCoupling(1)
    with pytest.raises(
        ValueError, match=r"some True .* got dtype torch.bool, shape \(2,\) and 2 True"
    ):
        coupling_mask(2, [True, True])
    with pytest.raises(ValueError, match=r"permutation .* got order=\[0, 0\]"):
        Permutation([0, 0])
    with pytest.raises(ValueError, match="threshold=-1"):
        Loft(2, -1.0)
    with pytest.raises(ValueError, match="dim=0"):
        Loft(0)
    with pytest.raises(ValueError, match="dim=3, total_dim=2"):
        RealNVP(3, total_dim=2)
    with pytest.raises(ValueError, match=r"scale must be positive, got scale=0"):
        RealNVP(2, scale=0.0)
    with pytest.raises(
        ValueError, match=r"StandardNormal must be of total_dim=2 entries, got dim=3"
    ):
        NICE(2, base=StandardNormal(3))
    with pytest.raises(ValueError, match=r"Loft must be of total_dim=2 entries, got dim=3"):
        Flow([Loft(3)], 2, 2)
    with pytest.raises(
        ValueError, match=r"the same dtype, got \['torch.float32', 'torch.float64'\]"
    ):
        NICE(2, base=MixtureBase(2, 2, dtype=F64), dtype=torch.float32)


@pytest.mark.parametrize("make", [RealNVP, SplineFlow, AutoregressiveFlow, ContinuousFlow])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_fresh_flow_is_its_base_scaled(make: Callable[..., Flow], scale: float) -> None:
    flow = make(3, scale=scale, dtype=F64)
    z = noise(5, 3)
    torch.testing.assert_close(flow.forward_and_log_prob(z)[0], scale * z)
    torch.testing.assert_close(
        flow.forward_and_log_prob(z)[1], StandardNormal(3).log_prob(z) - 3 * math.log(scale)
    )


# --------------------------------------------------------------------------------------------------
# Bases


def mixture(learn_weights: bool = True) -> MixtureBase:
    base = MixtureBase(2, 3, learn_weights=learn_weights, dtype=F64)
    with torch.no_grad():
        base.loc.copy_(torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.5]]))
        base.log_scale.copy_(torch.tensor([[0.0, -0.3], [-0.5, 0.2], [0.1, 0.0]]))
        if learn_weights:
            base.logits.copy_(torch.tensor([0.4, -0.3, 0.0]))
    return base


def statistic(z: Tensor) -> Tensor:
    return (0.8 * z[..., 0] + 0.3).sin() * z[..., 1] + 0.2 * z.square().sum(-1)


def gradient_by_grid(base: Any, half: float, points: int) -> list[Tensor]:
    axis = torch.linspace(-half, half, points, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    value = (base.log_prob(grid).exp() * statistic(grid)).sum() * float(axis[1] - axis[0]) ** 2
    return list(torch.autograd.grad(value, list(base.parameters())))


def gradient_by_draws(base: Any, repeats: int = 200, n: int = 500) -> list[tuple[Any, Any]]:
    generator = seeded_generator(3)
    rows = [
        torch.autograd.grad(
            statistic(base.rsample(n, F64, CPU, generator)).mean(), list(base.parameters())
        )
        for _ in range(repeats)
    ]
    return [mean_and_se(torch.stack(column)) for column in zip(*rows, strict=True)]


def check_draws_carry_the_gradient(base: Any, half: float = 9.0, points: int = 301) -> None:
    for (mean, se), truth in zip(
        gradient_by_draws(base), gradient_by_grid(base, half, points), strict=True
    ):
        within_se(mean, truth, se)


@pytest.mark.parametrize("learn_weights", [True, False])
def test_draws_of_a_mixture_carry_the_gradient_of_all_its_parameters(learn_weights: bool) -> None:
    base = mixture(learn_weights)
    assert len(list(base.parameters())) == 2 + learn_weights
    check_draws_carry_the_gradient(base)


def test_draws_of_a_student_carry_the_gradient_in_the_degrees_of_freedom() -> None:
    check_draws_carry_the_gradient(StudentBase(2, df=9.0, dtype=F64), half=60.0, points=1501)


class _WithoutImplicitPart(MixtureBase):
    def _moved_by_weights(self, z: Tensor) -> Tensor:
        return z + 0.0 * self.logits.sum()


class _IgnoringEarlierEntries(MixtureBase):
    def _moved_by_weights(self, z: Tensor) -> Tensor:
        columns = []
        for i in range(self.dim):
            loc, scale = self.loc[:, i].detach(), self.log_scale[:, i].detach().exp()
            distribution = dist.Normal(loc, scale)
            below = (self.weights * distribution.cdf(z[:, i : i + 1])).sum(-1)
            density = (self.weights * distribution.log_prob(z[:, i : i + 1]).exp()).sum(-1).detach()
            columns.append(z[:, i] - (below - below.detach()) / density)
        return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("mutant", [_WithoutImplicitPart, _IgnoringEarlierEntries])
def test_mutants_of_the_mixture_are_caught(mutant: type[MixtureBase]) -> None:
    base = mixture()
    base.__class__ = mutant
    with pytest.raises(AssertionError, match="standard error"):
        check_draws_carry_the_gradient(base)


@pytest.mark.parametrize(
    ("base", "half"),
    [(mixture(), 9.0), (StudentBase(2, df=9.0, dtype=F64), 40.0)],
    ids=["mixture", "student"],
)
def test_draws_of_a_base_have_its_density(base: Any, half: float) -> None:
    z = base.rsample(40_000, F64, CPU, seeded_generator(1)).detach()
    axis = torch.linspace(-half, half, 801, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    density = base.log_prob(grid).exp().detach() * float(axis[1] - axis[0]) ** 2
    for f in (lambda z: z, torch.square, lambda z: z[:, :1] * z[:, 1:], lambda z: (z - 0.3).tanh()):
        mean, se = mean_and_se(f(z))
        truth = (density.unsqueeze(-1) * f(grid)).sum(0)
        within_se(mean, truth, se)
    assert torch.equal(z, base.rsample(40_000, F64, CPU, seeded_generator(1)))
    before = torch.get_rng_state()
    base.rsample(10, F64, CPU, seeded_generator(2))
    assert torch.equal(before, torch.get_rng_state())


def test_fixed_weights_and_degrees_stay_and_bases_refuse() -> None:
    assert [name for name, _ in mixture(False).named_parameters()] == ["loc", "log_scale"]
    assert not list(StudentBase(2, learn_df=False).parameters())
    torch.testing.assert_close(
        StudentBase(2, df=2.5, dtype=F64).df.detach(), torch.full((2,), 2.5, dtype=F64)
    )
    torch.testing.assert_close(
        StudentBase(1, df=400.0, dtype=F64).df.detach(), torch.full((1,), 400.0, dtype=F64)
    )
    with pytest.raises(ValueError, match=r"df must be above 2 and finite, got df=1\.5"):
        StudentBase(2, df=1.5)
    with pytest.raises(
        ValueError, match=r"num_components must be an integer of at least 1, got num_components=0"
    ):
        MixtureBase(2, 0)
    with pytest.raises(ValueError, match="spread=-1"):
        MixtureBase(2, 2, spread=-1.0)
    for make in (NICE, lambda d, base: RedundantNICE(1, d, base=base)):
        with pytest.raises(
            NotImplementedError, match=r"standard normal base alone, got MixtureBase"
        ):
            make(2, base=MixtureBase(2, 2)).joint_entropy()


def test_a_student_base_reaches_a_heavy_tail_that_a_normal_one_does_not() -> None:
    class Heavy(Energy):
        def forward(self, x: Tensor) -> Tensor:
            return -dist.StudentT(torch.tensor(4.0, dtype=F64)).log_prob(x).sum(-1)

    energy = Heavy((1,)).double()
    found = {}
    for name, base in (("normal", None), ("student", StudentBase(1, df=8.0, dtype=F64))):
        flow = NICE(1, base=base, dtype=F64)
        fit(flow, ReverseKL(energy, 128), num_steps=150, lr=5e-2, seed=1)
        found[name] = flow
    x = torch.tensor([[0.0], [60.0]], dtype=F64)
    # of the log weight
    grows = {
        name: float((-energy(x) - flow.log_prob(x)).diff().detach()) for name, flow in found.items()
    }
    assert grows["student"] < 10.0 < 100.0 < grows["normal"]
    result = importance_sample(found["student"], energy, 20_000)
    assert result.pareto_k < 0.7
    within_se(result.log_z.value, 0.0, result.log_z.standard_error)


# --------------------------------------------------------------------------------------------------
# Symmetry


GROUPS: dict[str, Tensor] = {
    "one flip": sign_flips(2, entries=[1]),
    "all flips": sign_flips(2),
    "inversion": sign_flips(2, jointly=True),
    "exchange": permutations(2),
    "quarter turns": generated_group(torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])),
    "dihedral": generated_group(
        torch.tensor([[[0.0, -1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]]])
    ),
    "third turns": generated_group(
        torch.tensor([[[-0.5, -math.sqrt(0.75)], [math.sqrt(0.75), -0.5]]], dtype=F64)
    ),
}
groups = pytest.mark.parametrize("name", GROUPS)


def two_dimensional(
    name: str, weights: str = "uniform", scale: float = 0.5
) -> tuple[Symmetrized, RealNVP]:
    inner = stirred(RealNVP(2, 2, (8,), dtype=F64), scale=scale)
    flow = Symmetrized(inner, GROUPS[name], weights)
    if flow.logits is not None:
        with torch.no_grad():
            flow.logits.copy_(noise(len(flow.logits), seed=3))
    return flow, inner


def check_density_is_the_sum(flow: Symmetrized, inner: Flow, xy: Tensor) -> None:
    """Against the sum over the group written out with inverses of matrices."""
    d, parts = flow.dim, []
    for log_pi, g in zip(flow.log_weights(), flow.elements, strict=True):
        pulled = torch.cat((xy[..., :d] @ torch.linalg.inv(g).T, xy[..., d:]), dim=-1)
        parts.append(log_pi + inner.log_prob(pulled))
    torch.testing.assert_close(
        flow.log_prob(xy), torch.stack(parts).logsumexp(0), rtol=1e-9, atol=1e-9
    )
    pushed, log_q = flow.forward_and_log_prob(flow.rsample_base(50, seeded_generator(4)))
    torch.testing.assert_close(log_q, flow.log_prob(pushed), rtol=1e-9, atol=1e-9)


@groups
@pytest.mark.parametrize("weights", ["uniform", "learned"])
def test_symmetrised_density_is_the_sum_over_the_group(name: str, weights: str) -> None:
    flow, inner = two_dimensional(name, weights)
    check_density_is_the_sum(flow, inner, noise(6, 2))
    counts = (flow.log_weights().exp() * 20_000).detach()
    z = flow.rsample_base(20_000, seeded_generator(5))
    x, x0 = flow.forward_and_log_prob(z)[0], inner.forward_and_log_prob(z[:, :-1])[0]
    hits = torch.stack([((x0 @ g.T - x).abs().amax(-1) < 1e-9).sum() for g in flow.elements])
    within_se(hits.double(), counts, counts.sqrt())


@groups
def test_uniform_weights_are_invariant(name: str) -> None:
    flow, inner = two_dimensional(name)
    x = noise(6, 2)
    for g in flow.elements:
        torch.testing.assert_close(flow.log_prob(x @ g.T), flow.log_prob(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(inner.log_prob(x @ flow.elements[-1].T), inner.log_prob(x))


def test_latents_stay_where_they_are_and_everything_else_works_on_a_symmetrised_flow() -> None:
    # near the target: the weights have a variance
    inner = stirred(RedundantNICE(2, 3, 2, (8,), dtype=F64), scale=0.05)
    flow = Symmetrized(inner, permutations(2))
    check_density_is_the_sum(flow, inner, noise(5, 3))
    energy = Gaussian(torch.zeros(2, dtype=F64), dtype=F64)
    result = importance_sample(flow, energy, 20_000)
    assert energy.log_z is not None
    within_se(result.log_z.value, energy.log_z, result.log_z.standard_error)
    x = noise(4, 2)
    torch.testing.assert_close(
        flow.log_prob_x(x), flow.log_prob_x(x.flip(-1)), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(flow.path_log_prob(noise(4, 3)), flow.log_prob(noise(4, 3)).detach())


@pytest.mark.parametrize("weights", ["uniform", "learned"])
def test_summed_terms_have_the_mean_of_pushed_ones_and_less_noise(weights: str) -> None:
    flow, _ = two_dimensional("dihedral", weights)
    energy, z = (
        Gaussian(torch.ones(2, dtype=F64), dtype=F64),
        flow.rsample_base(20_000, seeded_generator(1)),
    )
    with torch.no_grad():
        summed, single = flow.terms(energy, z)[0], kl_summands(flow, energy, z)[0]
    # what the choice of an image adds: of mean 0 given z, so that variances add
    chosen = single - summed
    for noise_of in (chosen, chosen * (summed - summed.mean())):
        mean, se = mean_and_se(noise_of)
        within_se(mean, 0.0, se)
    assert float(chosen.std()) > 0.01 * float(single.std())


def test_summed_terms_give_the_weights_their_gradient_and_pushes_none() -> None:
    flow, _ = two_dimensional("all flips", "learned", scale=0.1)
    assert flow.logits is not None
    energy = Gaussian(torch.tensor([1.0, 0.5], dtype=F64), dtype=F64)
    axis = torch.linspace(-14.0, 14.0, 561, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    log_q = flow.log_prob(grid)
    kl = (log_q.exp() * (log_q + energy(grid))).sum() * float(axis[1] - axis[0]) ** 2
    truth = torch.autograd.grad(kl, flow.logits)[0]
    rows = []
    for seed in range(100):
        loss, _ = SymmetrizedKL(energy, 200)(flow, generator=seeded_generator(seed))
        rows.append(torch.autograd.grad(loss, flow.logits)[0])
    within_se(*_against(torch.stack(rows), truth))
    loss, _ = ReverseKL(energy, 50, gradient="total")(flow)
    assert torch.autograd.grad(loss, flow.logits, allow_unused=True)[0] is None
    assert not flow().has_rsample
    with pytest.raises(ValueError, match="flow must be Symmetrized, got NICE"):
        SymmetrizedKL(energy)(NICE(2, dtype=F64))


def _against(rows: Tensor, truth: Tensor) -> tuple[Any, Tensor, Any]:
    mean, se = mean_and_se(rows)
    return mean, truth, se


class TwoWells(Energy):
    """Masses 0.8 and 0.2 at -2 and 2."""

    def forward(self, x: Tensor) -> Tensor:
        distribution = dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.8, 0.2], dtype=F64)),
            dist.Normal(torch.tensor([-2.0, 2.0], dtype=F64), torch.tensor(0.5, dtype=F64)),
        )
        return -distribution.log_prob(x.squeeze(-1))


def test_learned_weights_find_unequal_masses() -> None:
    flow, energy = (
        Symmetrized(NICE(1, dtype=F64), sign_flips(1), "learned"),
        TwoWells((1,)).double(),
    )
    fit(flow, SymmetrizedKL(energy, 128), num_steps=400, lr=3e-2)
    assert abs(float(flow.log_weights().detach().exp().max()) - 0.8) < 0.01
    assert importance_sample(flow, energy, 5000).ess_fraction > 0.99


def test_groups_are_refused_unless_whole() -> None:
    with pytest.raises(ValueError, match=r"every product .* generated_group\(\) completes it"):
        Symmetrized(NICE(3), permutations(3)[:4])
    with pytest.raises(ValueError, match="every product"):
        Symmetrized(NICE(1), 2.0 * torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match=r"dim=3 entries of x, got shape \(2, 2, 2\)"):
        Symmetrized(NICE(3), permutations(2))
    with pytest.raises(ValueError, match="at most 5040 elements"):
        permutations(8)
    with pytest.raises(ValueError, match="at most 5040 elements"):
        sign_flips(13)
    with pytest.raises(ValueError, match=r"at most 5040 elements.* at least 5041"):
        generated_group(torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]))
    with pytest.raises(ValueError, match=r"maps must have shape \(G, d, d\)"):
        generated_group(torch.eye(2))
    with pytest.raises(ValueError, match=r"entries=\(2,\)"):
        sign_flips(2, [2])
    with pytest.raises(ValueError, match="weights='equal'"):
        Symmetrized(NICE(2), sign_flips(2), "equal")
    with pytest.raises(ValueError, match="Symmetrized already"):
        Symmetrized(Symmetrized(NICE(2), sign_flips(2)), permutations(2))


def test_groups_have_their_sizes() -> None:
    assert {name: len(group) for name, group in GROUPS.items()} == {
        "one flip": 2,
        "all flips": 4,
        "inversion": 2,
        "exchange": 2,
        "quarter turns": 4,
        "dihedral": 8,
        "third turns": 3,
    }
    assert len(permutations(4)) == 24
    swapped = permutations(2, num_coordinates=2)[1] @ torch.arange(4.0)
    assert swapped.tolist() == [2.0, 3.0, 0.0, 1.0]
    table = multiplication_table(permutations(3))
    assert all(sorted(row) == list(range(6)) for row in table.tolist())


class _WrongWay(Symmetrized):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quotients = self.quotients.T.contiguous()


class _OneShort(Symmetrized):
    def _log_density(self, xy: Tensor, log_q: Tensor, g: Tensor, log_pi: Tensor) -> Tensor:
        return (log_q.unsqueeze(-1) + log_pi[g]).expand(g.shape)


@pytest.mark.parametrize("mutant", [_WrongWay, _OneShort])
def test_mutants_of_the_sum_over_the_group_are_caught(mutant: type[Symmetrized]) -> None:
    inner = stirred(RealNVP(2, 2, (8,), dtype=F64), scale=0.5)
    flow = mutant(inner, GROUPS["dihedral"], "learned")
    with torch.no_grad():
        flow.logits.copy_(noise(8, seed=3))  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match="not close"):
        check_density_is_the_sum(flow, inner, noise(6, 2))


# --------------------------------------------------------------------------------------------------
# zuko's layers as citizens of Pyro

ZUKO: dict[str, Callable[[int], ZukoTransform]] = {
    "NSF": lambda d: ZukoTransform(
        zuko.flows.NSF(d, transforms=1, hidden_features=(8,)).transform, d
    ),
    "NSF inverse": lambda d: ZukoTransform(
        zuko.flows.NSF(d, transforms=1, hidden_features=(8,)).transform.inv, d
    ),
    "MAF": lambda d: ZukoTransform(
        zuko.flows.MAF(d, transforms=1, hidden_features=(8,)).transform, d
    ),
    "NICE": lambda d: ZukoTransform(
        zuko.flows.NICE(d, transforms=2, hidden_features=(8,)).transform, d
    ),
    "CNF": lambda d: ZukoTransform(
        zuko.flows.CNF(d, hidden_features=(4,), freqs=1, atol=1e-4, rtol=1e-4).transform, d
    ),
}


def zuko_transform(name: str, d: int = 2) -> ZukoTransform:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ZUKO[name](d)


adapters = pytest.mark.parametrize("name", ZUKO)


def model() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
    pyro.sample("seen", dist.Normal(a + b, 0.5), obs=torch.tensor(2.0))


@adapters
def test_transformed_distribution_draws_with_gradients_and_keeps_nothing(name: str) -> None:
    transform = zuko_transform(name)
    distribution = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), [transform]
    )
    assert distribution.has_rsample
    x = distribution.rsample((7,))
    distribution.log_prob(x).sum().backward()
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in transform.parameters())
    before = distribution.log_prob(x.detach())
    stirred(transform)
    after, copy = distribution.log_prob(x.detach()), distribution.log_prob(x.detach().clone())
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, copy)
    assert {id(p) for p in transform.parameters()} == {id(p) for p in transform.lazy.parameters()}


@adapters
def test_auto_guide_svi_and_neutra(name: str) -> None:
    pyro.set_rng_seed(0)
    guide = AutoNormalizingFlow(model, lambda d: zuko_transform(name, d))
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 2e-2}),
        Trace_ELBO(num_particles=8, vectorize_particles=True),
    )
    losses = [svi.step() for _ in range(60 if name != "CNF" else 25)]
    assert sum(losses[-10:]) < sum(losses[:10])
    learned = [key for key in pyro.get_param_store() if "lazy" in key]
    assert learned
    assert {"a", "b"} <= set(guide())
    neutra = NeuTraReparam(guide.requires_grad_(False))
    warped = poutine.reparam(model, config=lambda _: neutra)
    starts, potential, *_ = initialize_model(warped)
    site = next(iter(starts))
    z = {site: starts[site].detach().requires_grad_()}
    (gradient,) = torch.autograd.grad(potential(z), list(z.values()))
    assert bool((gradient != 0).all())
    # the potential is that of the model at the image, less the log-determinant of the whole way
    x = guide.transform(z[site])
    trace = poutine.trace(poutine.condition(model, {"a": x[0], "b": x[1].exp()})).get_trace()
    truth = -(trace.log_prob_sum() + x[1] + guide.transform.log_abs_det_jacobian(z[site], x))
    torch.testing.assert_close(potential(z), truth, rtol=1e-4, atol=1e-4)


@adapters
def test_a_plain_guide_by_hand_and_composition(name: str) -> None:
    transform = zuko_transform(name)

    def guide() -> None:
        pyro.module("flow", transform)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("x", dist.TransformedDistribution(base, [transform]))

    def target() -> None:
        pyro.sample("x", dist.Normal(torch.ones(2), 0.5).to_event(1))

    svi = SVI(target, guide, pyro.optim.Adam({"lr": 2e-2}), Trace_ELBO(num_particles=4))
    before = [p.detach().clone() for p in transform.parameters()]
    for _ in range(3):
        assert math.isfinite(svi.step())
    assert any(not torch.equal(a, b) for a, b in zip(before, transform.parameters(), strict=True))
    both = ComposeTransform([transform, transform.inv])
    torch.testing.assert_close(both(torch.ones(3, 2)), torch.ones(3, 2), rtol=1e-3, atol=1e-3)


def test_zuko_s_nice_is_affine_and_ours_is_not() -> None:
    z = noise(5, 2).float()
    assert bool((stirred(zuko_transform("NICE")).with_log_det(z)[1] != 0).all())
    ours = stirred(NICE(2, num_layers=2)).transform.parts[0]
    assert bool((ours.log_abs_det_jacobian(z, z) == 0).all())


def test_a_spline_cannot_reach_beyond_its_bound() -> None:
    flow = stirred(SplineFlow(2, 4, (8,), scale=2.0, dtype=F64), scale=0.0)
    splines = [part for part in flow.transform.parts if isinstance(part, ZukoTransform)]
    for part in splines:
        stirred(part, scale=3.0)  # whatever the splines have learned
    inside = 9.99 * torch.rand(4000, 2, dtype=F64, generator=seeded_generator(0)) - 4.995
    x = flow.forward_and_log_prob(inside)[0]
    assert 9.0 < float(x.detach().abs().max()) <= 10.0  # scale times bound
    outside = torch.tensor([[6.0, -7.0]], dtype=F64)
    torch.testing.assert_close(flow.forward_and_log_prob(outside)[0].detach(), 2.0 * outside)


def test_a_continuous_flow_learns_in_eval_mode_too() -> None:
    flow = ContinuousFlow(2, (4,), num_frequencies=1, atol=1e-4, rtol=1e-4).eval()
    flow.log_prob(torch.ones(3, 2)).sum().backward()
    assert any(
        bool((p.grad != 0).any())
        for p in flow.transform.parts[0].parameters()
        if p.grad is not None
    )
    assert not flow.training


def test_refusals_of_zuko_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError,
        match=r"atol >= 1.2e-07 and rtol >= 1.2e-06 must hold in torch.float32, or the solver"
        r" does not terminate",
    ):
        ContinuousFlow(2, atol=1e-8)
    with pytest.raises(
        ValueError, match="num_bins must be an integer of at least 2, got num_bins=1"
    ):
        SplineFlow(2, num_bins=1)
    with pytest.raises(ValueError, match="fast='both'"):
        AutoregressiveFlow(2, fast="both")
    with pytest.raises(ValueError, match="activation='sine'"):
        SplineFlow(2, activation="sine")
    with pytest.raises(ValueError, match="scale must be positive and finite, got scale=-1"):
        AutoregressiveFlow(2, scale=-1.0)
    plain = builtins.__import__

    def without_zuko(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "zuko":
            raise ImportError("No module named 'zuko'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_zuko)
    for make in (SplineFlow, AutoregressiveFlow, ContinuousFlow):
        with pytest.raises(ImportError, match=r"pip install 'pyroebm\[flows\]'"):
            make(2)
    NICE(2), RealNVP(2)


# --------------------------------------------------------------------------------------------------
# Mutants of the layers: the check of test_flows.py catches them


class _Unsummed(AffineCoupling):
    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = super().with_log_det(z)
        return x, log_det / len(self.moved)


class _Unclamped(AffineCoupling):
    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return super().with_log_det(z)[0], self.net(z.index_select(-1, self.passing)).chunk(
            2, dim=-1
        )[0].sum(-1)


class _LoftUpsideDown(Loft):
    def with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = super().with_log_det(z)
        return x, -log_det


class _ZukoUpsideDown(ZukoTransform):
    def inverse_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().inverse_with_log_det(x)
        return z, -log_det


def check_both_ways(flow: Flow, layer: Any, z: Tensor) -> None:
    """The density of what is pushed, and of the same point pulled back, against autograd's
    Jacobian."""
    x, log_q = flow.forward_and_log_prob(z)
    jacobian = torch.stack([torch.autograd.functional.jacobian(layer, row) for row in z])
    truth = StandardNormal(4).log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_q, truth)
    torch.testing.assert_close(flow.log_prob(x), truth)


def _spline_upside_down() -> Any:
    part = stirred(SplineFlow(4, 1, (8,), dtype=F64)).transform.parts[0]
    part.__class__ = _ZukoUpsideDown
    return part


@pytest.mark.parametrize(
    "make",
    [
        lambda: stirred(_Unsummed(4, hidden_sizes=(8,), dtype=F64)),
        lambda: stirred(_Unclamped(4, hidden_sizes=(8,), dtype=F64)),
        lambda: _LoftUpsideDown(4, 0.5),
        _spline_upside_down,
    ],
)
def test_mutants_of_the_layers_are_caught(make: Callable[[], Any]) -> None:
    layer = make()
    flow = Flow([layer, PLULinear(torch.eye(4, dtype=F64))], 4, 4)
    with pytest.raises(AssertionError, match="not close"):
        check_both_ways(flow, layer, noise(3, 4))
