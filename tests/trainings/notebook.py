"""What a user does in a notebook, cell by cell; `test_notebook.py` runs it from top to bottom.

The cells import what they need and nothing of the tests. Takes about 17 s of CPU.
"""
# ruff: noqa: E402

# %% Pairs of one's own: a list of dicts, a datasets.Dataset or a DataFrame
import itertools

import rcpo

NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
pairs = [
    {
        "prompt": f"{name} has {NUMBERS[a]} {item} and gets {NUMBERS[b]} more . how many ?",
        "chosen": f" {name} has {NUMBERS[a + b]} {item} now .",
        "rejected": f" {name} has {NUMBERS[a + b + 1]} {item} now .",
    }
    for name, item, a, b in itertools.product(("alice", "bob"), ("apples", "coins"), range(1, 6), range(1, 6))
]

# %% Two runs: the words of the command line, and rows
common = ["objective=dpo", "train.steps=30", "train.eval_every=10", "data.eval_pairs=20", "tracking=none"]
off = rcpo.train(*common, "calibration=off", pairs=pairs)
on = rcpo.train(*common, "calibration=on", pairs=pairs)
print(off, on, sep="\n")
assert off.status == on.status == "done"

# %% Their numbers are pandas tables
assert list(on.metrics["step"]) == list(range(1, 31))
assert list(on.eval["step"]) == [0, 10, 20, 30]
assert on.metrics["calibration/alpha"].iloc[0] == 1
assert on.metrics["calibration/alpha"].iloc[-1] != 1
fallen = on.pairs.nsmallest(3, "r_w")
print(fallen[["prompt", "chosen", "r_w", "r_l"]].to_string())
assert abs(on.pairs["r_w"].mean() - on.eval["displacement/chosen"].iloc[-1]) < 1e-4
assert on.summary["end_chosen"] == on.eval["displacement/chosen"].iloc[-1]
assert on.config.calibration.name == "on"

# %% Side by side
comparison = rcpo.compare([off, on])
print(comparison.table[["objective", "calibration", "chosen", "rejected", "vs_off"]])
table = comparison.table.set_index("calibration")
assert abs(table.loc["on", "vs_off"] - table.loc["on", "chosen"] + table.loc["off", "chosen"]) < 1e-6
comparison.html("report.html", ches="no")

# %% A plot
import matplotlib

matplotlib.use("Agg")
axes = on.eval.plot(x="step", y=["displacement/chosen", "displacement/rejected"])
axes.figure.savefig("plot.png")

# %% The model, as transformers has it
model, tokenizer = on.model(), on.tokenizer()
prompt = tokenizer("bob has two apples and gets three more . how many ?", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]))

# %% An objective of one's own, in a file: calibrated at once, and started ranks and resumed runs find it
from pathlib import Path

Path("my_losses.py").write_text(
    '''
from dataclasses import dataclass

import torch.nn.functional as F

import rcpo


@dataclass(frozen=True)
class MyConfig:
    beta: float = 0.1
    pull: float = 0.05


@rcpo.objectives.register("my_loss", MyConfig, needs_reference=True)
def my_loss(pair, config):
    """-log sigmoid(beta * mt) - pull * r_w, per pair (B,)."""
    return -F.logsigmoid(config.beta * pair.margin()) - config.pull * pair.r_w
'''
)
mine = ["objective.module=my_losses.py", "objective=my_loss", "objective.pull=0.1"]
own = rcpo.train(*mine, *common[1:], "calibration=on", pairs=pairs)
assert own.config.objective["beta"] == 0.1
longer = own.resume(["train.steps=33"])
assert longer.metrics["step"].iloc[-1] == 33

# %% A training loop of one's own, with rcpo's alpha in it
import torch

torch.manual_seed(0)
start = on.model()
model = on.model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


def summed_logps(
    net: torch.nn.Module, rows: list[dict[str, str]], side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """z of each row and its length, (B,) both."""
    values, sizes = [], []
    for row in rows:
        prompt, answer = (tokenizer(row[part], return_tensors="pt").input_ids for part in ("prompt", side))
        logits = net(torch.cat([prompt, answer], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
        values.append(logits.float().log_softmax(-1).gather(1, answer[0, :, None]).sum())
        sizes.append(answer.shape[1])
    return torch.stack(values), torch.tensor(sizes)


calibrator = rcpo.Calibrator("on", "dpo", head=model.get_output_embeddings(), every=1)
for step in range(5):
    batches = [pairs[8 * step : 8 * step + 4], pairs[8 * step + 4 : 8 * step + 8]]
    for batch in batches:
        (z_w, len_w), (z_l, len_l) = (summed_logps(model, batch, side) for side in ("chosen", "rejected"))
        with torch.no_grad():
            ref_w, ref_l = (summed_logps(start, batch, side)[0] for side in ("chosen", "rejected"))
        loss = calibrator.surrogate(z_w, z_l, ref_w, ref_l, len_w, len_l)
        (loss / len(batches)).backward()
    row = calibrator.update()
    optimizer.step()
    optimizer.zero_grad()
    print({key: round(row[key], 4) for key in ("step", "train/loss", "calibration/alpha", "band/center")})
assert row["calibration/alpha"] != 1
