"""What a launcher starts in several processes: trains readouts from a folder's stores and saves them there."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from cenote.probe.store import FeatureStore
from cenote.tuning.accelerated import train_readout

folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
torch.set_num_threads(1)
targets = load_file(folder / "targets.safetensors")
parts = [(FeatureStore.open(job["stores"][part]), targets[part]) for part in ("train", "validation")]
for name, options in job["runs"].items():
    fit = train_readout(*job["args"], *parts, **options)
    if fit.main:
        fit.readout.save_pretrained(folder / name)
        (folder / name / "scores.json").write_text(json.dumps(fit.scores))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
# torch's own threads may still run when the interpreter takes itself apart, which now and then aborts a process that
# has done all its work: leave without that.
os._exit(0)
