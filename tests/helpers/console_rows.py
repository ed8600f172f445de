"""Rows as a run gives them to its console."""

EVALUATION = {
    "step": 150,
    "displacement/chosen": -11.234,
    "displacement/rejected": -12.5,
    "displacement/accuracy": 0.789,
    "displacement/chosen_down": 0.9375,
}


def step_row(step: int, alpha: float = 1.25) -> dict[str, float]:
    return {
        "step": step,
        "train/loss": 0.5,
        "displacement/chosen": -0.25 * step,
        "displacement/rejected": -1.0,
        "calibration/alpha": alpha,
        "band/inside": float(step % 2 == 0),
        "speed/pairs_per_second": 480.4,
    }
