from __future__ import annotations

import pytest

from overfly.core.errors import RecipeError
from overfly.models import build, names, network, register
from overfly.models.network import Network
from overfly.models.pidnet import PIDNet


def tiny(classes: int = 7, training_heads: bool = True, bands: int = 3) -> Network:
    return PIDNet(classes, training_heads, bands, planes=8, pyramid=8, head=8)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'pidnet_xl'.*deeplabv2_resnet101.*pidnet_s") as refusal:
        build("pidnet_xl")
    assert all(name in str(refusal.value) for name in names())


@pytest.mark.parametrize(("classes", "bands"), [(0, 3), (7, 0)])
def test_impossible_numbers_are_refused(classes: int, bands: int) -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        build("pidnet_s", classes=classes, bands=bands)


def test_plugins_are_asked_when_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_BUILDERS", dict(network._BUILDERS))
    monkeypatch.setattr(network, "load_plugins", lambda: register(tiny))
    assert isinstance(build("tiny", classes=3, bands=2), PIDNet)
    assert "tiny" in names()


def test_registering_a_name_twice_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_BUILDERS", dict(network._BUILDERS))
    register(tiny)
    with pytest.raises(ValueError, match="registered twice"):
        register(tiny)
