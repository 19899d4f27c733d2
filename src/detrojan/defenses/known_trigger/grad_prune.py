"""Grad-Prune: remove the filters that most want to unlearn the trigger, then fine-tune.

Source: Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Unlearning Backdoor Attacks through
Gradient-Based Model Pruning", 2024 (arXiv 2405.03918), and its authors' code. The defender knows the
trigger: it stamps copies of its own images, with their true labels, as the paper evaluates it. The
steps, and what departs from the code under which protocol, stand in
:mod:`detrojan.defenses._parts.gradient_pruning`.
"""

import copy
from typing import ClassVar

import torch
from torch import nn

from detrojan import rng as streams
from detrojan.defenses._parts.gradient_pruning import GradientPruning
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample


class GradPrune(GradientPruning):
    """Gradient-based pruning with the trigger known."""

    smoke: ClassVar[dict[str, object]] = {"max_rounds": 3, "max_epochs": 2, "patience": 2}

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a pruned and fine-tuned copy of ``model``; without ``regrow`` pruned filters stay zero."""
        triggered = clean.triggered
        if triggered is None:
            raise NotApplicableError("Grad-Prune needs triggered copies of the sample: no attack, no trigger")
        repaired = copy.deepcopy(model).eval()
        filters, limit = self.candidates(repaired, clean.train), self.limit(repaired, clean)
        scored = self.scored_rows(clean.train, rng=streams.child(rng, "scored"))
        self.prune(repaired, filters, limit, triggered, scored, rng=streams.child(rng, "prune"))
        tuned = self.tune(repaired, filters, clean, triggered, rng=streams.child(rng, "tune"))
        pruned = filters.removed_names()
        clean.chosen.update(
            {
                "num_pruned": len(pruned),
                "pruned": pruned,
                **filters.adapted,
                "num_judged": len(limit.images),
                "allowed_errors": limit.allowed,
                "tuning_epoch": tuned.epoch,
                "tuning_capped": tuned.capped,
            }
        )
        return repaired
