"""PoNet as a model of transformers: keys, files, Auto classes, padding, training."""

import inspect

import pytest
import torch
import transformers
from safetensors import safe_open

from cenote.integrations.ponet import (
    PoNetConfig,
    PoNetForMaskedLM,
    PoNetForMultipleChoice,
    PoNetForPreTraining,
    PoNetForQuestionAnswering,
    PoNetForSequenceClassification,
    PoNetForTokenClassification,
    PoNetModel,
)
from cenote.integrations.ponet_data import PoNetCollator, encode_sentences, sentence_pairs

CLS, SEP, PAD, MASK, WORDS = 1, 2, 0, 3, list(range(4, 40))
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
         "max_position_embeddings": 24, "special_token_ids": [CLS, SEP], "pad_token_id": PAD}  # fmt: skip
HEADS = {
    "AutoModel": PoNetModel,
    "AutoModelForPreTraining": PoNetForPreTraining,
    "AutoModelForMaskedLM": PoNetForMaskedLM,
    "AutoModelForSequenceClassification": PoNetForSequenceClassification,
    "AutoModelForTokenClassification": PoNetForTokenClassification,
    "AutoModelForMultipleChoice": PoNetForMultipleChoice,
    "AutoModelForQuestionAnswering": PoNetForQuestionAnswering,
}


def config(**settings):
    return PoNetConfig(**{**SIZES, **settings})


