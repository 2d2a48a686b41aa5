"""Predictors without layers: gradient boosting, kernel ridge, and the nearest network that is known."""

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import kendalltau
from threadpoolctl import threadpool_limits
from torch import Tensor

from stages.weightnet.predictors.data import Data
from stages.weightnet.predictors.kernel_ridge import fit_kernel_ridge

BOOSTING = ((15.0, 15), (30.0, 8))  # learning rate times rounds, and leaves, of which validation chooses


def boost(data: Data, rounds: int) -> tuple[Float[Tensor, "v k"], Float[Tensor, "t k"]]:
    """Return standardised predictions of validation and test networks by gradient boosting on their inputs.

    Validation chooses learning rate and leaves once, by the test accuracy.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor  # here: 1 s that other predictors do without

    x, y = (data.part(data.split.train, values).numpy() for values in (data.inputs, data.targets))
    parts = [data.part(rows, data.inputs).numpy() for rows in (data.split.validation, data.split.test)]
    truth = data.part(data.split.validation, data.targets)[:, 0].numpy()

    def fit(setting: tuple[float, int], k: int) -> HistGradientBoostingRegressor:
        total, leaves = setting
        options = {"max_leaf_nodes": leaves, "min_samples_leaf": 8, "l2_regularization": 0.1, "random_state": 0}
        known = ~np.isnan(y[:, k])
        model = HistGradientBoostingRegressor(max_iter=rounds, learning_rate=total / rounds, **options)
        return model.fit(x[known], y[known, k])

    with threadpool_limits(1):
        first = [fit(setting, 0) for setting in BOOSTING]
        scores = [kendalltau(truth, model.predict(parts[0]), nan_policy="omit").statistic for model in first]
        chosen = int(np.nan_to_num(scores).argmax())  # of constant predictions tau is none
        models = [first[chosen], *(fit(BOOSTING[chosen], k) for k in range(1, y.shape[1]))]
        columns = [np.stack([model.predict(part) for model in models], 1) for part in parts]
    return torch.from_numpy(columns[0]).float(), torch.from_numpy(columns[1]).float()


def ridge_on_inputs(data: Data) -> tuple[Float[Tensor, "v k"], Float[Tensor, "t k"]]:
    """Return standardised predictions of validation and test networks by kernel ridge on their inputs."""
    train, *others = (
        data.part(rows, data.inputs) for rows in (data.split.train, data.split.validation, data.split.test)
    )
    ridge = fit_kernel_ridge(train, data.part(data.split.train, data.targets))
    return ridge.predict(others[0]), ridge.predict(others[1])


def nearest(data: Data) -> tuple[Float[Tensor, "v k"], Float[Tensor, "t k"]]:
    """Return the properties of the network to learn from whose weights are nearest. Of one architecture, read as a whole."""
    (name,) = data.zoos
    known = data.split.train[name]
    flat = data.zoos[name].flat(torch.arange(len(data.zoos[name])))
    scaled = (flat - flat[known].mean(0)) / (flat[known].std(0) + 1e-6)
    return tuple(
        data.targets[name][known][torch.cdist(scaled[rows[name]], scaled[known]).argmin(1)]
        for rows in (data.split.validation, data.split.test)
    )
