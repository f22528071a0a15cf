"""Minuscule random networks of the real classes, saved the way real ones are."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from PIL import Image

SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {**SHAPE, "image_size": 16, "patch_size": 4}
ROPE = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 200, "max_position_embeddings": 64}

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "a", "##s", "!"]

VISION_HOSTS = {
    # name: (configuration class, settings, prefix tokens, has a pooled output)
    "vit": ("ViTConfig", VISION, 1, True),
    "deit": ("DeiTConfig", VISION, 2, True),
    "vit_mae": (
        "ViTMAEConfig",
        {**VISION, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "mask_ratio": 0.6},
        1,
        False,
    ),
    "dinov2": ("Dinov2Config", VISION, 1, True),
    "dinov2_registers": ("Dinov2WithRegistersConfig", {**VISION, "num_register_tokens": 4}, 5, True),
    "dinov3": ("DINOv3ViTConfig", {**VISION, "num_register_tokens": 4}, 5, True),
    "beit": ("BeitConfig", {**VISION, "use_relative_position_bias": True}, 1, True),
    "clip_vision": ("CLIPVisionConfig", VISION, 1, True),
    "siglip_vision": ("SiglipVisionConfig", VISION, 0, True),
}

TEXT_HOSTS = {
    # name: (configuration class, settings, tokenizer, prefix tokens, has a pooled output)
    "bert": ("BertConfig", {**SHAPE, "vocab_size": 50, "max_position_embeddings": 32}, "bert", 1, True),
    "roberta": ("RobertaConfig", {**SHAPE, "vocab_size": 50, "max_position_embeddings": 34}, "bert", 1, True),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "vocab_size": 50, "max_position_embeddings": 32},
        "bert",
        1,
        False,
    ),
    "mpnet": ("MPNetConfig", {**SHAPE, "vocab_size": 50, "max_position_embeddings": 34}, "bert", 1, True),
    "llama": ("LlamaConfig", {**SHAPE, **ROPE}, "words", 0, False),
    "mistral": ("MistralConfig", {**SHAPE, **ROPE}, "words", 0, False),
    "qwen2": ("Qwen2Config", {**SHAPE, **ROPE}, "words", 0, False),
    "qwen3": ("Qwen3Config", {**SHAPE, **ROPE}, "words", 0, False),
}


def save_vision(name: str, folder: Path) -> torch.nn.Module:
    """Save a random vision network with its processor and return it."""
    kind, settings, _, _ = VISION_HOSTS[name]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, kind)(**settings)).eval()
    _randomise(model)
    model.save_pretrained(folder)
    save_processor(folder, settings["image_size"])
    return model


def save_processor(folder: Path, size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    transformers.ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)


def save_text(name: str, folder: Path) -> torch.nn.Module:
    """Save a random text network with a tokenizer of a few words and return it."""
    kind, settings, tokenizer, _, _ = TEXT_HOSTS[name]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, kind)(**settings)).eval()
    _randomise(model)
    model.save_pretrained(folder)
    (bert_tokenizer if tokenizer == "bert" else word_tokenizer)().save_pretrained(folder)
    return model


def bert_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """WordPiece over a few words, with [CLS] and [SEP]; the padding id is 1, as RoBERTa and MPNet expect."""
    vocab = {word: index for index, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS])}
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    fast = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Whole words, no special token in front and no padding token, as decoders often come."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {word: index for index, word in enumerate(["<unk>", "</s>", *WORDS])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="</s>")


def _randomise(model: torch.nn.Module) -> None:
    # Default initialisation is so small that a wrong layer would hardly show.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def pictures(count: int, size: tuple[int, int] = (20, 20)) -> list[Image.Image]:
    """Random colour images."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (count, size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels]
