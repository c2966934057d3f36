"""Probes of every head and fold at once, on one thread, against a scikit-learn loop spread over two cores by joblib."""

from __future__ import annotations

import time

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.linear_model import LogisticRegression

from benchmarks.measuring import interleaved, keep, ratio
from helpers.activations import collect
from helpers.data import load_table
from helpers.heads.probes import class_weights, cross_validated, folds_by_group, heads_first
from helpers.models import load_model
from helpers.steering.iti import statements

CORES, FOLDS = 2, 5


def one_probe(x: np.ndarray, y: np.ndarray, weight: np.ndarray, solver: str, tol: float) -> np.ndarray:
    model = LogisticRegression(tol=tol, max_iter=10_000, solver=solver).fit(x, y, sample_weight=weight)
    return np.append(model.coef_[0], model.intercept_)


def loop(x: np.ndarray, y: np.ndarray, weights: np.ndarray, solver: str, tol: float) -> np.ndarray:
    """[folds, heads, d + 1], one scikit-learn fit for each head and fold."""
    jobs = (delayed(one_probe)(head[weight > 0], y[weight > 0], weight[weight > 0], solver, tol)
            for weight in weights for head in x)
    return np.stack(Parallel(n_jobs=CORES)(jobs)).reshape(len(weights), len(x), -1)


def test_probes_of_all_heads():
    lm = load_model("data/organism/chat", device="cpu", dtype="float32")
    users, answers, y, groups = statements(load_table("facts", "fit"), n_wrong=1)
    z = collect(lm, users, answers, sites={"z": range(lm.arch.n_layers)}, positions="last")
    x = heads_first(z, lm.arch)
    weights = ((~folds_by_group(groups, FOLDS)) * class_weights(y)).numpy()
    given = x.double().numpy(), y.numpy(), weights
    ours = cross_validated(x, y, groups, n_folds=FOLDS)[0]
    ours = torch.cat([ours.weight, ours.bias[..., None]], -1).numpy()
    same = loop(*given, "newton-cholesky", 1e-10)
    usual = loop(*given, "lbfgs", 1e-4)
    assert np.abs(ours - same).max() <= 1e-6
    ways = {
        "ours": lambda: cross_validated(x, y, groups, n_folds=FOLDS),
        "same": lambda: loop(*given, "newton-cholesky", 1e-10),
        "usual": lambda: loop(*given, "lbfgs", 1e-4),
    }
    seconds = interleaved(ways, repeats=7, clock=time.perf_counter)
    keep("probes", {
        "clock": "wall", "joblib processes": CORES, "heads": len(x), "folds": FOLDS, "rows": len(y),
        "joblib + scikit-learn, same optimum / ours (target 1)": ratio(seconds["same"], seconds["ours"]),
        "joblib + scikit-learn, its defaults / ours": ratio(seconds["usual"], seconds["ours"]),
        "largest difference of coefficients, same optimum": float(f"{np.abs(ours - same).max():.1e}"),
        "largest difference of coefficients, its defaults": float(f"{np.abs(ours - usual).max():.1e}"),
    })
