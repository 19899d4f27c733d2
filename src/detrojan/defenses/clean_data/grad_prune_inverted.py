"""Grad-Prune without the trigger: prune and fine-tune against triggers found by inversion, round by round.

Source: Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Unlearning Backdoor Attacks through
Gradient-Based Model Pruning", 2024 (arXiv 2405.03918), for pruning and tuning
(:mod:`detrojan.defenses._parts.gradient_pruning`); Wang et al., "Neural Cleanse", IEEE S&P 2019, for the
triggers (:mod:`detrojan.defenses._parts.inversion`). The paper's method knows the trigger. This variant
is ours, for a defender who doesn't, so its results belong beside ``grad_prune`` and never among them.

An inverted trigger can be another shortcut to the target than the real one, and unlearning it then leaves
the backdoor open. So each round inverts the model that the last one repaired, and adds the trigger of the
flagged class with the smallest mask to a pool; every image, validation images too, is stamped with a
random member. It ends when no class is flagged any more. If none is flagged in the first round, the
smallest mask is taken all the same and the record says so. Inversion sees the training split only. The
drop of accuracy that bounds pruning counts from the model as it came, over all rounds together.
"""

import copy
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from detrojan import rng as streams
from detrojan.defenses._parts.gradient_pruning import GradientPruning
from detrojan.defenses._parts.inversion import TriggerInversion, stamp
from detrojan.images import DefenderSample, ImageSet, TriggeredSample, to_device


class GradPruneInverted(GradientPruning, TriggerInversion):
    """Gradient-based pruning against a growing pool of inverted triggers."""

    smoke: ClassVar[dict[str, object]] = {
        "max_inversions": 2,
        "max_rounds": 1,
        "max_epochs": 1,
        "inversion_epochs": 1,
        "min_steps": 1,
        "max_images": 1,
    }

    max_inversions: int = Field(5, ge=1, description="rounds of inversion, pruning and fine-tuning, at most")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a pruned and fine-tuned copy of ``model``; without ``regrow`` pruned filters stay zero."""
        repaired = copy.deepcopy(model).eval()
        filters, limit = self.candidates(repaired, clean.train), self.limit(repaired, clean)
        scored = self.scored_rows(clean.train, rng=streams.child(rng, "scored"))
        masks, patterns = [], []
        searches: list[dict[str, object]] = []
        labels, num_pruned, epochs, capped = [], [], [], []
        for number in range(self.max_inversions):
            stream = streams.child(rng, "round", number)
            triggers = self.invert(repaired, clean.train, rng=streams.child(stream, "invert"))
            searches.append(triggers.summary(self.anomaly_threshold))
            flagged = triggers.flagged(self.anomaly_threshold)
            if not flagged and number > 0:
                break
            label = flagged[0] if flagged else triggers.smallest()
            masks.append(triggers.masks[label])
            patterns.append(triggers.patterns[label])
            triggered = _stamped(
                clean, torch.stack(masks), torch.stack(patterns), streams.child(stream, "members")
            )
            self.prune(repaired, filters, limit, triggered, scored, rng=streams.child(stream, "prune"))
            tuned = self.tune(repaired, filters, clean, triggered, rng=streams.child(stream, "tune"))
            labels.append(label)
            num_pruned.append(len(filters.removed_names()))
            epochs.append(tuned.epoch)
            capped.append(tuned.capped)
        clean.chosen.update({key: [search[key] for search in searches] for key in searches[0]})
        clean.chosen.update(
            {
                "trigger_label": labels,
                "any_flagged": bool(searches[0]["flagged"]),
                "num_pruned": num_pruned,
                "pruned": filters.removed_names(),
                **filters.adapted,
                "num_judged": len(limit.images),
                "allowed_errors": limit.allowed,
                "tuning_epoch": epochs,
                "tuning_capped": capped,
                "outcome": "no class flagged" if len(searches) > len(labels) else "last round",
            }
        )
        return repaired


def _stamped(clean: DefenderSample, masks: Tensor, patterns: Tensor, rng: torch.Generator) -> TriggeredSample:
    """Return copies of all images, each stamped with a random one of the triggers."""

    def copies(images: ImageSet) -> ImageSet:
        members = torch.randint(len(masks), (len(images),), generator=rng)
        return stamp(images, masks, patterns, to_device(members, images.device))

    return TriggeredSample(copies(clean.train), copies(clean.validation))
