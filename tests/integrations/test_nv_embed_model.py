import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cenote.integrations.nv_embed import LATENT_DEFAULTS, assemble
from cenote.integrations.nv_embed_model import NVEmbed
from cenote.integrations.nv_embed_text import InstructedTokenizer, query_instruction
from cenote.integrations.sentence_transformers import load_readout_model
from golden.cases import GOLDEN_DIR, read_case
from reference.latent_heads import latent_attention

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "a", "!", "Instruct", "Query", ":", "find", "catdog"]
TEXTS = ["the cat sat on the mat !", "a dog", "the dog ran", "cat"]
FIND = query_instruction("find a cat")
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
         "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64}  # fmt: skip
WINDOW = {"mistral": {"sliding_window": 2}, "qwen2": {"use_sliding_window": True, "sliding_window": 2}}


def tokenizer(bos=True, padding=None):
    """Whole words; the padding token is the end of sequence unless there is another."""
    vocab = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=padding or "</s>"
    )


def decoder(kind, **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **WINDOW.get(kind, {}), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def build(kind="mistral", bos=True, **options):
    torch.manual_seed(1)
    return NVEmbed.from_decoder(
        decoder(kind), tokenizer(bos), num_latents=5, num_heads=3, head_dim=16, **options
    ).eval()  # fmt: skip


def by_hand(model, text, instruction, dropped):
    """One text: ids put together here, states, the plain form of the pooling over all but the first ``dropped``."""
    ids = model.text.tokenizer(instruction + text)["input_ids"] + [2]
    with torch.no_grad():
        states = model.embedding_model(torch.tensor([ids])).last_hidden_state
        mask = torch.arange(len(ids))[None] >= dropped
        block = model.latent_attention_model.block
        names = {"latents": block.latents}
        official = {"0.norm": block.token_norm, "0.norm_context": block.latent_norm, "0.fn.to_q": block.query,
                    "0.fn.to_kv": block.key_value, "0.fn.to_out": block.out, "1.norm": block.mlp_norm,
                    "1.fn.net.0": block.mlp_in, "1.fn.net.2": block.mlp_out}  # fmt: skip
        for name, layer in official.items():
            names |= {f"cross_attend_blocks.{name}.{part}": value for part, value in layer.named_parameters()}
        return F.normalize(latent_attention(names, states, mask, 3), dim=-1)[0].numpy()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_vectors(kind):
    model = build(kind, bos=kind != "qwen2")
    bos = int(model.text.bos)
    assert bos == (kind != "qwen2")
    # "Instruct : find a cat Query :" is seven tokens; the second mask is off by the begin of sequence.
    for exact, instruction, dropped in ((True, FIND, 7 + bos), (False, FIND, 7), (True, "", 0), (False, "", 0)):
        model.text.exact = exact
        expected = np.stack([by_hand(model, text, instruction, dropped) for text in TEXTS])
        for size in (1, 3, 32):
            found = model.encode(TEXTS, instruction, batch_size=size)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(model.encode(TEXTS[0]), model.encode(TEXTS[:1])[0])
    assert torch.is_tensor(model.encode(TEXTS, convert_to_tensor=True))
    assert model.encode([]).shape == (0, 24)


def test_padding_side_does_not_matter():
    right, left = build(), build(padding_side="left")
    batch = left.text.collate(left.text.rows(TEXTS, FIND))
    assert batch["input_ids"][1, 0] == 2
    assert not batch["attention_mask"][1, 0]
    np.testing.assert_allclose(left.encode(TEXTS, FIND), right.encode(TEXTS, FIND), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="middle"):
        build(padding_side="middle")


def test_looks_both_ways_and_at_the_instruction():
    model = build()
    ids = torch.tensor([[1, 3, 4, 5, 2]])
    late = ids.clone()
    late[0, 3] = 6
    everything = torch.ones_like(ids)
    with torch.no_grad():
        moved = model.states(ids, everything) - model.states(late, everything)
    assert moved[0, 0].abs().max() > 1e-5
    # The instruction is not pooled, but what is pooled has seen it.
    assert np.abs(model.encode(TEXTS, FIND) - model.encode(TEXTS)).max() > 1e-3


class TestText:
    def make(self, **options):
        return InstructedTokenizer(tokenizer(), 20, **options)

    def test_end_of_sequence_is_kept_and_never_taken_for_padding(self):
        text = self.make()
        rows = text.rows(["the cat", "cat " * 50], max_length=6)
        assert [row.ids for row in rows] == [[1, 3, 4, 2], [1, 4, 4, 4, 4, 2]]
        batch = text.collate(rows)
        assert batch["input_ids"][0].tolist() == [1, 3, 4, 2, 2, 2]
        assert batch["pool_mask"].sum(dim=1).tolist() == [4, 6]

    def test_an_end_that_the_tokenizer_appends_is_not_doubled(self):
        text = self.make()
        text.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        assert text.rows(["the cat"])[0].ids == [1, 3, 4, 2]

    def test_token_across_the_boundary_belongs_to_the_text(self):
        # "the cat" + "dog mat" is read as "the catdog mat".
        (row,) = self.make().rows(["dog mat"], "the cat")
        assert (row.ids, row.instruction) == ([1, 3, 16, 9, 2], 1)
        (published,) = self.make(exact=False).rows(["dog mat"], "the cat")
        assert published.instruction == 2

    def test_no_instruction_mask(self):
        text = self.make(mask_instruction=False)
        batch = text.collate(text.rows(TEXTS, FIND))
        assert torch.equal(batch["pool_mask"], batch["attention_mask"])

    def test_nothing_left_of_a_text(self):
        with pytest.raises(
            ValueError, match=r"nothing is left of the text 'the dog' behind an instruction of 7 tokens"
        ):
            self.make().rows(["the dog"], FIND, max_length=9)
        assert self.make().rows(["the dog"], FIND, max_length=10)[0].ids[-2:] == [3, 2]
        # An empty text still has its end of sequence.
        assert self.make().collate(self.make().rows([""], FIND))["pool_mask"].sum() == 1
        with pytest.raises(ValueError, match="nothing is left"):
            self.make(add_eos=False).rows([""], FIND)

    def test_bad_input(self):
        with pytest.raises(Exception, match=r"(?i)expected texts|type"):
            self.make().rows([3])
        with pytest.raises(ValueError, match="room for a token"):
            self.make().rows(["cat"], max_length=2)
        silent = tokenizer()
        silent.eos_token = None
        with pytest.raises(ValueError, match="end-of-sequence"):
            InstructedTokenizer(silent, 20)


@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2"])
def test_saved_in_the_published_layout(kind, tmp_path):
    model = build(kind, max_length=30)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert {"embedding_model.embed_tokens.weight", "embedding_model.norm.weight", "latent_attention_model.latents",
            "embedding_model.layers.1.self_attn.q_proj.weight",
            "latent_attention_model.cross_attend_blocks.0.fn.to_kv.weight"} <= set(index)  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["model_type"] == {"mistral": "bidir_mistral"}.get(kind, kind)
    assert config["latent_attention_config"].keys() >= LATENT_DEFAULTS.keys()
    again = NVEmbed.from_pretrained(tmp_path)
    assert (again.text.exact, again.text.max_length) == (True, 30)
    np.testing.assert_array_equal(again.encode(TEXTS, FIND), model.encode(TEXTS, FIND))
    # A configuration as published says nothing of the exact mask.
    del config["exact_instruction_mask"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not NVEmbed.from_pretrained(tmp_path).text.exact
    half = NVEmbed.from_pretrained(tmp_path, dtype=torch.bfloat16, exact_instruction_mask=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert np.abs(half.encode(TEXTS) - model.encode(TEXTS)).max() < 0.1
    # Fewer shards in the same place leave none of the old ones behind.
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_configuration_as_an_older_transformers_wrote_it(tmp_path):
    """Names and extras of the released config.json; the window and the rotary base reach the model or do not."""
    model = build()
    model.save_pretrained(tmp_path)
    text = {**SIZES, "model_type": "bidir_mistral", "_name_or_path": "nvidia/NV-Embed-v1", "sliding_window": 4096,
            "torch_dtype": "float32", "rope_theta": 500.0, "transformers_version": "4.42.4", "hidden_act": "silu",
            "architectures": ["MistralModel"], "rms_norm_eps": 1e-6, "bad_words_ids": None}  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text()) | {"text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = NVEmbed.from_pretrained(tmp_path)
    assert again.embedding_model.config.sliding_window is None
    inverse = again.embedding_model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse, 500.0 ** -(torch.arange(0, 8, 2) / 8))


def test_damaged_files(tmp_path):
    model = build()
    with pytest.raises(ValueError, match="hub id"):
        NVEmbed.from_pretrained(tmp_path / "nowhere" / "else")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        NVEmbed.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for changed, message in (
        ({k: v for k, v in state.items() if k != "latent_attention_model.latents"}, "1 weights are missing"),
        ({**state, "embedding_model.norm.weight": torch.ones(3)}, r"should be \(24,\), got \(3,\)"),
        ({**state, "lm_head.weight": torch.ones(3)}, r"got 'lm_head\.weight'"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            NVEmbed.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        NVEmbed.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        NVEmbed.from_pretrained(tmp_path)


def test_weights_arrive_one_at_a_time():
    """The next tensor is asked for only when the last one has its place."""
    model = build()
    config = model.config()
    state = {f"embedding_model.{k}": v for k, v in model.embedding_model.state_dict().items()}
    with pytest.raises(ValueError, match="weights are missing"):
        assemble(iter(state.items()), config)
    seen = []

    def stream():
        for key, value in state.items():
            seen.append(key)
            yield key, value.new_zeros(1)

    with pytest.raises(ValueError, match="should be"):
        assemble(stream(), config)
    assert len(seen) == 1


def test_golden_model():
    case = read_case(GOLDEN_DIR / "nv-embed-model.safetensors")
    model = NVEmbed(*assemble(case.state.items(), case.config), tokenizer())
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    with torch.no_grad():
        states = model.states(ids, mask) * mask[..., None]
        vectors = model(ids, mask, case.inputs["pool_mask"].bool())
    torch.testing.assert_close(states, case.outputs["last_hidden_state"], rtol=case.rtol, atol=case.atol)
    torch.testing.assert_close(vectors, case.outputs["sentence_embeddings"], rtol=case.rtol, atol=case.atol)


def test_sentence_transformers(tmp_path):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = build("llama")
    face = model.to_sentence_transformer({"query": FIND})
    np.testing.assert_allclose(face.encode(TEXTS, prompt_name="query"), model.encode(TEXTS, FIND), atol=1e-5)
    assert face.get_embedding_dimension() == 24
    face.save_pretrained(str(tmp_path / "saved"))
    again = load_readout_model(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(TEXTS, prompt_name="query"), face.encode(TEXTS, prompt_name="query"))

    model.add_lora(rank=2)
    with pytest.raises(ValueError, match="merge_lora"):
        model.save_pretrained(tmp_path / "unmerged")
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, prompts={"anchor": FIND},
    )  # fmt: skip
    rows = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    loss = MultipleNegativesRankingLoss(face)
    SentenceTransformerTrainer(model=face, args=arguments, train_dataset=rows, loss=loss).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_B" in name for name in moved)
    assert any("latent_attention_model" in name for name in moved)
    assert not any(name.startswith("embedding_model") and "lora" not in name for name in moved)
    trained = model.encode(TEXTS, FIND)
    model.merge_lora().save_pretrained(tmp_path / "merged")
    loaded = NVEmbed.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(loaded.encode(TEXTS, FIND), trained, rtol=1e-4, atol=1e-5)


def test_bad_hosts():
    with pytest.raises(ValueError, match="width 16, the decoder gives 24"):
        NVEmbed(decoder("llama").base_model, build().latent_attention_model.__class__(16), tokenizer())
    with pytest.raises(ValueError, match="bidirectional attention is known for"):
        NVEmbed.from_decoder(
            transformers.BertModel(transformers.BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2)),
            tokenizer(),
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_pooled(side):
    model = build(padding_side=side)
    batch = model.text.collate(model.text.rows(TEXTS))
    with torch.no_grad():
        wanted = model(batch["input_ids"], batch["attention_mask"])
        found = model(batch["input_ids"], batch["attention_mask"], torch.ones_like(batch["attention_mask"]))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_at_least_one_text(size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
        build().encode(TEXTS, batch_size=size)


def test_a_tokenizer_that_cuts_on_the_left_keeps_the_instruction():
    left = tokenizer()
    left.truncation_side = "left"
    wanted = InstructedTokenizer(tokenizer(), 12).rows(TEXTS, FIND)
    assert InstructedTokenizer(left, 12).rows(TEXTS, FIND) == wanted
    assert any(len(row.ids) == 12 for row in wanted)


@pytest.mark.parametrize(
    ("kind", "projections"),
    [
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("mistral", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_lora_meets_every_projection(kind, projections):
    pytest.importorskip("peft")
    sizes = {"pad_token_id": 2} if kind == "phi3" else {}
    model = NVEmbed.from_decoder(decoder(kind, **sizes), tokenizer(), num_latents=5, num_heads=3, head_dim=16)
    model.add_lora(rank=2)
    adapted = [name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name]
    assert {name.split(".")[-1] for name in adapted} == projections
    assert len(adapted) == 2 * len(projections)


def test_lora_refuses_stacked_experts():
    pytest.importorskip("peft")
    model = NVEmbed.from_decoder(
        decoder("mixtral", num_local_experts=2), tokenizer(), num_latents=5, num_heads=3, head_dim=16
    )
    with pytest.raises(ValueError, match="experts of mixtral"):
        model.add_lora(rank=2)
