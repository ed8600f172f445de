"""An objective, tried out on three pairs: of a user's own mistakes that a run would show late, or never; of
any whether it takes single answers.

Called by `rcpo.objectives.registry` whenever a user's own is loaded; takes a millisecond. rcpo's own are
tested instead.
"""

import torch
from torch import Tensor

from rcpo.common.errors import UserError
from rcpo.objectives.loss import Objective, PairLogProbs

PAIRS = PairLogProbs(
    z_w=torch.tensor([-12.0, -35.0, -20.5]),
    z_l=torch.tensor([-14.0, -30.0, -22.0]),
    ref_w=torch.tensor([-13.0, -34.0, -20.0]),
    ref_l=torch.tensor([-13.5, -31.0, -20.5]),
    len_w=torch.tensor([6.0, 15.0, 9.0]),
    len_l=torch.tensor([7.0, 12.0, 11.0]),
    likely=torch.tensor([-8.0, -3.0, -11.0]),
    likely_tokens=torch.tensor([4.0, 2.0, 5.0]),
)


def try_out(objective: Objective) -> None:
    """Raise UserError where the loss cannot be trained on: it fails, is no number a pair, has no derivative,
    joins the pairs of a batch, reads a reference that it says it does not need, or wants mismatched pairs
    weighed token by token."""
    if objective.weighs_tokens and objective.needs_mismatched:
        raise _fault(
            objective, "it weighs tokens, which mismatched pairs are not scored by; leave one of the two out"
        )
    pairs = PAIRS._replace(z_w=PAIRS.z_w.clone().requires_grad_(), z_l=PAIRS.z_l.clone().requires_grad_())
    loss = _loss(objective, pairs)
    if not (loss.requires_grad and loss.is_floating_point()):
        raise _fault(objective, "its loss has no derivative by z_w or z_l; compute it from them, in torch")
    state = objective.initial_state(20.0)
    pairs = PAIRS._replace(state=state)
    together = _loss(objective, pairs)
    alone = [_loss(objective, _alone(idx)._replace(state=state)) for idx in range(len(together))]
    if not torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-5, equal_nan=True):
        raise _fault(
            objective,
            "the loss of a pair depends on the other pairs of its batch, so that it would change with how a "
            "batch is split; use a BatchStatistic",
        )
    if objective.needs_reference:
        return
    moved = pairs._replace(ref_w=pairs.ref_w - 1, ref_l=pairs.ref_l + 1)
    if not torch.equal(_loss(objective, moved), together):
        raise _fault(objective, "it reads ref_w or ref_l; register it with needs_reference=True")


def losses_of_trial(objective: Objective) -> Tensor:
    """The losses of the three pairs, at the start of a run."""
    return objective(PAIRS)


def takes_single_answers(objective: Objective) -> bool:
    """Whether the loss is a sum of two, each of one response alone, tried out on three pairs: of a pair
    without its rejected response it is one of them, of a pair without its chosen one the other."""
    if objective.match is not None or objective.ld_alpha != 1:
        return False
    pairs = PAIRS._replace(state=objective.initial_state(20.0))
    there, missing = torch.ones(3), torch.zeros(3)

    def loss_of(pairs: PairLogProbs, has_w: Tensor, has_l: Tensor) -> Tensor:
        return objective(pairs._replace(present=(has_w, has_l)))

    of_chosen, of_rejected = loss_of(pairs, there, missing), loss_of(pairs, missing, there)
    other_l = pairs._replace(z_l=pairs.z_l - 1, ref_l=pairs.ref_l + 1, len_l=pairs.len_l + 1)
    other_w = pairs._replace(z_w=pairs.z_w - 1, ref_w=pairs.ref_w + 1, len_w=pairs.len_w + 1)
    return (
        torch.equal(loss_of(other_l, there, missing), of_chosen)
        and torch.equal(loss_of(other_w, missing, there), of_rejected)
        and torch.allclose(of_chosen + of_rejected, objective(pairs), rtol=1e-4, atol=1e-5)
    )


def labels_read(objective: Objective) -> tuple[bool, bool]:
    """Whether a loss that takes single answers pulls chosen ones, and rejected ones, tried out on three."""
    z_w, z_l = PAIRS.z_w.clone().requires_grad_(), PAIRS.z_l.clone().requires_grad_()
    pairs = PAIRS._replace(z_w=z_w, z_l=z_l, state=objective.initial_state(20.0))
    pulls = torch.autograd.grad(objective(pairs).sum(), (z_w, z_l), allow_unused=True, materialize_grads=True)
    return bool(pulls[0].any()), bool(pulls[1].any())


def _alone(idx: int) -> PairLogProbs:
    one = slice(idx, idx + 1)
    z_w, z_l, ref_w, ref_l, len_w, len_l = PAIRS[:6]
    return PairLogProbs(z_w[one], z_l[one], ref_w[one], ref_l[one], len_w[one], len_l[one])


def _loss(objective: Objective, pairs: PairLogProbs) -> Tensor:
    try:
        loss = objective(pairs)
    # A function of the user's: anything can go wrong in it.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise _fault(objective, f"it fails on three pairs ({reason}); mend it") from None
    num_pairs = len(pairs.z_w)
    if not isinstance(loss, Tensor) or loss.shape != (num_pairs,):
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise _fault(
            objective, f"gave {what} for {num_pairs} pairs; return one loss a pair, (B,), without their mean"
        )
    return loss


def _fault(objective: Objective, text: str) -> UserError:
    return UserError(f"objective={objective.name}: {text}")
