"""Compare readouts on the embedded backbone, keep the best, and read new images with it. Needs no network."""

from pathlib import Path

from cenote.backbones import load_backbone
from cenote.data import load_data
from cenote.probe import Readout, probe
from cenote.probe.predict import predict

out = Path("probe-digits")
result = probe(backbone="embedded", data="digits", readouts="mean,ep", seeds=1, epochs=5, out=out)
print(result.frame()[["readout", "tokens", "score", "ci_low", "ci_high", "params", "tie_group"]].to_string(index=False))

readout = Readout.from_pretrained(out / "best")
test = load_data("digits").test
images = [test.items[i] for i in range(5)]
answers = predict(readout, load_backbone("embedded"), images, top=1)
for truth, answer in zip(test.targets.tolist(), answers.itertuples(), strict=False):
    print(f"an image of a {truth}: read as {answer.label_1} ({answer.probability_1:.0%})")
