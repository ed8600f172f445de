"""How the formula of an objective is read: switches that many objectives share, and that no formula names.

Owns their meaning on numbers. `rcpo.objectives.composition` owns their keys; `PairLogProbs` carries a reading
to the formula, which asks it for the loss of a logit, for what stands for a log-ratio, and for the likelihood
term. A formula that asks for none of these is not changed by the switch, and the switch is then refused.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpo.objectives.numerics import exp_linear, expm1_linear

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
SFT_MEANS = (None, "sum", "pairs", "tokens")
SFT_OF = ("response", "plain", "text", "gold")


@dataclass(frozen=True)
class Reading:
    """Without arguments: every formula as it is written."""

    reference_free: bool = False
    """ref_w and ref_l are 0, and no reference is computed for the loss."""
    label_smoothing: float = 0.0
    """Share s of pairs whose labels are taken to be swapped."""
    divergence: str = "reverse_kl"
    """f, by which the policy is held to the reference."""
    divergence_alpha: float = 0.0
    """Of divergence=alpha."""
    sft_mean: str | None = None
    """What the likelihood term is a mean over; None: as the formula has it."""
    sft_of: str = "response"
    """What the likelihood term is of: the chosen response as the loss reads it (response) or by itself, all
    its tokens alike (plain), the text of prompt and chosen response, or a gold response beside the two."""

    @property
    def sft_is_beside(self) -> bool:
        """Whether the likelihood term is wholly of a text beside the two responses, and so of neither
        side."""
        return self.sft_of in ("plain", "gold")

    def sigmoid_loss(self, logit: Tensor) -> Tensor:
        """-(1-s) log sigmoid(logit) - s log sigmoid(-logit), elementwise."""
        loss = -F.logsigmoid(logit)
        share = self.label_smoothing
        return loss if share == 0 else (1 - share) * loss - share * F.logsigmoid(-logit)

    def of_ratio(self, r: Tensor) -> Tensor:
        """f'(e^r) without its constant, elementwise: what a policy optimal under the divergence f has in the
        place of the log-ratio r (Wang et al. 2023, arXiv 2309.16240). Both exponentials are linear beyond
        exponent 30.

            reverse_kl  r                             forward_kl  1 - e^(-r)
            js          log 2 + log sigmoid(r)        alpha       (e^((a-1) r) - 1) / (a-1)
        """
        if self.divergence == "forward_kl":
            return 1 - exp_linear(-r)
        if self.divergence == "js":
            return math.log(2) + F.logsigmoid(r)
        if self.divergence == "alpha":
            return expm1_linear((self.divergence_alpha - 1) * r) / (self.divergence_alpha - 1)
        return r

    def references(self, ref_w: Tensor, ref_l: Tensor) -> tuple[Tensor, Tensor]:
        """ref_w and ref_l as the formula sees them."""
        if self.reference_free:
            return torch.zeros_like(ref_w), torch.zeros_like(ref_l)
        return ref_w, ref_l


AS_WRITTEN = Reading()
