"""Train a small PoNet classifier with transformers' Trainer, and read a text longer than it was built for."""

import tempfile

import torch
import transformers

from cenote.integrations.ponet import PoNetConfig, PoNetForSequenceClassification
from cenote.integrations.ponet_data import PoNetCollator, encode_sentences

PAD, CLS, SEP, GOOD, BAD, WORDS = range(6)


def text(label, sentences, generator):
    """Sentences of random words, one of them with the word that decides."""
    drawn = [torch.randint(WORDS, 40, (6,), generator=generator).tolist() for _ in range(sentences)]
    drawn[int(torch.randint(sentences, (1,), generator=generator))][3] = GOOD if label else BAD
    return encode_sentences(drawn, cls_id=CLS, sep_id=SEP, max_length=4096) | {"label": label}


generator = torch.Generator().manual_seed(0)
texts = [text(n % 2, 5, generator) for n in range(512)]

transformers.set_seed(0)
transformers.logging.set_verbosity_error()
config = PoNetConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=64, special_token_ids=[CLS, SEP], pad_token_id=PAD, initializer_range=0.2,
    hidden_dropout_prob=0.0,
)  # fmt: skip
model = PoNetForSequenceClassification(config)
with tempfile.TemporaryDirectory() as folder:
    settings = transformers.TrainingArguments(
        folder, max_steps=160, per_device_train_batch_size=32, learning_rate=5e-3, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collate = PoNetCollator(pad_id=PAD)
    trainer = transformers.Trainer(model, settings, train_dataset=texts, data_collator=collate)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()

model.eval().ponet.resize_position_embeddings(4096)
for sentences in (5, 20, 80):
    batch = collate([text(n % 2, sentences, generator) for n in range(32)])
    labels = batch.pop("labels")
    with torch.no_grad():
        right = int((model(**batch).logits.argmax(dim=1) == labels).sum())
    print(f"{sentences} sentences, {batch['input_ids'].shape[1]} tokens: {right} of 32 right")
