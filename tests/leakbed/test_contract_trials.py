"""Attacks and defences are tried on small tensors, twice."""

from attacks import MeanImage
from defenses import SmashedNoise
from leakbed.contract_trials import breaches, small_view


def test_a_view_has_what_the_threat_model_names_and_sound_classes_break_nothing() -> None:
    view = small_view(MeanImage().threat)
    assert view.public_images is not None
    assert view.smashed is None
    assert breaches(MeanImage()) == []
    assert breaches(SmashedNoise()) == []
    assert breaches(object()) == []