def sharp(model):
    """Weights large enough that a difference shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def rows():
    ids = torch.tensor([[CLS, 5, 6, SEP, 7, 8, 9, SEP], [CLS, 10, SEP, 11, SEP, PAD, PAD, PAD]])
    return ids, (ids != PAD).long()


def published_keys(layers=12):
    """Names of the published pre-training checkpoint, as the specification lists them."""
    names = [f"ponet.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    pairs = ["ponet.embeddings.LayerNorm", "ponet.pooler.dense", "cls.predictions.transform.dense",
             "cls.predictions.transform.LayerNorm", "cls.seq_relationship"]  # fmt: skip
    for layer in range(layers):
        place = f"ponet.encoder.layer.{layer}"
        maps = [f"attention.self.dense_{name}" for name in ("q", "k", "o", "segment", "local")]
        rest = ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense",
                "output.LayerNorm"]  # fmt: skip
        pairs += [f"{place}.{name}" for name in maps + rest]
    names += [f"{pair}.{kind}" for pair in pairs for kind in ("weight", "bias")]
    return {*names, "cls.predictions.bias", "cls.predictions.decoder.weight"}


def test_keys_and_shapes_of_the_published_base_model():
    with torch.device("meta"):
        model = PoNetForPreTraining(PoNetConfig())
    state = model.state_dict()
    assert set(state) - published_keys() == {"cls.predictions.decoder.bias"}  # tied to cls.predictions.bias
    assert published_keys() <= set(state)
    width, inner = 768, 3072
    for name, tensor in state.items():
        if ".dense_" in name and name.endswith("weight"):
            assert tensor.shape == (width, width), name
    assert state["ponet.embeddings.word_embeddings.weight"].shape == (30522, width)
    assert state["ponet.embeddings.position_embeddings.weight"].shape == (512, width)
    assert state["ponet.encoder.layer.11.intermediate.dense.weight"].shape == (inner, width)
    assert state["cls.seq_relationship.weight"].shape == (3, width)
    # The encoder, with pooler and without heads; about 124 million as published.
    count = sum(p.numel() for p in model.ponet.parameters())
    layer = 6 * width**2 + 6 * width + 2 * width * inner + width + inner + 4 * width
    assert count == 12 * layer + (30522 + 512 + 2 + 2) * width + width**2 + width
    assert 123e6 < count < 125e6


@pytest.mark.parametrize("buffers", [False, True])
def test_published_files_load_whole(tmp_path, buffers):
    model = sharp(PoNetForPreTraining(config()))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key: value for key, value in state.items() if "decoder" not in key}
    state["cls.predictions.decoder.weight"] = state["ponet.embeddings.word_embeddings.weight"]
    if buffers:  # as older transformers wrote them
        state["ponet.embeddings.position_ids"] = torch.arange(24)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded, info = PoNetForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids, mask = rows()
    torch.testing.assert_close(loaded.eval()(ids, attention_mask=mask).prediction_logits,
                               model(ids, attention_mask=mask).prediction_logits)  # fmt: skip


@pytest.mark.parametrize("auto", HEADS)
def test_auto_classes_files_and_gradients(auto, tmp_path):
    made = getattr(transformers, auto).from_config(config(num_labels=2))
    assert type(made) is HEADS[auto]
    sharp(made).save_pretrained(tmp_path)
    again = getattr(transformers, auto).from_pretrained(tmp_path).eval()
    assert type(again) is HEADS[auto]
    differ = {name for name, value in again.config.to_dict().items() if made.config.to_dict().get(name) != value}
    assert differ <= {"_name_or_path"}
    assert transformers.AutoConfig.from_pretrained(tmp_path).special_token_ids == [CLS, SEP]
    ids, mask = rows()
    given = {"input_ids": ids, "attention_mask": mask}
    labels = {
        "AutoModel": {},
        "AutoModelForPreTraining": {"labels": ids, "next_sentence_label": torch.tensor([2, 0])},
        "AutoModelForMaskedLM": {"labels": ids},
        "AutoModelForSequenceClassification": {"labels": torch.tensor([1, 0])},
        "AutoModelForTokenClassification": {"labels": ids % 2},
        "AutoModelForMultipleChoice": {"labels": torch.tensor([1])},
        "AutoModelForQuestionAnswering": {"start_positions": torch.tensor([1, 1]),
                                          "end_positions": torch.tensor([2, 1])},
    }[auto]  # fmt: skip
    if auto == "AutoModelForMultipleChoice":
        given = {name: value[None] for name, value in given.items()}
    first, second = made(**given, **labels), again(**given, **labels)
    for a, b in zip(first.to_tuple(), second.to_tuple(), strict=True):
        torch.testing.assert_close(a, b)
    assert isinstance(made(**given, return_dict=False), tuple)
    if labels:
        first.loss.backward()
        silent = [name for name, p in made.named_parameters() if p.grad is None and "pooler" not in name]
        assert silent == []


def test_choices_are_texts_of_their_own():
    model = sharp(PoNetForMultipleChoice(config()))
    ids, mask = rows()
    given = {"input_ids": torch.stack([ids, ids.flip(0)]), "attention_mask": torch.stack([mask, mask.flip(0)])}
    labels = torch.tensor([1, 1])
    out = model(**given, labels=labels, output_hidden_states=False)
    single = model.classifier(model.ponet(ids, mask).pooler_output)[:, 0]
    torch.testing.assert_close(out.logits, torch.stack([single, single.flip(0)]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


@pytest.mark.parametrize("model", list(HEADS.values())[1:])
def test_heads_name_their_inputs_and_take_no_others(model):
    named = list(inspect.signature(model.forward).parameters)
    assert named[:3] == ["self", "input_ids", "attention_mask"]
    assert {"segment_ids", "special_mask", "inputs_embeds", "return_dict"} < set(named)
    assert ("labels" in named) == (model is not PoNetForQuestionAnswering)
    ids, mask = rows()
    with pytest.raises(TypeError, match="head_mask"):
        model(config())(ids, mask, head_mask=mask)


def test_losses_are_the_named_ones():
    model = sharp(PoNetForPreTraining(config()))
    ids, mask = rows()
    asked = torch.where(torch.arange(8) == 1, ids, -100)
    label = torch.tensor([2, 0])
    out = model(ids, attention_mask=mask, labels=asked, next_sentence_label=label)
    words = torch.nn.functional.cross_entropy(out.prediction_logits[:, 1], ids[:, 1])
    structure = torch.nn.functional.cross_entropy(out.seq_relationship_logits, label)
    torch.testing.assert_close(out.loss, words + structure)
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=asked).loss, words)
    assert model(ids, attention_mask=mask).loss is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(side):
    model = sharp(PoNetModel(config()))
    ids, mask = rows()
    alone = [model(row[real.bool()][None]) for row, real in zip(ids, mask, strict=True)]
    extra, none = torch.full((2, 6), 17), torch.zeros(2, 6, dtype=torch.long)
    ids, mask = (
        torch.cat(pair if side == "right" else pair[::-1], dim=1) for pair in ((ids, extra), (mask, none))
    )  # fmt: skip
    if side == "left":  # the short row's own padding goes in front, too
        ids[1], mask[1] = ids[1].roll(3), mask[1].roll(3)
    out = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for row, single in enumerate(alone):
        torch.testing.assert_close(out.last_hidden_state[row][mask[row].bool()], single.last_hidden_state[0])
    assert len(out.hidden_states) == 3
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 14)] * 2
    torch.testing.assert_close(out.attentions[0].sum(dim=-1), torch.ones(2, 4))
    if side == "right":
        torch.testing.assert_close(out.pooler_output, torch.cat([single.pooler_output for single in alone]))


def test_a_separator_in_padding_changes_no_real_token():
    model = sharp(PoNetModel(config()))
    ids, mask = torch.tensor([[CLS, 5, 6, PAD, 7, 8, SEP]]), torch.tensor([[1, 1, 1, 0, 1, 1, 1]])
    marked = ids.clone()
    marked[0, 3] = SEP
    out, again = (model(each, attention_mask=mask).last_hidden_state[mask.bool()] for each in (ids, marked))
    torch.testing.assert_close(out, again)


def test_embeddings_with_their_special_tokens_are_as_good_as_ids():
    model = sharp(PoNetModel(config()))
    ids, mask = rows()
    embeds, special = model.get_input_embeddings()(ids), (ids == CLS) | (ids == SEP)
    out = model(inputs_embeds=embeds, attention_mask=mask, special_mask=special)
    torch.testing.assert_close(out.last_hidden_state, model(ids, attention_mask=mask).last_hidden_state)
    with pytest.raises(ValueError, match="pass special_mask"):
        model(inputs_embeds=embeds, attention_mask=mask)
    loose = PoNetModel(config(clsgsepg=False)).eval()
    loose(inputs_embeds=embeds, segment_ids=torch.zeros_like(ids))


def test_sentences_of_a_long_text_in_blocks_and_with_checkpointing():
    model = sharp(PoNetModel(config(max_position_embeddings=24)))
    table = model.embeddings.position_embeddings.weight.detach().clone()
    model.resize_position_embeddings(700)
    assert torch.equal(model.embeddings.position_embeddings.weight[24 * 3 : 24 * 4], table)
    assert model.config.max_position_embeddings == 700
    ids = torch.randint(4, 40, (2, 690))
    segments = (torch.arange(690) // 17).expand(2, -1)
    with torch.no_grad():
        blocked = model(ids, segment_ids=segments).last_hidden_state
    whole = model(ids, segment_ids=segments).last_hidden_state
    torch.testing.assert_close(blocked, whole.detach())
    other = model(ids, segment_ids=(torch.arange(690) // 5).expand(2, -1)).last_hidden_state
    assert not torch.allclose(other, whole)
    (plain,) = torch.autograd.grad(whole.square().sum(), model.embeddings.word_embeddings.weight)
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    out = model(ids, segment_ids=segments).last_hidden_state
    (again,) = torch.autograd.grad(out.square().sum(), model.embeddings.word_embeddings.weight)
    torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="has 700 positions already, asked for 100"):
        model.resize_position_embeddings(100)


def test_trainer_learns(tmp_path):
    """Texts of two sentences; the label is the first word's half of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(4, 10, (128, 2, 3), generator=generator).tolist()
    texts = [encode_sentences(text, cls_id=CLS, sep_id=SEP, max_length=24) | {"label": int(text[0][0] < 7)}
             for text in words]  # fmt: skip
    torch.manual_seed(0)
    model = PoNetForSequenceClassification(config(num_labels=2, hidden_dropout_prob=0.0, initializer_range=0.2))
    settings = transformers.TrainingArguments(
        tmp_path, max_steps=60, per_device_train_batch_size=32, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=20, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=texts, data_collator=PoNetCollator(pad_id=PAD))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 < 0.4 < losses[0], losses
    trainer.save_model(tmp_path / "trained")
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_trainer_pre_trains(tmp_path):
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(4, 40, (6, 10, 4), generator=generator).tolist()
    pairs = sentence_pairs(documents, cls_id=CLS, sep_id=SEP, max_length=24)
    model = PoNetForPreTraining(config())
    settings = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    collator = PoNetCollator(pad_id=PAD, mask_id=MASK, words=WORDS)
    trainer = transformers.Trainer(model, settings, train_dataset=pairs, data_collator=collator)
    assert 3 < trainer.train().training_loss < 6  # ln 40 + ln 3 = 4.8


