"""A learned readout as a scikit-learn estimator: cross-validated on the tokens of the embedded backbone."""

import numpy as np
import torch
from sklearn.model_selection import cross_val_score

from cenote.backbones import load_backbone
from cenote.data import load_data
from cenote.integrations.sklearn import ReadoutClassifier

backbone, data = load_backbone("embedded"), load_data("digits", limit=240)
items = [data.train.items[i] for i in range(len(data.train))]
tokens, _ = backbone(backbone.collate(items)).tokens("patches")
X, y = tokens.numpy(), data.train.targets.numpy()
print("tokens", X.shape)

torch.set_num_threads(1)
for readout in ("mean", "efficient_probing(num_queries=8)"):
    scores = cross_val_score(ReadoutClassifier(readout, lrs=[0.03], epochs=20), X, y, cv=3)
    print(f"{readout}: accuracy {np.mean(scores):.3f}")
