"""Readout tables on speech: python tools/speech_data.py [NAME...] writes benchmarks/results/real_data/.

Spoken digits (FSDD, the published split and one speaker left out) and speakers (120 of LibriSpeech) are read by the
tiny keyword transformer of the data folder, speakers also by a small WavLM with random weights, which is said in its
table: it shows what the readouts themselves can do. The data folder is looked for in CENOTE_DATA.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from real_data import DATA, ROOT, page, verdict, write_results

from cenote.allocator import keep_freed_memory
from cenote.pooling import list_poolings
from cenote.probe import probe
from cenote.probe.display import Terminal

KEYWORDS = f"kwt:{DATA / 'models' / 'kwt1_speech_commands'}"
FEATURED = ("l_tdnn", "weighted_layers > attentive_statistics", "attentive_statistics")
LEFT_OUT = "george"
"""The speaker whose digits are the test: the first by name, so that nobody chose one that suits."""

# L-TDNN's 2-D network over all layers is sized down so that a table takes minutes on two cores; published are
# conv_dim=256, hidden_size=512, pool_dim=192 and se_channels=128, for features of width 768.
READOUTS = (
    "mean", "max", "cls", "gem", "weighted_mean", "efficient_probing(num_queries=4)", "attentive_statistics",
    "mean_layers > mean", "weighted_layers > mean", "weighted_layers > attentive_statistics",
    "l_tdnn(conv_dim=16,hidden_size=32,pool_dim=64,se_channels=16)", "knn",
)  # fmt: skip


@dataclass(frozen=True)
class Speech:
    """One table.

    Attributes:
        file: below the data folder.
        label: column of the labels.
        backbone: spec, or ``""`` for the random WavLM.
        shown: the backbone in words.
        expectation: what the papers lead one to expect.
        left_out: speaker whose clips are the test part, or ``None`` for the split of the table.
        epochs: of the probe.
    """

    file: str
    label: str
    backbone: str
    shown: str
    expectation: str
    left_out: str | None = None
    epochs: int = 12


KWT = "keyword transformer KWT-1 (12 layers of width 64, trained on ten command words; clips in the middle of 1 s)"
DIGITS = (
    "The class token was trained to tell words apart and the frames were not, so it should lead among readouts of one "
    "layer without parameters, and trained pooling of the frames should come near it."
)
SPEAKERS = (
    "Speaker traits sit in the lower layers of speech networks and in the spread of features over time, so readouts of "
    "all layers and with second-order statistics should beat the mean of the last layer; the L-TDNN paper claims the "
    "lead over a static weighted sum with attentive statistics (its setting: thousands of speakers; here two clips "
    "each)."
)
SETS = {
    "fsdd_digit": Speech("fsdd/fsdd_8khz.parquet", "digit", KEYWORDS, KWT, DIGITS),
    "fsdd_digit_new_speaker": Speech(
        "fsdd/fsdd_8khz.parquet", "digit", KEYWORDS, KWT,
        DIGITS + " On a speaker who was never heard all of them lose (class token about 0.88, mean about 0.75 with "
        "logistic regression, averaged over the six speakers).",
        left_out=LEFT_OUT,
    ),
    "librispeech_speaker": Speech(
        "librispeech_small/librispeech_ident120.parquet", "label", KEYWORDS, KWT, SPEAKERS, epochs=40
    ),
    "librispeech_speaker_random": Speech(
        "librispeech_small/librispeech_ident120.parquet", "label", "",
        "WavLM with **random weights** (4 layers of width 64), so a floor and no finding about speech models",
        "Random layers pass on the loudness and colour of the sound, so statistics over time should carry most; there "
        "is nothing that one layer knows and the next does not, so readouts of all layers should gain little.",
        epochs=40,
    ),
}  # fmt: skip


def readouts(prefix: int) -> list[str]:
    """Those that there are, and that the backbone can feed."""
    known = {*list_poolings(), "knn"}
    names = {spec: spec.split(">")[-1].split("(")[0].strip() for spec in READOUTS}
    return [spec for spec, name in names.items() if name in known and (prefix or name != "cls")]


def random_wavlm(folder: Path) -> str:
    """A small WavLM of random weights with layer norms, so that batches are padded; made once, always the same."""
    if not (folder / "model.safetensors").exists():
        from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

        torch.manual_seed(0)
        config = WavLMConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, conv_dim=(64,) * 7,
            feat_extract_norm="layer", do_stable_layer_norm=True, num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )  # fmt: skip
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
        WavLMModel(config).save_pretrained(folder)
    return f"hf:{folder}"


def with_speaker_left_out(table: Path, speaker: str, folder: Path) -> Path:
    """The same table with that speaker's clips, and no others, as its test part."""
    frame = pd.read_parquet(table)
    if speaker not in set(frame["speaker"]):
        raise SystemExit(f"{table} has no speaker {speaker!r}")
    frame["split"] = ["test" if name == speaker else "train" for name in frame["speaker"]]
    target = folder / f"{table.stem}_without_{speaker}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SETS)} (default: all)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "real_data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="in place of each table's own")
    parser.add_argument("--limit", type=int, help="at most so many clips of each part, to see that it runs")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(SETS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(SETS)}")
    keep_freed_memory()
    for name in options.names or SETS:
        chosen = SETS[name]
        table = DATA / chosen.file
        if not table.exists():
            print(f"{name}: skipped, {table} is not there (CENOTE_DATA names the folder)")
            continue
        if chosen.left_out is not None:
            table = with_speaker_left_out(table, chosen.left_out, ROOT / "runs" / "tables")
        backbone = chosen.backbone or random_wavlm(ROOT / "runs" / "backbones" / "wavlm_random")
        out = ROOT / "runs" / (name if options.limit is None else f"{name}-{options.limit}")
        with Terminal() as display:
            result = probe(
                backbone, str(table), readouts(int(backbone.startswith("kwt:"))), tokens="both", seeds=options.seeds,
                epochs=options.epochs or chosen.epochs, display=display, out=out,
                resume=(out / "settings.json").exists(),
                data_options={"label_column": chosen.label, "limit": options.limit},
            )  # fmt: skip
        came_out = verdict(result, FEATURED)
        text = page(name, chosen.shown, chosen.expectation, came_out, result, "speech_data.py")
        write_results(options.results, name, text, result)
        print("\n".join(came_out))


if __name__ == "__main__":
    main()