def test_bad_input():
    model = PoNetModel(config())
    ids, mask = rows()
    with pytest.raises(ValueError, match="24 positions, got 25 tokens"):
        model(torch.full((1, 25), 5))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="segment_ids from 0 to 7"):
        model(ids, segment_ids=torch.full_like(ids, 8))
    with pytest.raises(ValueError, match="at least one real token"):
        model(ids, attention_mask=torch.zeros_like(mask))
    with pytest.raises(ValueError, match=r"expected attention_mask of shape \(2, 8\), got \(2, 5\)"):
        model(ids, attention_mask=mask[:, :5])
    with pytest.raises(ValueError, match="got an additive one"):
        model(ids, attention_mask=(1 - mask.float()) * -1e4)
    with pytest.raises(ValueError, match=r"expected special_mask of shape \(2, 8\), got \(2, 1\)"):
        model(ids, special_mask=mask[:, :1])
    with pytest.raises(TypeError, match="head_mask"):
        model(ids, head_mask=mask)
    with pytest.raises(ValueError, match="cannot be a decoder"):
        PoNetConfig(is_decoder=True)
    with pytest.raises(ValueError, match="not divisible"):
        PoNetModel(config(num_attention_heads=5))


def test_settings_of_a_tokenizer():
    from tokenizers import Tokenizer, models

    fast = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "[CLS]": 2, "[SEP]": 3, "[UNK]": 4}, unk_token="[UNK]"))
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    made = PoNetConfig.for_tokenizer(whole, hidden_size=24, num_attention_heads=2)
    assert (made.special_token_ids, made.vocab_size, made.pad_token_id, made.hidden_size) == ([2, 3], 5, 0, 24)
    with pytest.raises(ValueError, match="no cls and no sep token"):
        PoNetConfig.for_tokenizer(
            transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]")
        )
