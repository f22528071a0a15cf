"""Reject what the classifier has never seen: digits, of which it knows six classes."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from cenote.inspection import OPEN_SET_SCORES, create_open_set_score
from cenote.ops.open_set import auoscr, auroc, best_threshold, open_set_accuracy, oscr_curve

torch.manual_seed(0)
bunch = load_digits()
x, y = torch.tensor(bunch.data).float() / 16, torch.tensor(bunch.target)
part = torch.randint(4, (len(x),))  # half for training, a quarter to choose thresholds, a quarter to judge
train = (part < 2) & (y < 6)
validation = (part == 2) & (y < 8)  # 6 and 7 are surrogate unknowns: not those that come later
test = (part == 3) & ((y < 6) | (y > 7))  # 8 and 9 are the unknowns of the test
labels = torch.where(y < 6, y, -1)

body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
head = nn.Linear(64, 6)
optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
for _ in range(150):
    loss = nn.functional.cross_entropy(head(body(x[train])), y[train])
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

with torch.no_grad():
    features = body(x)  # exactly what the last linear layer reads
    predictions = head(features).argmax(dim=1)
print(f"closed-set accuracy {(predictions == labels)[test & (y < 6)].double().mean():.3f}")
print(f"{'method':10}{'AUROC':>8}{'AUOSCR':>8}{'OOSA':>8}")
for name in OPEN_SET_SCORES:
    options = {"knn": {"k": 10}, "nnguide": {"fraction": 1.0}}.get(name, {})
    score = create_open_set_score(name, head, **options).fit(features[train], y[train])
    threshold, _ = best_threshold(score.score(features[validation]), predictions[validation], labels[validation])
    judged = score.score(features[test]), predictions[test], labels[test]
    area, accuracy = auoscr(oscr_curve(*judged)), open_set_accuracy(*judged, threshold)
    print(f"{name:10}{auroc(judged[0], judged[2]):8.3f}{area:8.3f}{accuracy:8.3f}")
