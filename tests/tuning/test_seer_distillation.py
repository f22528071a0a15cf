"""Gates trained by transformers' Trainer: only they learn, only they are saved, and training goes on where it was."""

import pytest
import torch
from safetensors.torch import load_file

from attention_hosts import decoder, padded

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from cenote.attention import Recipe, SeerAttention
from cenote.attention.host import Host
from cenote.attention.seer_training import gate_loss, observe
from cenote.ops.attention_statistics import map_rows
from cenote.tuning.seer_distillation import GateDistiller, distill_gates, distillation_arguments

RECIPE = SeerAttention(block_size=8, gate_type="Qavg_Kmaxminavg")


def items(count=6, length=48):
    ids, _ = padded((length,) * count, seed=2)
    return [{"input_ids": row} for row in ids]


def arguments(folder, **changes):
    return distillation_arguments(
        folder, **{"max_steps": 8, "learning_rate": 1e-2, "warmup_steps": 2, "save_steps": 4, "logging_steps": 1,
                   "disable_tqdm": True, "use_cpu": True, **changes}
    )  # fmt: skip


def test_only_gates_learn_and_are_saved(tmp_path):
    model = decoder("qwen3")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = distill_gates(model, RECIPE, items(), arguments(tmp_path))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    new = RECIPE.new_gates(Host.of(model), 42)
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert set(saved) == {f"gates.{name}" for name in new.state_dict()}
    assert all(torch.equal(saved[f"gates.{name}"], weight) for name, weight in trained.gates.items())
    again = Recipe.from_pretrained(tmp_path)
    assert all(torch.equal(again.gates[name], weight) for name, weight in trained.gates.items())
    shown = observe(model, RECIPE, new, {"input_ids": torch.stack([item["input_ids"] for item in items()])})
    after = trained.load_gates(Host.of(model))
    assert float(gate_loss(after, shown[0])) < 0.95 * float(gate_loss(new, shown[0]).detach())


def test_training_resumes_where_it_was(tmp_path):
    model = decoder("llama")
    whole = distill_gates(model, RECIPE, items(), arguments(tmp_path / "whole"))
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    rest = distill_gates(model, RECIPE, items(), arguments(tmp_path / "rest"), resume_from_checkpoint=checkpoint)
    for name, weight in whole.gates.items():
        torch.testing.assert_close(rest.gates[name], weight)


@pytest.mark.parametrize("reduction", ["mean", "row"])
def test_loss_is_that_of_the_formula(reduction):
    """Ten times the sum over layers, from whole attention maps, with a padded row by itself."""
    model = decoder("llama")
    distiller = GateDistiller(model, RECIPE, reduction)
    ids, mask = padded((48, 29))
    with torch.no_grad():
        loss = distiller(ids, mask)["loss"]
        alone = [distiller(ids[row : row + 1, -length:])["loss"] for row, length in enumerate((48, 29))]
        torch.testing.assert_close(loss, torch.stack(alone).mean(), atol=1e-5, rtol=1e-4)
        (shown,) = observe(model, RECIPE, distiller.gates, {"input_ids": ids[:1]})
        with RECIPE.with_gates(distiller.gates)(model) as session:
            prompts = []
            score = session.score
            session.score = lambda prompt: prompts.append(prompt) or score(prompt) * 0
            model(input_ids=ids[:1])
        first = prompts[0]
        ((_, dense),) = map_rows(first.query, first.key, scale=first.scale)
        target = dense.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).amax(dim=(3, 5))
        target = target / target.sum(-1, keepdim=True)
        torch.testing.assert_close(shown["0"].target, target)
        entries = torch.nn.functional.kl_div(score(first).log_softmax(-1), target, reduction="none")[:, :, 1:]
        expected = 10 * (entries.mean() if reduction == "mean" else entries.sum(-1).mean())
        only = {"0": shown["0"]}
        torch.testing.assert_close(gate_loss(distiller.gates, only, reduction), expected)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="reduction must be"):
        GateDistiller(decoder("llama"), RECIPE, "sum")
    with pytest.raises(ValueError, match="cannot serve"):
        GateDistiller(decoder("mistral", sliding_window=8), RECIPE)
