from __future__ import annotations

import colorsys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from overfly.core.records import Labeled
from overfly.ops.augmentation import Augment
from overfly.ops.color import (
    BrightnessContrast,
    ColorJitter,
    Gamma,
    GaussianBlur,
    GaussianNoise,
    Gray,
    Illumination,
    color_moments,
    gray,
    low_amplitudes,
    match_colors,
    scale_low_frequencies,
)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def images(count: int = 4, bands: int = 3, size: int = 16, low: float = 0.3, high: float = 0.7) -> Tensor:
    return low + (high - low) * torch.rand(count, bands, size, size, generator=seeded(0))


def changed(kind: Augment, image: Tensor, seed: int = 0) -> Tensor:
    return kind(Labeled(image, torch.zeros(len(image), *image.shape[2:], dtype=torch.int64)), seeded(seed)).image


def test_brightness_and_contrast_are_those_of_the_limits() -> None:
    image = images(200)
    constants = (changed(BrightnessContrast(p=1, brightness=0.2, contrast=0), image) - image).flatten(1)
    assert bool((constants.std(1) < 1e-5).all())
    assert float(constants.min()) == pytest.approx(-0.2, abs=0.01)
    assert float(constants.max()) == pytest.approx(0.2, abs=0.01)
    stretched = changed(BrightnessContrast(p=1, brightness=0, contrast=0.2), image)
    ratio = stretched.flatten(1).std(1) / image.flatten(1).std(1)
    assert float(ratio.min()) == pytest.approx(0.8, abs=0.01)
    assert float(ratio.max()) == pytest.approx(1.2, abs=0.01)
    torch.testing.assert_close(stretched.mean((1, 2, 3)), image.mean((1, 2, 3)))


def test_hue_turns_as_in_hsv_and_keeps_the_value() -> None:
    image = images(6)
    turned = changed(ColorJitter(p=1, brightness=0, contrast=0, saturation=0, hue=0.2), image)
    for i in range(6):
        turns = []
        for y, x in ((0, 0), (5, 9), (12, 3)):
            before, after = (colorsys.rgb_to_hsv(*each[i, :, y, x].tolist()) for each in (image, turned))
            assert after[1:] == pytest.approx(before[1:], abs=1e-3)
            turns.append((after[0] - before[0] + 0.5) % 1 - 0.5)
        assert max(turns) - min(turns) < 1e-2
        assert -0.201 < turns[0] < 0.201
        assert abs(turns[0]) > 1e-3


def test_hue_reaches_its_limit() -> None:
    red = torch.tensor([0.8, 0.2, 0.2]).view(1, 3, 1, 1).expand(200, 3, 1, 1)
    turned = changed(ColorJitter(p=1, brightness=0, contrast=0, saturation=0, hue=0.1), red)
    hues = [(colorsys.rgb_to_hsv(*pixel)[0] + 0.5) % 1 - 0.5 for pixel in turned.flatten(1).tolist()]
    assert min(hues) == pytest.approx(-0.1, abs=0.005)
    assert max(hues) == pytest.approx(0.1, abs=0.005)


def test_saturation_leaves_the_brightness() -> None:
    image = images(20)
    jittered = changed(ColorJitter(p=1, brightness=0, contrast=0, saturation=0.5, hue=0), image)
    torch.testing.assert_close(gray(jittered), gray(image), atol=1e-5, rtol=0)
    assert not torch.allclose(jittered, image)


@pytest.mark.parametrize("bands", [1, 2, 4, 8])
def test_color_jitter_is_per_band_without_three_bands(bands: int) -> None:
    image = images(5, bands)
    jittered = changed(ColorJitter(p=1, contrast=0), image)
    gain = (jittered / image).flatten(2)
    assert bool((gain.std(2) < 1e-5).all())
    assert 0.8 - 1e-5 <= float(gain.min()) <= float(gain.max()) <= 1.2 + 1e-5
    if bands > 1:
        assert bool((gain[..., 0].std(1) > 1e-3).all())


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gray_images_stay_finite(value: float) -> None:
    flat = torch.full((2, 3, 16, 16), value)
    for kind in (
        ColorJitter(p=1),
        GaussianBlur(p=1),
        Gamma(p=1),
        Gray(p=1),
        BrightnessContrast(p=1),
        Illumination(p=1),
    ):
        result = changed(kind, flat)
        assert bool(result.isfinite().all()), kind
    assert float((changed(ColorJitter(p=1, brightness=0), flat) - flat).abs().max()) < 1e-3


def test_blur_is_a_gaussian_of_the_width() -> None:
    point = torch.zeros(50, 1, 41, 41)
    point[:, :, 20, 20] = 1
    blurred = changed(GaussianBlur(p=1, low=1.0, high=2.0), point)[:, 0]
    torch.testing.assert_close(blurred.sum((1, 2)), torch.ones(50))
    distance = torch.arange(41.0) - 20
    sigma = (blurred.sum(1) * distance**2).sum(1).sqrt()
    assert float(sigma.min()) == pytest.approx(1, abs=0.1)
    assert float(sigma.max()) == pytest.approx(2, abs=0.1)
    tiny = torch.rand(2, 3, 2, 2, generator=seeded(0))
    assert changed(GaussianBlur(p=1), tiny).shape == tiny.shape
    assert torch.equal(changed(GaussianBlur(p=1), tiny[..., :1, :]), tiny[..., :1, :])


def test_gray_is_luma_in_every_band() -> None:
    colors = torch.eye(3).view(3, 3, 1, 1)
    assert changed(Gray(p=1), colors).flatten(1)[:, 0].tolist() == pytest.approx([0.299, 0.587, 0.114])
    assert bool((changed(Gray(p=1), images()).std(1) < 1e-6).all())
    four = images(bands=4)
    torch.testing.assert_close(changed(Gray(p=1), four)[:, 2], four.mean(1))


