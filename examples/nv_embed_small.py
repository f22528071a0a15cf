"""NV-Embed in small: a random Llama made bidirectional, latent attention behind it, trained for a moment."""

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from cenote.integrations.nv_embed_model import NVEmbed
from cenote.integrations.nv_embed_text import query_instruction

torch.manual_seed(0)
animals = ["cat", "dog", "horse", "owl", "trout", "viper", "toad", "moth"]
queries = [f"what does a {animal} eat" for animal in animals]
passages = [f"food of the {animal} is described on this page" for animal in animals]
find = query_instruction("find the page that answers the question")

words = Tokenizer(models.WordLevel(unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.train_from_iterator(
    [*queries, *passages, find], trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"])
)
words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")

llama = LlamaModel(
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
)
model = NVEmbed.from_decoder(llama, tokenizer, num_latents=16, num_heads=4, head_dim=8)


def found() -> int:
    scores = model.encode(queries, find) @ model.encode(passages).T
    return int((scores.argmax(axis=1) == range(len(animals))).sum())


before = found()
face = model.to_sentence_transformer({"query": find})
SentenceTransformerTrainer(
    model=face,
    args=SentenceTransformerTrainingArguments(
        "run", max_steps=40, per_device_train_batch_size=8, learning_rate=3e-3, prompts={"query": find},
        report_to="none", save_strategy="no",
    ),
    train_dataset=Dataset.from_dict({"query": queries, "passage": passages}),
    loss=MultipleNegativesRankingLoss(face),
).train()  # fmt: skip
print(f"passages found: {before} of {len(animals)} before, {found()} of {len(animals)} after forty steps")

# Key names, shards and configuration of the published model.
model.save_pretrained("nv-embed-small")
again = NVEmbed.from_pretrained("nv-embed-small")
print(f"loaded again, the same vectors: {bool((again.encode(queries, find) == model.encode(queries, find)).all())}")
