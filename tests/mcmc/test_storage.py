"""Parts of a stored run: what was written after the state that is gone on from is forgotten."""

from __future__ import annotations

from pathlib import Path

import torch

from pyroebm.mcmc.storage import Store


def test_draws_after_the_state_are_cut(tmp_path: Path) -> None:
    store = Store(tmp_path, lambda x: {"x": x})
    store.attributes = {"seed": "0"}
    _, part = store.parts(0, 0)
    x = torch.arange(20.0).reshape(2, 10)
    for start in (0, 4, 7):
        stop = {0: 4, 4: 7, 7: 10}[start]
        part.write(start, x[:, start:stop], {"lp": -x[:, start:stop]})
    assert torch.equal(part.read()[0], x)
    part.cut(4)
    draws, stats = part.read()
    assert torch.equal(draws, x[:, :4])
    assert torch.equal(stats["lp"], -x[:, :4])
