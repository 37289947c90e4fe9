from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.ops.style import match_colors, swap_low_frequencies


def images(seed: int, shape: tuple[int, ...] = (2, 3, 16, 20)) -> torch.Tensor:
    return 255 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 100), st.floats(0, 0.5), st.integers(5, 17), st.integers(5, 17))
def test_with_itself_as_style_an_image_stays(seed: int, beta: float, height: int, width: int) -> None:
    image = images(seed, (1, 2, height, width))
    assert torch.allclose(swap_low_frequencies(image, image, beta), image, atol=1e-3)


def test_amplitudes_of_the_window_are_the_styles_and_phases_the_images() -> None:
    image, style = images(0), images(1)
    found = swap_low_frequencies(image, style, 0.15)  # 0.15 of 16: two cycles
    spectra = [torch.fft.fftshift(torch.fft.fft2(each), dim=(2, 3)) for each in (found, image, style)]
    low = torch.zeros(16, 20, dtype=torch.bool)
    low[8 - 2 : 8 + 3, 10 - 2 : 10 + 3] = True
    assert torch.allclose(spectra[0].abs()[..., low], spectra[2].abs()[..., low], rtol=1e-3)
    assert torch.allclose(spectra[0].abs()[..., ~low], spectra[1].abs()[..., ~low], rtol=1e-3, atol=1e-1)
    turned = spectra[0] * spectra[1].conj()
    assert (turned.imag.abs() <= 1e-3 * turned.abs() + 1).all()


def test_beta_0_swaps_the_mean_alone() -> None:
    image, style = images(0), images(1) + 40
    found = swap_low_frequencies(image, style, 0.0)
    assert torch.allclose(found.mean((2, 3)), style.mean((2, 3)), rtol=1e-4)
    assert torch.allclose(found - found.mean((2, 3), keepdim=True), image - image.mean((2, 3), keepdim=True), atol=1e-2)


@pytest.mark.parametrize("each", [True, False])
def test_colors_have_the_mean_and_spread_of_the_style(each: bool) -> None:
    image, style = images(0), images(1) * torch.tensor([[[[0.2]], [[0.5]], [[0.9]]], [[[0.1]], [[0.3]], [[0.4]]]]) + 7
    found = match_colors(image, style, each=each)
    over = (2, 3) if each else (0, 2, 3)
    for mine, given_ in zip(torch.std_mean(found, over), torch.std_mean(style, over), strict=True):
        assert torch.allclose(mine, given_, rtol=1e-3)
    assert torch.allclose(match_colors(image, image, each=each), image, atol=1e-3)


def test_matched_together_images_keep_their_differences() -> None:
    image = images(0)
    image[1] *= 0.1
    together, alone = (match_colors(image, images(1), each=each).mean((1, 2, 3)) for each in (False, True))
    assert together[0] > together[1] + 30
    assert abs(alone[0] - alone[1]) < 15


def test_an_even_image_stays_finite() -> None:
    assert match_colors(torch.full((1, 3, 4, 4), 9.0), images(0)).isfinite().all()
