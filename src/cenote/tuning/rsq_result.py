"""What quantisation gives: a model, its codes, and three ways to write them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save, save_file
from torch import nn

from cenote.files import write_whole
from cenote.tuning.rsq_linear import QuantizedLinear, linears_from_tensors, linears_to_tensors
from cenote.tuning.rsq_rotation import add_online_hadamards

if TYPE_CHECKING:
    import pandas as pd

LAYOUTS = ("plain", "packed", "quanto")
FACTS, CODES = "quantization.json", "quantization.safetensors"


@dataclass(frozen=True)
class RSQResult:
    """A quantised model.

    Attributes:
        model: the model that was passed, with weights on their grids.
        settings: of the run.
        linears: codes, scales and errors of every quantised linear layer, in the order in which they were made.
        seconds: of wall time.
    """

    model: Any
    settings: dict[str, Any]
    linears: tuple[QuantizedLinear, ...]
    seconds: float

    def frame(self) -> pd.DataFrame:
        """One row a linear layer: size, bits, bytes, error (see :class:`QuantizedLinear`) and damping steps."""
        import pandas as pd

        return pd.DataFrame(
            {
                "name": each.name,
                "rows": each.rows,
                "columns": each.columns,
                "bits": each.bits,
                "bytes": each.nbytes,
                "bits_per_weight": 8 * each.nbytes / (each.rows * each.columns),
                "error": each.error,
                "damping_steps": each.damping_steps,
            }
            for each in self.linears
        )

    @property
    def packed_bytes(self) -> int:
        """Bytes of all codes, scales and zero points."""
        return sum(each.nbytes for each in self.linears)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same weights in the model's own type."""
        return sum(each.rows * each.columns * each.scale.element_size() for each in self.linears)

    def save(self, folder: str | Path, layout: str = "plain") -> Path:
        """Write the model; :func:`load_quantized` reads every layout back with the same weights, bit for bit.

        - ``"plain"``: ordinary weights, as ``AutoModelForCausalLM.from_pretrained`` takes them, with scales and zero
          points in ``quantization.safetensors`` beside them. As large as before.
        - ``"packed"``: codes of exactly ``bits`` bits with scales, and everything else as it is, in
          ``quantization.safetensors`` (see :class:`QuantizedLinear` for the tensors and
          :func:`cenote.ops.bit_packing.pack_codes` for the bits). 2 to 8 bits.
        - ``"quanto"``: as optimum-quanto keeps 2 and 4 bits, with our codes and scales, not ones that it would choose;
          ``optimum.quanto.QuantizedModelForCausalLM.from_pretrained`` reads it and keeps weights packed in memory. 3
          bits take the room of 4.

        ``quantization.json`` holds settings and errors; it comes last, so a folder that has it is complete.

        Raises:
            ValueError: an unknown layout; online Hadamards anywhere but in ``"packed"``; bits, groups or a column order
                that quanto's layout has no place for.
            ImportError: ``"quanto"`` without optimum-quanto.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if self.settings["rotation"] == "full" and layout != "packed":
            raise ValueError(f"layout {layout!r} cannot hold the online Hadamards of rotation='full': use 'packed'")
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            temporary = Path(made)
            {"plain": self._plain, "packed": self._packed, "quanto": self._quanto}[layout](temporary)
            _, linears = linears_to_tensors(self.linears, ())
            facts = {"format": 1, "layout": layout, "settings": self.settings, "linears": linears}
            write_whole(temporary / FACTS, json.dumps(facts, indent=2) + "\n")
            _publish(temporary, folder)
        return folder

    def _plain(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        write_whole(folder / CODES, save(linears_to_tensors(self.linears, ("scale", "zero", "group"))[0]))

    def _packed(self, folder: Path) -> None:
        tensors, _ = linears_to_tensors(self.linears)
        quantised = {f"{each.name}.weight" for each in self.linears}
        seen: set[int] = set()
        for name, value in self.model.state_dict().items():
            if name not in quantised and value.data_ptr() not in seen:  # tied weights once
                seen.add(value.data_ptr())
                tensors[name] = value.detach().cpu().contiguous()
        save_file(tensors, folder / CODES, {"format": "pt"})
        self.model.config.save_pretrained(folder)
        _generation_config(self.model, folder)

    def _quanto(self, folder: Path) -> None:
        from cenote.tuning.rsq_quanto import save_quanto

        save_quanto(self.model, self.linears, folder)
        _generation_config(self.model, folder)


def load_quantized(folder: str | Path) -> nn.Module:
    """The model of :meth:`RSQResult.save`, in eval mode.

    Weights of ``"plain"`` and ``"packed"`` become ordinary tensors again; those of ``"quanto"`` stay packed.

    Raises:
        FileNotFoundError: a folder without ``quantization.json``.
        ValueError: a layout or version that is not known, or missing tensors.
        ImportError: layout ``"quanto"`` without optimum-quanto.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    facts = json.loads((folder / FACTS).read_text())
    if facts["format"] != 1 or facts["layout"] not in LAYOUTS:
        raise ValueError(
            f"expected format 1 and layout {', '.join(LAYOUTS)}, got {facts['format']}, {facts['layout']!r}"
        )
    if facts["layout"] == "plain":
        return AutoModelForCausalLM.from_pretrained(folder)
    if facts["layout"] == "quanto":
        from cenote.tuning.rsq_quanto import load_quanto

        return load_quanto(folder)
    tensors = load_file(folder / CODES)
    linears = linears_from_tensors(tensors, facts["linears"])
    state = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in facts["linears"]}
    for each in linears:
        state[f"{each.name}.weight"] = each.dequantize()
        if (bias := tensors.get(f"{each.name}.bias")) is not None:
            state[f"{each.name}.bias"] = bias
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=linears[0].scale.dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    own = {name for name, value in model.named_parameters()} & set(missing)
    if own or unexpected:
        raise ValueError(f"{folder} misses tensors {sorted(own)[:5]} and has unknown ones {sorted(unexpected)[:5]}")
    if facts["settings"]["rotation"] == "full":
        add_online_hadamards(model)
    return model.eval()


def _generation_config(model: Any, folder: Path) -> None:
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _publish(made: Path, folder: Path) -> None:
    """Move finished files into a folder, the one that makes the others valid last."""
    folder.mkdir(exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda path: path.name == FACTS):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(path, folder / path.name)


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the weight files of a saved model."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
