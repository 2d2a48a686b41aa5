"""What people read in tables and pictures in place of the names of forecasters, regimes and methods."""

FORECASTERS = {
    "transformer": "transformer",
    "weights_only": "transformer, weights alone",
    "mlp": "multilayer perceptron",
    "ridge": "ridge regression",
    "diffusion": "diffusion model",
    "jump": "jump, tuned through losses",
    "pca_transformer": "transformer over principal components",
    "persistence": "the last weights kept",
    "average_3": "mean of the last 3",
    "average_5": "mean of the last 5",
    "average_7": "mean of the last 7",
    "linear": "linear extrapolation",
    "quadratic": "quadratic extrapolation",
    "dmd": "dynamic mode decomposition",
}
BASELINES = ("persistence", "average_3", "average_5", "average_7", "linear", "quadratic", "dmd")
REGIMES = {"adam": "Adam", "adam_2x": "Adam, twice the rate", "cosine": "Adam, cosine schedule", "sgd": "SGD"}
METHODS = {
    "adam": "Adam",
    "adam_average": "Adam with means of snapshots",
    "adam_nowcast": "Adam with forecasts",
    "tuned": "Adam, learning rate tuned",
    "cosine": "Adam, cosine schedule tuned",
    "cosine_nowcast": "the same with forecasts",
}
