"""Settings: one nested description, checked, that goes through JSON and YAML unchanged."""

import json
from dataclasses import replace

import pytest

from mnemodyn.settings import (
    OBJECTIVE_SETTINGS,
    DataConfig,
    DenoiseSettings,
    LatentSettings,
    Machine,
    MaskedSettings,
    MixedSettings,
    ModelConfig,
    ModelSettings,
    Settings,
    SettingsError,
    TrainingConfig,
)


def test_sections_and_settings_find_their_place():
    settings = Settings.from_mapping(
        {
            "objective": "denoise",
            "training": {"epochs": 3, "learning_rate": 1},
            "machine": None,
            "scaling": "raw",
        }
    )
    assert settings.objective == DenoiseSettings()
    assert settings.training == TrainingConfig(epochs=3, learning_rate=1.0)
    assert type(settings.training.learning_rate) is float
    assert settings.machine == Machine()
    changed = settings.updated(
        {"objective.sigma": 0.2, "n_blocks": 1, "machine": {"workers": 2}, "scaling": "zscore"}
    )
    assert changed.objective == DenoiseSettings(sigma=0.2)
    assert changed.model == ModelSettings(n_blocks=1)
    assert changed.machine == Machine(workers=2)
    assert changed.scaling == "zscore"
    assert changed.training == settings.training
    assert settings.model == ModelSettings()


@pytest.mark.parametrize("name", OBJECTIVE_SETTINGS)
def test_no_two_sections_share_a_name(name):
    sections = Settings.from_mapping({"objective": name}).to_dict()
    names = [leaf for content in sections.values() if isinstance(content, dict) for leaf in content]
    assert len(set(names) - set(sections)) == len(names)


def test_another_objective_brings_its_own_settings():
    settings = Settings(objective=MaskedSettings(hidden_share=0.3))
    assert settings.updated({"objective": "latent", "teacher_decay": 0.9}).objective == (
        LatentSettings(teacher_decay=0.9)
    )
    assert settings.updated({"objective.name": "masked"}) == settings


@pytest.mark.parametrize("name", OBJECTIVE_SETTINGS)
def test_json_holds_the_whole(name):
    model = ModelConfig(n_parcels=5, front="gaussian", connectome="covariance")
    settings = Settings(objective=OBJECTIVE_SETTINGS[name](), model=model)
    text = json.dumps(settings.to_dict())
    assert Settings.from_mapping(json.loads(text)) == settings
    assert json.loads(text) == settings.to_dict()


def test_mixed_writes_out_the_settings_of_its_members():
    mixed = MixedSettings(mix=[{"name": "masked", "weight": 2}, {"name": "denoise"}])
    assert mixed.mix[0] == {**MaskedSettings().to_dict(), "weight": 2.0}
    assert MixedSettings(mix=mixed.mix) == mixed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"training": {"epochs": 0}},
            r"^training\.epochs must be greater than or equal to 1, got 0",
        ),
        ({"training": {"epochs": 1.5}}, r"^training\.epochs must be a valid integer, got 1\.5"),
        ({"training": {"epochs": True}}, r"^training\.epochs must be a valid integer, got True"),
        ({"training": {"epochs": "3"}}, r"^training\.epochs must be a valid integer, got '3'"),
        ({"training": {"ema_decay": 1.0}}, r"^training\.ema_decay must be less than 1"),
        ({"training": {"clip": -1.0}}, r"^training\.clip must be greater than 0"),
        ({"training": {"learning_rate": float("nan")}}, r"learning_rate must be a finite number"),
        ({"training": {"schedule": "linear"}}, r"schedule must be 'cosine' or 'restarts', got 'l"),
        ({"training": {"epoch": 3}}, r"^training\.epoch is not a setting; did you mean epochs\?"),
        ({"trianing": {}}, r"^trianing is not a setting; did you mean training\?"),
        ({"training": 3}, r"^training must be a mapping of settings, got 3"),
        ({"model": {"kernel_size": 4}}, r"^model\.kernel_size must be odd, got 4"),
        ({"model": {"n_levels": 20}}, r"^model\.n_levels 20 halves a scan"),
        ({"model": {"front": "gaussian", "residual": False}}, r"^model\.front needs residual"),
        ({"model": {"n_classes": 3}}, r"^model\.n_classes=3 needs compat='reference'"),
        ({"model": {"compat": "reference"}}, r"^model\.lift must be False with compat='reference'"),
        (
            {"objective": "maskd"},
            r"^objective\.name 'maskd' is no objective; did you mean masked\?",
        ),
        ({"objective": {"name": "denoise", "sigma": 0.0}}, r"^objective\.sigma must be greater"),
        ({"objective": {"hidden_share": 0.5, "share_spread": 0.5}}, r"got 0\.5 and 0\.5"),
        ({"objective": {"name": "latent", "observed_share": 0.9}}, r"at most 1, got 0\.9"),
        ({"objective": {"name": "mixed", "mix": [{"name": "masked"}]}}, r"mix must list two"),
        (
            {"objective": {"name": "mixed", "mix": [{"name": "masked"}, {"name": "denois"}]}},
            r"^objective\.mix: name 'denois' is no objective; did you mean denoise\?",
        ),
    ],
)
def test_what_is_refused_is_named(content, message):
    with pytest.raises(SettingsError, match=message):
        Settings.from_mapping(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, r"^epoch is not a setting; did you mean epochs\?"),
        ({"training.epoch": 3}, r"^training\.epoch is not a setting; did you mean epochs"),
        ({"training.epochs": 0}, r"^training\.epochs must be greater"),
        ({"objective.name": "maskd"}, r"^objective\.name 'maskd' is no objective"),
        ({"objective": "denoise", "hidden_share": 0.2}, r"^hidden_share is not a setting"),
    ],
)
def test_what_cannot_be_changed_is_named(changes, message):
    with pytest.raises(SettingsError, match=message):
        Settings().updated(changes)


def test_a_single_part_is_checked_too():
    with pytest.raises(SettingsError, match=r"^n_parcels must be given"):
        ModelConfig(n_timepoints=8)
    with pytest.raises(SettingsError, match=r"^n_test must be greater than or equal to 0, got -1"):
        DataConfig(n_test=-1)
    with pytest.raises(SettingsError, match=r"^banded must be 'full' or 'depthwise'"):
        replace(ModelConfig(n_parcels=3), banded="some")
