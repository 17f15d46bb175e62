"""How latents stand at two sites: known features, read by a crosscoder made by hand."""

import pytest
import torch

from lib.analysis.diffing import compare_sites
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.rules import BatchTopK, ReLU

D = 12
NAMES = ["shared", "only b", "only a", "rotated", "shrinkage", "decoupling", "twin", "dead"]


def hand_made(scales=(1.0, 1.0)) -> tuple[Dictionary, torch.Tensor]:
    """Latent j reads feature j. What the sites hold, and what the crosscoder writes of it:

    shrinkage: both sites hold it, it is written at b alone; decoupling: both hold it, and `twin`
    writes it at a.
    """
    eye = torch.eye(D)
    a, b = torch.zeros(8, D), torch.zeros(8, D)
    for j, (at_a, at_b) in {0: (0, 0), 3: (3, 4), 4: (5, 5), 5: (6, 6)}.items():
        a[j], b[j] = eye[at_a], eye[at_b]
    b[1], a[2], a[7] = eye[1], eye[2], eye[7]
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(4000, 8, generator=generator) < 0.1
    z = on * (torch.rand(4000, 8, generator=generator) + 0.5)
    z[:, 6], z[:, 7] = z[:, 5], 0
    x = torch.cat([z @ a / scales[0], z @ b / scales[1]], dim=1)
    x += 1e-3 * torch.randn(x.shape, generator=generator)
    d = Dictionary(
        DictionaryConfig(
            site_dims=(D, D), d_sae=8, rule=ReLU(), unit_norm_decoder=False, site_scales=scales
        )
    )
    read = torch.cat([a, b], dim=1)
    write_a, write_b = a.clone(), b.clone()
    write_a[4], write_a[5], write_b[6], write_a[6] = 0, 0, 0, a[5]
    with torch.no_grad():
        d.W_enc.copy_((read / read.square().sum(1, keepdim=True).clamp(min=1e-9)).T)
        d.W_enc[:, 6] = d.W_enc[:, 5]
        d.W_enc *= torch.tensor(scales).repeat_interleave(D)[:, None]
        d.W_dec.copy_(torch.cat([write_a / scales[0], write_b / scales[1]], dim=1))
        d.b_enc -= 0.05
    return d.eval(), x


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 5.0)])
def test_each_kind_is_told_from_the_others(scales):
    d, x = hand_made(scales)
    reading = compare_sites(d, x.split(1000))
    kinds = reading.kinds()
    expected = ["shared", "only b", "only a", "rotated", "shrinkage", "decoupling"]
    assert kinds[:6] == expected and kinds[7] == "dead"
    assert kinds[6] == "decoupling"  # site b's latent writes it too
    torch.testing.assert_close(reading.relative_norm[:4], torch.tensor([0.5, 1.0, 0.0, 0.5]))
    torch.testing.assert_close(reading.cosine[:2], torch.tensor([1.0, 0.0]))
    assert reading.cosine[3].abs() < 1e-6


@pytest.mark.parametrize("norm", ["crosscoder", "decoupled"])
def test_latent_scaling_is_the_least_squares_fit(norm):
    """Against a fit of each latent by itself, in float64."""
    torch.manual_seed(0)
    shape = {"site_dims": (5, 5), "d_sae": 9, "code_norm": norm}
    d = Dictionary(DictionaryConfig(rule=BatchTopK(k=2), **shape)).eval()
    with torch.no_grad():
        d.b_dec.normal_()
        d.threshold.fill_(0.5)
    x = torch.randn(300, 10)
    reading = compare_sites(d, [x[:100], x[100:]])
    z, W = d.encode(x).double().detach(), d.W_dec.double().detach()
    parts = W.view(9, 2, 5).norm(dim=2)  # what a site decodes, by its own bound
    on = [z * parts[:, site] > 0.5 if norm == "decoupled" else z > 0 for site in (0, 1)]
    x_hat = torch.cat([(z * on[site]) @ W[:, 5 * site : 5 * site + 5] for site in (0, 1)], dim=1)
    left = x - d.b_dec - x_hat
    for own in (0, 1):
        for j in range(9):
            direction = W[j].view(2, 5)[own]
            column = torch.outer(z[:, j], direction).flatten()[:, None]
            betas = {}
            for at in (0, 1):
                part = slice(5 * at, 5 * at + 5)
                with_own = left[:, part] + torch.outer(z[:, j] * on[at][:, j], W[j, part])
                for name, y in (("error", with_own), ("reconstruction", x_hat[:, part])):
                    fit = torch.linalg.lstsq(column, y.flatten()[:, None]).solution.item()
                    betas[name, at] = fit
            for name in ("error", "reconstruction"):
                if betas[name, own] > 0:
                    ratio = betas[name, 1 - own] / betas[name, own]
                    assert getattr(reading, name)[own, j].item() == pytest.approx(ratio, abs=1e-3)


def test_a_latent_of_a_third_site_is_of_neither():
    torch.manual_seed(0)
    shape = {"site_dims": (4, 4, 4), "d_sae": 9, "exclusive": (1, 1, 2)}
    d = Dictionary(DictionaryConfig(rule=ReLU(), **shape)).eval()
    kinds = compare_sites(d, [torch.randn(400, 12)]).kinds()
    assert [kind == "neither" for kind in kinds] == [False, False, True, True] + 5 * [False]


def test_sites_that_cannot_be_compared():
    d = Dictionary(DictionaryConfig(site_dims=(4, 6), d_sae=9, rule=ReLU())).eval()
    with pytest.raises(ValueError, match="one width"):
        compare_sites(d, [torch.ones(3, 10)])
    for sites in ((0, 0), (0, 2)):
        with pytest.raises(ValueError, match="two sites"):
            compare_sites(d, [torch.ones(3, 10)], sites)
    d = Dictionary(DictionaryConfig(site_dims=(5, 5), d_sae=9, rule=ReLU())).eval()
    with pytest.raises(ValueError, match="a latent fires"):
        compare_sites(d, [])
