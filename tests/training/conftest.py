"""The bundled digits, and a run on them of a few seconds."""

import pytest

from kerasdefense import config, data


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return data.load(config.Data(dir=str(tmp_path_factory.mktemp("digits")), validation_fraction=0.15))


@pytest.fixture(scope="session")
def small_run():
    def make(*, defense="pgd_at", attack=None, awp_gamma=0.0, **train):
        settings = {"epochs": 2, "batch_size": 64, "validation_steps": 2, "strategy": "none", **train}
        return config.Run(
            progress=False,
            data=config.Data(validation_fraction=0.15),
            backbone=config.Backbone(name="small_cnn", width=4),
            attack=config.Attack(**{"epsilon": 0.1, "steps": 1, **(attack or {})}),
            defense=config.Defense(name=defense, awp_gamma=awp_gamma),
            train=config.Train(**settings),
        )

    return make
