"""PoNet for transformers: pre-training and fine-tuning heads, registered with the Auto classes.

After ``import cenote.integrations.ponet`` the classes ``AutoConfig``, ``AutoModel`` and ``AutoModelFor...`` of
transformers know the model type ``"ponet"``. Source: "PoNet: Pooling Network for Efficient Token Mixing in Long
Sequences" (arXiv 2110.02442).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert.modeling_bert import BertOnlyMLMHead, BertPreTrainingHeads
from transformers.utils import ModelOutput

from cenote.integrations.ponet_config import PoNetConfig
from cenote.integrations.ponet_encoder import PoNetModel, PoNetPreTrainedModel, finish

__all__ = [
    "PoNetConfig",
    "PoNetForMaskedLM",
    "PoNetForMultipleChoice",
    "PoNetForPreTraining",
    "PoNetForQuestionAnswering",
    "PoNetForSequenceClassification",
    "PoNetForTokenClassification",
    "PoNetModel",
    "PoNetPreTrainedModel",
]

_TIED = {
    "cls.predictions.decoder.weight": "ponet.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def _head(answer: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of a head, made of what it does with the encoder's output and its labels.

    The signature names all inputs: transformers' Trainer reads there which columns of a data set a model takes.
    """
    encoder = list(inspect.signature(PoNetModel.forward).parameters.values())
    labels = list(inspect.signature(answer).parameters.values())[2:]
    names = [each.name for each in labels]

    @functools.wraps(answer)
    def forward(
        self: _Head,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        own = {name: inputs.pop(name) for name in names if name in inputs}
        read = self._read(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        return finish(self, answer(self, read, **own), return_dict)

    named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*encoder[3:], *labels)]
    forward.__signature__ = inspect.Signature([*encoder[:3], *named])  # type: ignore[attr-defined]
    return forward


class _Head(PoNetPreTrainedModel):
    """What reads the encoder's output."""

    ponet: PoNetModel

    def _read(self, **inputs: Any) -> Any:
        return self.ponet(return_dict=True, **inputs)


@dataclass
class PoNetForPreTrainingOutput(ModelOutput):
    """Loss, logits of masked tokens ``(batch, tokens, vocabulary)`` and of the sentence structure ``(batch, 3)``."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class _LanguageModel(_Head):
    """What has a word for every token."""

    _tied_weights_keys = _TIED
    cls: Any

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias


class PoNetForPreTraining(_LanguageModel):
    """Masked tokens, and the sentence structure objective: what became of the second half of a text.

    ``loss = CE(masked tokens) + CE(structure)``, of which either is left out without its labels. Structure labels are
    0 (B follows A), 1 (A and B change places) and 2 (B is from elsewhere), see
    :mod:`cenote.integrations.ponet_data`.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.ponet = PoNetModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.cls.seq_relationship = nn.Linear(config.hidden_size, config.num_segment_labels)
        self.post_init()

    @_head
    def forward(self, read: Any, labels: Tensor | None = None, next_sentence_label: Tensor | None = None) -> Any:
        """``labels`` as of BERT, -100 where no token is asked for; other inputs as of :class:`PoNetModel`."""
        words, structure = self.cls(read.last_hidden_state, read.pooler_output)
        losses = []
        if labels is not None:
            losses.append(F.cross_entropy(words.flatten(0, 1).float(), labels.flatten()))
        if next_sentence_label is not None:
            losses.append(F.cross_entropy(structure.float(), next_sentence_label.flatten()))
        loss = sum(losses[1:], losses[0]) if losses else None
        return PoNetForPreTrainingOutput(loss, words, structure, read.hidden_states, read.attentions)


class PoNetForMaskedLM(_LanguageModel):
    """Masked tokens alone."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.ponet = PoNetModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    @_head
    def forward(self, read: Any, labels: Tensor | None = None) -> Any:
        """``labels`` as of BERT, -100 where no token is asked for; other inputs as of :class:`PoNetModel`."""
        words = self.cls(read.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(words.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=words, hidden_states=read.hidden_states, attentions=read.attentions)


class _Classifier(_Head):
    """A dropout and a linear map behind the encoder."""

    pooled = True

    def __init__(self, config: PoNetConfig, answers: int | None = None) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.ponet = PoNetModel(config, add_pooling_layer=self.pooled)
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 2) if answers is None else answers)
        self.post_init()


class PoNetForSequenceClassification(_Classifier):
    """A class, several, or numbers for each text, from the pooled first token."""

    @_head
    def forward(self, read: Any, labels: Tensor | None = None) -> Any:
        """``labels`` ``(batch,)`` or, for several answers, ``(batch, labels)``, by ``config.problem_type``."""
        logits = self.classifier(self.dropout(read.pooler_output))
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss, logits, read.hidden_states, read.attentions)


class PoNetForTokenClassification(_Classifier):
    """A class for each token, as in topic segmentation."""

    pooled = False

    @_head
    def forward(self, read: Any, labels: Tensor | None = None) -> Any:
        """``labels`` ``(batch, tokens)``, -100 where none is asked for."""
        logits = self.classifier(self.dropout(read.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss, logits, read.hidden_states, read.attentions)


class PoNetForMultipleChoice(_Classifier):
    """One of several texts, each ``(batch, choices, tokens)`` of the input."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config, answers=1)

    @_head
    def forward(self, read: Any, labels: Tensor | None = None) -> Any:
        """``labels`` ``(batch,)``, the choice that is right."""
        logits = self.classifier(self.dropout(read.pooler_output)).squeeze(-1)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return MultipleChoiceModelOutput(loss, logits, read.hidden_states, read.attentions)

    def _read(self, **inputs: Any) -> Any:
        """Every choice as a text of its own; ``pooler_output`` is ``(batch, choices, dim)``."""
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        if not tensors:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        choices = next(iter(tensors.values())).shape[1]
        read = super()._read(**inputs | {name: value.flatten(0, 1) for name, value in tensors.items()})
        read.pooler_output = read.pooler_output.unflatten(0, (-1, choices))
        return read


class PoNetForQuestionAnswering(_Head):
    """First and last token of the answer."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.num_labels = 2
        self.ponet = PoNetModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @_head
    def forward(self, read: Any, start_positions: Tensor | None = None, end_positions: Tensor | None = None) -> Any:
        """Positions ``(batch,)``; one beyond the tokens counts as no answer and is not asked for."""
        start, end = self.qa_outputs(read.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss, start, end, read.hidden_states, read.attentions)


def _register() -> None:
    transformers.AutoConfig.register("ponet", PoNetConfig, exist_ok=True)
    heads = {
        "AutoModel": PoNetModel,
        "AutoModelForPreTraining": PoNetForPreTraining,
        "AutoModelForMaskedLM": PoNetForMaskedLM,
        "AutoModelForSequenceClassification": PoNetForSequenceClassification,
        "AutoModelForTokenClassification": PoNetForTokenClassification,
        "AutoModelForMultipleChoice": PoNetForMultipleChoice,
        "AutoModelForQuestionAnswering": PoNetForQuestionAnswering,
    }
    for name, model in heads.items():
        getattr(transformers, name).register(PoNetConfig, model, exist_ok=True)


_register()
