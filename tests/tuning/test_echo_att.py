"""EchoAtt's losses and its two stages of training."""

import math

import pytest
import torch

from attention_hosts import decoder, padded
from cenote.attention.host import Host
from cenote.integrations.echo_att_model import share_attention
from cenote.ops.distillation import divergence_loss, hard_label_loss
from cenote.tuning.echo_att import EchoAttStage, continue_training, distill
from cenote.tuning.echo_att_losses import behind_layers, block_ends, distillation_losses, echo_att_losses


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_losses_by_hand():
    ours, theirs = random(2, 3, 5), random(2, 3, 5, seed=1)
    states, wanted = [random(2, 3, 4, seed=s) for s in (2, 3)], [random(2, 3, 4, seed=s) for s in (4, 5)]
    mask = torch.tensor([[True, True, False], [False, True, True]])
    found = echo_att_losses(ours, theirs, states, wanted, mask, weights=(1.0, 2.0, 3.0))
    soft = hard = 0.0
    for row, place in mask.nonzero().tolist():
        p, q = ours[row, place].softmax(0), theirs[row, place].softmax(0)
        soft += sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)) / 4
        hard -= math.log(p[q.argmax()]) / 4
    inner = sum((a - b)[mask].square().mean() for a, b in zip(states, wanted, strict=True)) / 2
    torch.testing.assert_close(found.soft, torch.tensor(soft))
    torch.testing.assert_close(found.hard, torch.tensor(hard))
    torch.testing.assert_close(found.intermediate, inner)
    torch.testing.assert_close(found.total, inner + 2 * soft + 3 * hard)
    turned = divergence_loss(ours, theirs, mask, direction="forward")
    torch.testing.assert_close(turned, divergence_loss(theirs, ours, mask))
    assert not torch.isclose(turned, found.soft)


def test_a_student_like_its_teacher_loses_nothing_but_the_hard_part():
    teacher = decoder("llama").double()
    ids, mask = padded((9, 14))
    batch = {"input_ids": ids, "attention_mask": mask}
    found = distillation_losses(share_attention(teacher, ()), teacher, batch)
    assert (found.intermediate.item(), found.soft.item()) == (0.0, 0.0)
    first, second = (teacher.model.layers[n].self_attn for n in (1, 2))
    first.o_proj.weight.zero_()  # layers 1 and 2 see the same input and make the same map of it
    teacher.model.layers[1].mlp.down_proj.weight.zero_()
    second.q_proj.weight.copy_(first.q_proj.weight)
    second.k_proj.weight.copy_(first.k_proj.weight)
    found = distillation_losses(share_attention(teacher, (2,)), teacher, batch)
    assert max(found.intermediate.item(), found.soft.item()) < 1e-9
    teacher = decoder("llama")
    student = share_attention(teacher, (2,))
    copied = distillation_losses(student, teacher, batch)
    assert min(copied.intermediate.item(), copied.soft.item()) > 1e-4


def test_hidden_states_are_compared_behind_the_last_layer_of_each_block():
    student = share_attention(decoder("llama", num_hidden_layers=8), (2, 3, 5, 7))
    assert block_ends(student.config.layer_plan) == (3, 5, 7)
    ids, _ = padded((6,))
    with behind_layers(Host.of(student), (3, 7)) as states:
        hidden = student(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], hidden[4])
    assert torch.equal(student.model.norm(states[1]), hidden[8])  # the host's last state is behind the norm


def test_padding_changes_no_loss():
    teacher = decoder("llama")
    student = share_attention(teacher, (2, 3))
    ids, mask = padded((9, 9), left=False)
    wide, real = (torch.nn.functional.pad(x, (0, 5)) for x in (ids, mask))
    short = distillation_losses(student, teacher, {"input_ids": ids})
    long = distillation_losses(student, teacher, {"input_ids": wide, "attention_mask": real})
    torch.testing.assert_close(long.total, short.total)


def test_stages_lower_their_loss_leave_the_teacher_alone_and_are_seeded(tmp_path):
    teacher = decoder("llama")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    data = padded((12,) * 16)[0]

    def trained():
        student = share_attention(teacher, (2, 3)).requires_grad_()
        return distill(student, teacher, data, EchoAttStage(12, batch_size=8, lr=3e-3))

    first, second = trained(), trained()
    assert first.history == second.history
    assert first.history[-1]["loss"] < 0.8 * first.history[0]["loss"]
    row = first.history[0]
    assert math.isclose(row["loss"], 0.25 * row["intermediate"] + 0.25 * row["soft"] + 0.5 * row["hard"], rel_tol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    more = continue_training(first.model, data, EchoAttStage(12, batch_size=8, lr=3e-3))
    assert more.history[-1]["loss"] < more.history[0]["loss"]
    more.save(tmp_path)
    assert len((tmp_path / "echo_att_history.csv").read_text().splitlines()) == 13
    assert (tmp_path / "model.safetensors").is_file()


def test_passes_of_one_update_are_averaged():
    teacher = decoder("llama").requires_grad_(False)
    data = padded((10,) * 8)[0]
    weights = []
    for batch, passes in ((8, 1), (4, 2)):
        student = share_attention(teacher, (2, 3)).requires_grad_()
        stage = EchoAttStage(1, batch_size=batch, accumulation=passes, lr=1e-2, clip=1e9)
        distill(student, teacher, data, stage, optim="sgd")
        weights.append(student.model.layers[1].self_attn.q_proj.weight.detach())
    start = teacher.model.layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)
    assert not torch.equal(weights[0], start)


def test_ragged_samples_are_padded_and_masked():
    student = share_attention(decoder("llama"), (2, 3)).requires_grad_()
    samples = [{"input_ids": list(range(2, 2 + n))} for n in (4, 9, 6, 5)]
    whole = continue_training(student, samples, EchoAttStage(1, batch_size=4, lr=1e-9)).history[0]["loss"]
    single = [
        student(torch.tensor([s["input_ids"]]), labels=torch.tensor([s["input_ids"]])).loss.item() for s in samples
    ]
    counts = [len(s["input_ids"]) - 1 for s in samples]
    assert math.isclose(whole, sum(a * n for a, n in zip(single, counts, strict=True)) / sum(counts), rel_tol=1e-4)


def test_bad_input_is_refused():
    teacher = decoder("llama")
    student = share_attention(teacher, (2,))
    ids, _ = padded((6,))
    logits = random(1, 6, 64)
    with pytest.raises(ValueError, match="three weights"):
        echo_att_losses(logits, logits, [], [], weights=(0.5, -1.0, 0.5))
    with pytest.raises(ValueError, match="1 states of the student"):
        echo_att_losses(logits, logits, [logits], [])
    with pytest.raises(ValueError, match="no real token"):
        hard_label_loss(logits, logits, torch.zeros(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="layers, the teacher"):
        distillation_losses(student, decoder("llama", num_hidden_layers=3), {"input_ids": ids})
    with pytest.raises(ValueError, match="a sample at least"):
        distill(student, teacher, [], EchoAttStage(1))
    with pytest.raises(ValueError, match="expected a step"):
        EchoAttStage(0)
    with pytest.raises(ValueError, match="positive lr"):
        EchoAttStage(1, lr=0.0)
