"""GLUE's metrics, computed by scikit-learn and SciPy."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor

NAMES = ("accuracy", "f1", "matthews", "pearson", "spearman")


def score(names: tuple[str, ...], outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """outputs (B, classes), or (B, 1) where labels (B,) are scores."""
    answers = outputs.squeeze(1) if labels.is_floating_point() else outputs.argmax(1)
    return {name: _metric(name, labels.float().numpy(), answers.float().numpy()) for name in names}


def _metric(name: str, truth: Any, answers: Any) -> float:
    if name == "accuracy":
        return float((truth == answers).mean())
    from scipy import stats
    from sklearn import metrics

    functions = {
        "f1": lambda: metrics.f1_score(truth, answers, zero_division=0.0),  # of class 1
        "matthews": lambda: metrics.matthews_corrcoef(truth, answers),
        "pearson": lambda: stats.pearsonr(truth, answers).statistic,
        "spearman": lambda: stats.spearmanr(truth, answers).statistic,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant answers: no correlation is defined
        value = float(functions[name]())
    return 0.0 if math.isnan(value) else value
