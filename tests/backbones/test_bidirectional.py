import pytest
import torch
import transformers

from cenote.backbones.bidirectional import SUPPORTED, instruction_mask, make_bidirectional

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
WINDOWED = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "sliding_window": 2},
    "mistral": {"sliding_window": 2},
    "mixtral": {"sliding_window": 2},
    "phi3": {"sliding_window": 2},
}


def decoder(kind, attention, **settings):
    torch.manual_seed(0)
    sizes = {**SIZES, **({"num_local_experts": 4} if kind == "mixtral" else {}), **settings}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModel.from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def states(model, ids, mask=None):
    return model(ids, attention_mask=mask).last_hidden_state


IDS = torch.arange(3, 12)[None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "settings"), [*((kind, {}) for kind in SUPPORTED), *WINDOWED.items()])
def test_every_token_sees_every_real_token_and_no_padding(kind, settings, attention):
    model = decoder(kind, attention, **settings)
    late = IDS.clone()
    late[0, -1] = 40
    assert torch.equal(
        states(model, IDS)[0, 0], states(model, late)[0, 0]
    )  # causal: the first token cannot see the last
    early = IDS.clone()
    early[0, 0] = 40

    assert make_bidirectional(model) is model
    alone = states(model, IDS)
    for changed in (late, early):
        # Both ends see each other in one layer's reach: no window is left.
        moved = (states(model, changed) - alone).abs().amax(-1)[0]
        assert (moved > 1e-6).all(), moved
    for side in ("right", "left"):
        pad = torch.full((1, 4), 0)
        ids = torch.cat([IDS, pad] if side == "right" else [pad, IDS], dim=1)
        mask = torch.cat([torch.ones_like(IDS), pad] if side == "right" else [pad, torch.ones_like(IDS)], dim=1)
        padded = states(model, ids, mask)[mask.bool()][None]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_attention_kernels_agree_with_and_without_padding():
    eager, sdpa = (make_bidirectional(decoder("qwen2", a, **WINDOWED["qwen2"])) for a in ("eager", "sdpa"))
    torch.testing.assert_close(states(eager, IDS), states(sdpa, IDS), rtol=1e-4, atol=1e-5)
    mask = torch.tensor([[1] * 7 + [0] * 2])
    torch.testing.assert_close(states(eager, IDS, mask)[:, :7], states(sdpa, IDS, mask)[:, :7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_kept_when_saved(kind, tmp_path):
    model = make_bidirectional(decoder(kind, "sdpa", **WINDOWED[kind]))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    torch.testing.assert_close(states(again, IDS), states(model, IDS), rtol=1e-5, atol=1e-6)


def test_language_model_head_is_accepted():
    torch.manual_seed(0)
    model = make_bidirectional(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))).eval()
    late = IDS.clone()
    late[0, -1] = 40
    with torch.no_grad():
        assert (model(IDS).logits[0, 0] - model(late).logits[0, 0]).abs().max() > 1e-6


def test_what_is_not_known_is_refused():
    with pytest.raises(TypeError, match="transformers model"):
        make_bidirectional(torch.nn.Linear(2, 2))
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2))
    with pytest.raises(ValueError, match="got bert"):
        make_bidirectional(bert)
    model = decoder("qwen2", "sdpa")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        make_bidirectional(model)


class TestInstructionMask:
    # begin of sequence, two or three tokens of instruction, text
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    lengths = (2, 3, 0)

    def test_exact(self):
        expected = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()
        assert torch.equal(instruction_mask(self.mask, self.lengths), expected)

    def test_published_behaviour_keeps_the_last_instruction_token(self):
        expected = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()
        assert torch.equal(instruction_mask(self.mask, torch.tensor(self.lengths), exact=False), expected)

    def test_without_begin_of_sequence(self):
        expected = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()
        assert torch.equal(instruction_mask(self.mask.bool(), self.lengths, bos=False), expected)

    @pytest.mark.parametrize("exact", [True, False])
    def test_left_padding(self, exact):
        right = instruction_mask(self.mask, self.lengths, exact=exact)
        left = torch.stack([m.roll(int((m == 0).sum())) for m in self.mask])
        for row, (keep, real) in enumerate(zip(instruction_mask(left, self.lengths, exact=exact), left, strict=True)):
            assert torch.equal(keep[real.bool()], right[row][self.mask[row].bool()])
            assert not keep[~real.bool()].any()

    def test_one_length_for_all(self):
        assert torch.equal(instruction_mask(self.mask[:2], 1), instruction_mask(self.mask[:2], [1, 1]))

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"row\(s\) \[2\]"):
            instruction_mask(self.mask, 2)
        with pytest.raises(ValueError, match="negative"):
            instruction_mask(self.mask, -1)
        with pytest.raises(ValueError, match="each of 3 rows"):
            instruction_mask(self.mask, [1, 2])
        with pytest.raises(ValueError, match=r"\(batch, tokens\)"):
            instruction_mask(self.mask[:, None], 1)
