"""Models with one number a position: the value model of the learner and the reward model of the scorers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from rlhf_dist.engines.loading import load_model, set_mode
from rlhf_dist.engines.policy_model import align_responses
from rlhf_dist.errors import ModelError


class ScalarModel(nn.Module):
    """A transformer's hidden states and a linear head.

    From a sequence classifier it takes over the head; from any other checkpoint it starts with a head
    of zeros.
    """

    def __init__(
        self, model: str, *, dtype: torch.dtype, role: str, gradient_checkpointing: bool = False
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

    def scalars(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, S] float32: one number a position."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden).squeeze(-1).float()


class ValueModel(ScalarModel):
    """The critic."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        response_start: torch.Tensor,
        response_length: torch.Tensor,
    ) -> torch.Tensor:
        """[B, T] values: entry t belongs to the state before response token t; zero beyond the end."""
        scalars = self.scalars(input_ids, attention_mask)
        return align_responses(scalars, response_start - 1, response_length)


class RewardModel(ScalarModel):
    """A trained sequence classifier with one label."""

    def __init__(self, model: str, *, dtype: torch.dtype) -> None:
        if not is_sequence_classifier(model):
            raise ModelError(
                f"reward model {model!r} is not a sequence classifier (config.json: architectures); "
                "its score head would be random"
            )
        super().__init__(model, dtype=dtype, role="reward")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B] scores: the number at each row's last token. Rows are padded on the right."""
        last = attention_mask.sum(dim=1, keepdim=True) - 1
        return self.scalars(input_ids, attention_mask).gather(1, last).squeeze(1)


def is_sequence_classifier(model: str) -> bool:
    """Whether a checkpoint says of itself that it is a sequence classifier."""
    architectures = AutoConfig.from_pretrained(model).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)
