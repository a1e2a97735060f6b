"""A small model behind a server, over gRPC and REST."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from . import contract
from .stub import serving


class Sample(NamedTuple):
    """A linear classifier of digits, unseen images float32 [n, 8, 8, 1] with labels, and its folder of versions."""

    module: contract.Digits
    image: np.ndarray
    label: np.ndarray
    folder: object


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    data = load_digits()
    image, label = (data.images[..., None] / 16).astype(np.float32), data.target.astype(np.int32)
    fitted = LogisticRegression(max_iter=200).fit(image[:1000].reshape(-1, 64), label[:1000])
    module = contract.Digits(fitted.coef_.T, fitted.intercept_)
    folder = tmp_path_factory.mktemp("served") / "digits"
    contract.save(folder / "1", module)
    contract.save(folder / "2", contract.Digits(-fitted.coef_.T, fitted.intercept_))
    return Sample(module, image[1000:], label[1000:], folder)


@pytest.fixture(scope="session")
def server(digits):
    """Versions 1 and 2, of which 1 is `stable`, at a stub: TensorFlow Serving needs a configuration for labels."""
    with serving(digits.folder, labels={"stable": 1}) as found:
        yield found


@pytest.fixture(params=["grpc", "rest"])
def address(server, request):
    return getattr(server, request.param)
