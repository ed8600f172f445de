"""Which of two sources a response comes from: a classifier's probabilities, for DoRA's weights
(arXiv 2504.05831).

Owns features, the classifier and what is measured of it. Probabilities are out of fold: no response is judged
by a classifier that has seen its row. scikit-learn trains and calibrates. Reads no files;
`rcpo.commands.weigh` does, and `rcpo.records.weights` makes weights of what it writes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from rcpo.common.errors import UserError

if TYPE_CHECKING:
    from rcpo.common.console import RunConsole

CALIBRATIONS = {"platt": "sigmoid", "isotonic": "isotonic"}
"""How probabilities are calibrated, and scikit-learn's word for it."""
NGRAMS, HASHED = (1, 2), 2**16
"""Words and pairs of words, hashed to so many columns: no vocabulary to keep."""
LEAST, BINS, TOKENS = 1e-6, 10, 512
"""p stays in [LEAST, 1 - LEAST], as a weight needs p > 0. Bins of the ECE. Tokens that an encoder reads."""


class Reliability(NamedTuple):
    """What out-of-fold probabilities are worth, of responses whose source is known."""

    predicted: np.ndarray
    """Mean p of each bin that has responses."""
    observed: np.ndarray
    """Share of them that are of the target."""
    counts: np.ndarray
    ece: float
    """Expected calibration error: sum over bins of count/n |observed - predicted|."""
    auc: float
    """Chance that a response of the target has the higher p."""


def hashed_ngrams(texts: Sequence[str]) -> Any:
    """(n, HASHED), sparse: counts of words and pairs of words, each row of length 1."""
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(ngram_range=NGRAMS, n_features=HASHED, alternate_sign=False).transform(texts)


def encoded(texts: Sequence[str], path: str, batch: int = 16) -> np.ndarray:
    """(n, H): an encoder's last hidden states, averaged over each text's tokens. Any model that transformers
    loads as AutoModel. Raises UserError where it cannot."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModel.from_pretrained(path).eval()
    except Exception as error:  # whatever a client of the hub raises
        first = str(error).strip().split("\n")[0][:300]
        raise UserError(
            f"encoder={path}: cannot be loaded: {first}; give a model folder or hub id"
        ) from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            given = tokenizer(
                [text or " " for text in texts[start : start + batch]],
                return_tensors="pt", padding=True, truncation=True, max_length=TOKENS,
            )  # fmt: skip
            states = model(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"]
            ).last_hidden_state.float()
            mask = given["attention_mask"].unsqueeze(-1)
            rows.append(((states * mask).sum(1) / mask.sum(1).clamp_min(1)).numpy())
    return np.concatenate(rows)


def out_of_fold(
    features: Any,
    is_target: np.ndarray,
    rows: np.ndarray,
    num_folds: int,
    calibration: Literal["platt", "isotonic"],
    seed: int,
) -> np.ndarray:
    """P(target | response) (n,) at the data's own shares: logistic regression, calibrated by
    CalibratedClassifierCV inside each training part.

    is_target (n,): 1, 0, or -1 where the source is not known; such a response gets the mean of all folds.
    rows (n,): responses of one row are in one fold. Raises UserError where a source has too few rows.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = np.flatnonzero(is_target >= 0)
    for value, name in ((1, "the target"), (0, "the others")):
        num_rows = len(np.unique(rows[is_target == value]))
        if num_rows < 2 * num_folds:
            raise UserError(
                f"{num_rows} rows are of {name}, and {num_folds} folds need {2 * num_folds}; "
                "label more rows, or type folds=2"
            )
    p, unknown = np.zeros(len(is_target)), np.flatnonzero(is_target < 0)
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    for train, others in folds.split(known, is_target[known], rows[known]):
        model = LogisticRegression(max_iter=1000)
        if isinstance(features, np.ndarray):  # of an encoder, whose columns have any scale
            model = make_pipeline(StandardScaler(), model)
        inner = list(
            StratifiedGroupKFold(2, shuffle=True, random_state=seed).split(
                train, is_target[known[train]], rows[known[train]]
            )
        )
        fitted = CalibratedClassifierCV(model, method=CALIBRATIONS[calibration], cv=inner).fit(
            features[known[train]], is_target[known[train]]
        )
        p[known[others]] = fitted.predict_proba(features[known[others]])[:, 1]
        if len(unknown):
            p[unknown] += fitted.predict_proba(features[unknown])[:, 1] / num_folds
    return np.clip(p, LEAST, 1 - LEAST)


def at_equal_shares(p: np.ndarray, gamma: float) -> np.ndarray:
    """gamma p / (gamma p + 1 - p): the probability were both sources equally common, with gamma = others :
    target in what the classifier was trained on. Then (1-p)/p is the density ratio q_other/q_target."""
    return np.asarray(np.clip(gamma * p / (gamma * p + 1 - p), LEAST, 1 - LEAST))


def reliability(p: np.ndarray, is_target: np.ndarray) -> Reliability:
    """Of (n,) probabilities whose truth (n,) is 0 or 1, in BINS bins of equal width."""
    from sklearn.metrics import roc_auc_score

    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    there = counts > 0
    predicted = np.bincount(bins, p, BINS)[there] / counts[there]
    observed = np.bincount(bins, is_target, BINS)[there] / counts[there]
    ece = float(np.sum(counts[there] * np.abs(observed - predicted)) / len(p))
    return Reliability(predicted, observed, counts[there], ece, float(roc_auc_score(is_target, p)))


def features_of(texts: Sequence[str], encoder: str | None, console: "RunConsole | None" = None) -> Any:
    """Hashed n-grams, or what an encoder makes of the texts."""
    return hashed_ngrams(texts) if encoder is None else encoded(texts, encoder)
