"""Models with one number a position: the value model of the learner and the reward model of the scorers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from rlhf_dist.engines.loading import load_model, set_mode
from rlhf_dist.engines.packing import choose_packing
from rlhf_dist.engines.settings import Batching
from rlhf_dist.errors import ModelError
from rlhf_dist.experience.sequences import SequenceBatch


class ScalarModel(nn.Module):
    """A transformer's hidden states and a linear head.

    From a sequence classifier it takes over the head; from any other checkpoint it starts with a head
    of zeros.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: torch.dtype,
        role: str,
        batching: Batching = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if is_sequence_classifier(model):
            classifier = load_model(AutoModelForSequenceClassification, model, dtype=dtype, role=role)
            if classifier.config.num_labels != 1:
                raise ModelError(
                    f"{role} model {model!r} has {classifier.config.num_labels} labels; a score is one "
                    "number, so it must have num_labels=1"
                )
            if not isinstance(getattr(classifier, "score", None), nn.Linear):
                raise ModelError(
                    f"{role} model {model!r} ({type(classifier).__name__}) has no linear head `score` on the "
                    "last token; sequence classifiers of decoder-only families have one"
                )
            self.backbone = getattr(classifier, classifier.base_model_prefix)
            head_weight = classifier.score.weight.detach()
        else:
            self.backbone = load_model(AutoModel, model, dtype=dtype, role=role)
            head_weight = torch.zeros(1, self.backbone.get_input_embeddings().embedding_dim, dtype=dtype)
        self.head = nn.Linear(head_weight.shape[1], 1, dtype=dtype)
        with torch.no_grad():
            self.head.weight.copy_(head_weight)
            self.head.bias.zero_()
        set_mode(self.backbone, gradient_checkpointing=gradient_checkpointing)
        self.packs = choose_packing(self.backbone, batching, f"{role} model {model!r}")

    def scalars(self, batch: SequenceBatch) -> torch.Tensor:
        """[R, C] float32: one number a position of the batch's rows."""
        hidden = self.backbone(**batch.inputs()).last_hidden_state
        return self.head(hidden).squeeze(-1).float()


class ValueModel(ScalarModel):
    """The critic."""

    def forward(self, batch: SequenceBatch) -> torch.Tensor:
        """[B, T] values: entry t belongs to the state before response token t; zero beyond the end."""
        return batch.responses(self.scalars(batch)[:, batch.kept])


class RewardModel(ScalarModel):
    """A trained sequence classifier with one label."""

    def __init__(self, model: str, *, dtype: torch.dtype, batching: Batching = "auto") -> None:
        if not is_sequence_classifier(model):
            raise ModelError(
                f"reward model {model!r} is not a sequence classifier (config.json: architectures); "
                "its score head would be random"
            )
        super().__init__(model, dtype=dtype, role="reward", batching=batching)

    def forward(self, batch: SequenceBatch) -> torch.Tensor:
        """[B] scores: the number at each sequence's last token."""
        return batch.last(self.scalars(batch))


def is_sequence_classifier(model: str) -> bool:
    """Whether a checkpoint says of itself that it is a sequence classifier."""
    architectures = AutoConfig.from_pretrained(model).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)