def test_gamma_keeps_black_and_white() -> None:
    ramp = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3).expand(100, 3, 1, 3)
    result = changed(Gamma(p=1, low=0.5, high=2.0), ramp)
    assert bool((result[..., 0] == 0).all())
    assert bool((result[..., 2] == 1).all())
    assert float(result[..., 1].min()) == pytest.approx(0.25**2, abs=0.01)
    assert float(result[..., 1].max()) == pytest.approx(0.25**0.5, abs=0.02)


def test_noise_has_the_strength_and_no_bias() -> None:
    image = torch.full((100, 3, 32, 32), 0.5)
    noise = changed(GaussianNoise(p=1, low=0.02, high=0.06), image) - image
    strength = noise.flatten(1).std(1)
    assert float(strength.min()) == pytest.approx(0.02, abs=0.002)
    assert float(strength.max()) == pytest.approx(0.06, abs=0.002)
    assert abs(float(noise.mean())) < 1e-3
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 1e-4


def test_illumination_is_a_gain_of_the_image_times_one_per_band() -> None:
    dark = images(400) * 0.1
    gain = (changed(Illumination(p=1, brightness=0.2, color=0.05), dark) / dark).flatten(2)
    assert bool((gain.std(2) < 1e-4).all())
    log = gain[..., 0].log()
    assert float(log.mean(1).std()) == pytest.approx(0.2, rel=0.15)
    assert float((log - log.mean(1, keepdim=True)).std()) == pytest.approx(0.05 * (2 / 3) ** 0.5, rel=0.15)


def random_images(seed: int, shape: tuple[int, ...] = (2, 3, 16, 20)) -> torch.Tensor:
    return 255 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def swapped(image: Tensor, style: Tensor, cycles: int) -> Tensor:
    return scale_low_frequencies(image, low_amplitudes(style, cycles) / low_amplitudes(image, cycles))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 100), st.integers(0, 9), st.integers(5, 17), st.integers(5, 17))
def test_an_image_with_itself_as_style_does_not_change(seed: int, cycles: int, height: int, width: int) -> None:
    image = random_images(seed, (1, 2, height, width))
    assert torch.allclose(swapped(image, image, cycles), image, atol=1e-3)


def test_cycles_are_those_of_the_image() -> None:
    """A wave of two cycles changes with two, not with one, whatever the size of the image."""
    for size in (16, 48):
        wave = torch.cos(2 * torch.pi * 2 * torch.arange(size) / size).expand(1, 1, size, size)
        for cycles, factor in ((1, 1.0), (2, 3.0), (size, 3.0)):
            side = 2 * cycles + 1
            assert torch.allclose(scale_low_frequencies(wave, torch.full((side, side), 3.0)), factor * wave, atol=1e-4)


def test_low_frequency_amplitudes_are_the_styles_and_phases_the_images() -> None:
    image, style = random_images(0), random_images(1)
    found = swapped(image, style, 2)
    spectra = [torch.fft.fftshift(torch.fft.fft2(each), dim=(2, 3)) for each in (found, image, style)]
    low = torch.zeros(16, 20, dtype=torch.bool)
    low[8 - 2 : 8 + 3, 10 - 2 : 10 + 3] = True
    assert torch.allclose(spectra[0].abs()[..., low], spectra[2].abs()[..., low], rtol=1e-3)
    assert torch.allclose(spectra[0].abs()[..., ~low], spectra[1].abs()[..., ~low], rtol=1e-3, atol=1e-1)
    turned = spectra[0] * spectra[1].conj()
    assert (turned.imag.abs() <= 1e-3 * turned.abs() + 1).all()


def test_0_cycles_swap_the_mean_alone() -> None:
    image, style = random_images(0), random_images(1) + 40
    found = swapped(image, style, 0)
    assert torch.allclose(found.mean((2, 3)), style.mean((2, 3)), rtol=1e-4)
    assert torch.allclose(found - found.mean((2, 3), keepdim=True), image - image.mean((2, 3), keepdim=True), atol=1e-2)


@pytest.mark.parametrize("each", [True, False])
def test_colors_have_the_mean_and_standard_deviation_of_the_style(each: bool) -> None:
    image, style = (
        random_images(0),
        random_images(1) * torch.tensor([[[[0.2]], [[0.5]], [[0.9]]], [[[0.1]], [[0.3]], [[0.4]]]]) + 7,
    )
    moments = [color_moments(images) if each else color_moments(images).mean(0) for images in (image, style)]
    found = match_colors(image, *moments)
    over = (2, 3) if each else (0, 2, 3)
    for mine, expected in zip(torch.std_mean(found, over), torch.std_mean(style, over), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-3)
    assert torch.allclose(match_colors(image, moments[0], moments[0]), image, atol=1e-3)


def test_matching_a_batch_keeps_differences_between_images() -> None:
    image = random_images(0)
    image[1] *= 0.1
    own, style = color_moments(image), color_moments(random_images(1))
    batch_means = match_colors(image, own.mean(0), style.mean(0)).mean((1, 2, 3))
    image_means = match_colors(image, own, style).mean((1, 2, 3))
    assert batch_means[0] > batch_means[1] + 30
    assert abs(image_means[0] - image_means[1]) < 15


def test_a_constant_image_stays_finite() -> None:
    for value in (0.0, 9.0, 60_000.0):
        flat = torch.full((1, 3, 4, 4), value)
        style = color_moments(random_images(0))
        found = match_colors(flat, color_moments(flat), style)
        assert torch.allclose(found, style[..., :1, None].expand_as(found), atol=1.0)
