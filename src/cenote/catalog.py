"""The systems that cenote implements or will: one entry a paper. Every listing is made from this table."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

FAMILIES = ("pooling", "mixing", "vision", "attention", "visual_tokens", "tuning", "inspection", "worlds")
PLANNED = "planned"


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        slug: short name; file names, evidence pages and reproductions use it.
        title: title of the paper.
        year: year of the first public version.
        arxiv: arXiv id.
        family: the room of the library it lives in, one of :data:`FAMILIES`.
        purpose: what it is for, in one line.
        entry_point: ``"module:name"``, or ``"planned"``.
        hosts: models or data it applies to.
    """

    slug: str
    title: str
    year: int
    arxiv: str
    family: str
    purpose: str
    entry_point: str = PLANNED
    hosts: tuple[str, ...] = ()

    @property
    def planned(self) -> bool:
        """Whether there is no implementation yet."""
        return self.entry_point == PLANNED

    @property
    def url(self) -> str:
        """Where the paper is."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def load(self) -> Any:
        """The class or function behind :attr:`entry_point`; ``ValueError`` while it is planned."""
        if self.planned:
            raise ValueError(f"{self.slug} is planned and has no implementation yet")
        module, _, name = self.entry_point.partition(":")
        return getattr(importlib.import_module(module), name)


def find(slug: str) -> System:
    """The system of a slug; ``ValueError`` naming the nearest slugs if there is none."""
    for system in SYSTEMS:
        if system.slug == slug:
            return system
    wanted = slug.lower().replace("_", "-")
    near = difflib.get_close_matches(wanted, [system.slug for system in SYSTEMS], n=3, cutoff=0.5)
    near += [system.slug for system in SYSTEMS if wanted and wanted in system.slug and system.slug not in near]
    hint = f"did you mean {', '.join(near)}?" if near else "`cenote list` names all"
    raise ValueError(f"unknown system {slug!r}; {hint}")


SYSTEMS: tuple[System, ...] = (
    System(
        "abrupt-icl",
        "The mechanistic basis of data dependence and abrupt learning in an in-context classification task",
        2023,
        "2312.03002",
        "worlds",
        "A few-shot stream in which a two-layer attention network suddenly learns to copy labels from its context.",
        "cenote.worlds.context_classification:ContextClassification",
        hosts=("small attention-only networks",),
    ),
    System(
        "atten-craft",
        "AttenCraft: Attention-guided Disentanglement of Multiple Concepts for Text-to-Image Customization",
        2024,
        "2405.17965",
        "tuning",
        "Teaches a diffusion model several concepts of one picture, with masks read from its own attention.",
        hosts=("Stable Diffusion (diffusers)",),
    ),
    System(
        "attention-saturation",
        "Attention Saturation and Gradient Suppression at Inflection Layers: Diagnosing and Mitigating Bottlenecks in "
        "Transformer Adaptation",
        2025,
        "2511.00797",
        "inspection",
        "Finds the layers whose attention is sharp and whose gradient is weak, and puts adapters there.",
        hosts=("transformers encoders and decoders",),
    ),
    System(
        "core-matching",
        "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive "
        "Acceleration of Vision-Language Models",
        2025,
        "2505.19235",
        "visual_tokens",
        "Keeps the neurons that fire for most of the prompt and the image tokens that fire them.",
        hosts=("LLaVA", "gated feed-forward decoders"),
    ),
    System(
        "costarr",
        "COSTARR: Consolidated Open Set Technique with Attenuation for Robust Recognition",
        2025,
        "2508.01087",
        "inspection",
        "Scores how likely an item belongs to no known class, from features before and after the class weights.",
        "cenote.inspection.open_set:CoStarr",
        hosts=("any classifier with a linear last layer",),
    ),
    System(
        "cross-lmm",
        "CrossLMM: Decoupling Long Video Sequences from LMMs via Dual Cross-Attention Mechanisms",
        2025,
        "2505.17020",
        "visual_tokens",
        "Puts a few pooled tokens a frame in the decoder and reads the rest through gated cross-attention.",
        hosts=("LLaVA-type video models with a Qwen2 decoder",),
    ),
    System(
        "deconstructing-attention",
        "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        2025,
        "2510.11602",
        "mixing",
        "Attention with one principle removed at a time, alone or alternating with the standard form.",
        entry_point="cenote.integrations.deconstructed_qwen2:DeconstructedQwen2ForCausalLM",
        hosts=("Qwen2-type decoders",),
    ),
    System(
        "deeplab",
        "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully Connected "
        "CRFs",
        2016,
        "1606.00915",
        "vision",
        "Dilates a convolutional network, scores it at several rates and sharpens the result with a dense CRF.",
        hosts=("torchvision, timm and transformers CNNs", "any unary scores (CRF)"),
    ),
    System(
        "dynamic-dino",
        "Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time Open-Vocabulary Object Detection",
        2025,
        "2507.17436",
        "tuning",
        "Splits a trained feed-forward network into fine experts that start out as exactly the same function.",
        hosts=("GroundingDINO and DETR", "BERT", "ViT", "GPT-2", "Llama"),
    ),
    System(
        "echo-att",
        "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
        2024,
        "2409.14595",
        "attention",
        "Lets similar inner layers copy one attention map, then repairs the model by distillation.",
        hosts=("Llama, Mistral, Qwen2, Qwen3 and Gemma decoders",),
        entry_point="cenote.attention.echo_att:EchoAtt",
    ),
    System(
        "efficient-probing",
        "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling",
        2025,
        "2506.10178",
        "pooling",
        "Learned queries that attend to raw tokens and pool a slice each: a light attentive probe.",
        "cenote.pooling.efficient_probing:EfficientProbing",
        ("any backbone that gives tokens",),
    ),
    System(
        "embed-lens",
        "What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in Multimodal Large Language Models",
        2026,
        "2603.00510",
        "inspection",
        "Reads visual tokens as their nearest words and sorts them into sink, dead and alive.",
        hosts=("LLaVA", "other models with projected visual tokens"),
    ),
    System(
        "ggem",
        "Group Generalized Mean Pooling for Vision Transformer",
        2022,
        "2212.04114",
        "pooling",
        "Power mean over tokens with one learned exponent for each group of channels.",
        "cenote.pooling.ggem:GGeM",
        ("any backbone that gives tokens",),
    ),
    System(
        "halonet",
        "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        2021,
        "2103.12731",
        "mixing",
        "Local self-attention in blocks that share one neighbourhood, fast enough to replace convolutions.",
        "cenote.mixing.halo_attention:HaloAttention",
        ("feature maps", "ResNet-type backbones", "timm's halo networks"),
    ),
    System(
        "hiprune",
        "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
        2025,
        "2508.00553",
        "visual_tokens",
        "Keeps the image tokens that middle layers look at, their neighbours, and the last layer's summaries.",
        hosts=("LLaVA", "LLaVA-NeXT", "Qwen2.5-VL"),
    ),
    System(
        "histograph",
        "Learning from Historical Activations in Graph Neural Networks",
        2026,
        "2601.01123",
        "pooling",
        "A graph readout that weighs the activations of all message-passing layers, then attends over nodes.",
        "cenote.pooling.histograph:HistoGraph",
        ("PyTorch Geometric networks", "any stack of hidden states"),
    ),
    System(
        "hylra",
        "HyLRA: Hybrid Layer Reuse Attention for Efficient Long-Context Inference",
        2026,
        "2602.00777",
        "attention",
        "Plans offline which layers attend fully, which select keys and which reuse a selection.",
        "cenote.attention.hylra:HyLRA",
        hosts=("Llama-, Mistral- and Qwen-type decoders",),
    ),
    System(
        "icl-linear-regression",
        "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head "
        "Softmax Attention",
        2025,
        "2503.12734",
        "worlds",
        "In-context regression whose trained heads collapse to two numbers with a known optimum.",
        "cenote.worlds.linear_regression:LinearRegression",
        hosts=("one-layer softmax attention",),
    ),
    System(
        "l-tdnn",
        "Layer-aware TDNN: Speaker Recognition Using Multi-Layer Features from Pre-Trained Models",
        2024,
        "2409.07770",
        "pooling",
        "Convolves over the layers and frames of a speech encoder to make one speaker vector.",
        "cenote.pooling.l_tdnn:LTDNN",
        ("wav2vec 2.0", "HuBERT", "WavLM"),
    ),
    System(
        "multi-layer-pooling",
        "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?",
        2024,
        "2409.02727",
        "pooling",
        "Learned latents attend over one summary vector from every layer of a language model.",
        "cenote.pooling.multi_layer:MultiLayerPooling",
        ("encoders and decoders with all hidden states",),
    ),
    System(
        "normgrad",
        "There and Back Again: Revisiting Backpropagation Saliency Methods",
        2020,
        "2004.02866",
        "inspection",
        "Saliency at any depth: the norm of each position's share of a virtual layer's gradient.",
        hosts=("CNNs and vision transformers",),
    ),
    System(
        "nv-embed",
        "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models",
        2024,
        "2405.17428",
        "pooling",
        "Re-expresses tokens through a learned dictionary of latents and averages them to one embedding.",
        "cenote.pooling.latent_attention:LatentAttention",
        ("Mistral-, Llama- and Qwen-type decoders made bidirectional", "any backbone that gives tokens"),
    ),
    System(
        "ponet",
        "PoNet: Pooling Network for Efficient Token Mixing in Long Sequences",
        2021,
        "2110.02442",
        "mixing",
        "Mixes tokens in linear time by a global, a segment and a local pooling.",
        "cenote.mixing.ponet:PoNet",
        ("BERT-type encoders of transformers", "MetaFormer skeletons"),
    ),
    System(
        "poolformer",
        "MetaFormer Is Actually What You Need for Vision",
        2021,
        "2111.11418",
        "mixing",
        "A vision backbone whose token mixer is plain average pooling, and the skeleton that takes any mixer.",
        "cenote.mixing.poolformer:StagedMetaFormer",
        ("images", "MetaFormer skeletons"),
    ),
    System(
        "random-feature-attention-layer",
        "What can a Single Attention Layer Learn? A Study Through the Random Features Lens",
        2023,
        "2307.11353",
        "mixing",
        "One attention layer with frozen random queries and keys, its values fitted by ridge regression.",
        entry_point="cenote.mixing.random_feature_attention_layer:RandomFeatureAttentionLayer",
        hosts=("a query and a set of keys",),
    ),
    System(
        "rectified-spaattn",
        "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
        2025,
        "2511.19835",
        "attention",
        "Block-sparse attention corrected by pooled estimates of what the dropped blocks would have said.",
        entry_point="cenote.attention.rectified_spaattn:RectifiedSpaAttn",
        hosts=("Wan and HunyuanVideo (diffusers)", "bidirectional attention"),
    ),
    System(
        "rsq",
        "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
        2025,
        "2503.01820",
        "tuning",
        "Rotates a model, then quantises it with second-order statistics weighted by token importance.",
        entry_point="cenote.tuning.rsq:quantize_rsq",
        hosts=("Llama", "Mistral", "Qwen2"),
    ),
    System(
        "seer-attention",
        "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
        2024,
        "2410.13276",
        "attention",
        "A small learned gate predicts which blocks of the attention map matter and skips the others.",
        "cenote.attention.seer_attention:SeerAttention",
        hosts=("Llama- and Qwen-type decoders",),
    ),
    System(
        "spp",
        "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition",
        2014,
        "1406.4729",
        "pooling",
        "Max-pools a map of any size into grids of several sizes: a fixed vector, also for thousands of boxes.",
        "cenote.pooling.spp:SPP",
        ("CNN feature maps", "patch grids of vision transformers"),
    ),
    System(
        "supernet-pooling",
        "Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture",
        2023,
        "2306.11982",
        "tuning",
        "Searches where a convolutional network should downsample, with a few weight-sharing networks.",
        hosts=("stage-structured CNNs",),
    ),
    System(
        "tap-adl",
        "Robustifying Token Attention for Vision Transformers",
        2023,
        "2303.11126",
        "mixing",
        "Averages each token with its surroundings before attention and keeps attention rows diverse.",
        "cenote.mixing.tap:TAP",
        hosts=("FAN", "RVT", "any attention over a token grid"),
    ),
    System(
        "test-time-regression",
        "Test-time regression: a unifying framework for designing sequence models with associative memory",
        2025,
        "2501.12352",
        "mixing",
        "Sequence layers as regressors fitted to the past: linear attention, delta rules, softmax and more.",
        "cenote.mixing.test_time_regression:TestTimeRegression",
        hosts=("causal sequence models",),
    ),
    System(
        "tidal-decode",
        "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
        2024,
        "2410.05076",
        "attention",
        "Two layers choose the key positions and all following layers of a decoding step reuse them.",
        "cenote.attention.tidal_decode:TidalDecode",
        hosts=("Llama-, Mistral-, Qwen- and Gemma-type decoders",),
    ),
    System(
        "token-flex",
        "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference",
        2025,
        "2504.03154",
        "visual_tokens",
        "A projector trained for several token counts, so that their number is chosen at inference.",
        hosts=("vision encoders in front of a language model",),
    ),
    System(
        "uplift",
        "UPLiFT: Efficient Pixel-Dense Feature Upsampling with Local Attenders",
        2026,
        "2601.17950",
        "vision",
        "Doubles the resolution of frozen features again and again, guided by the image.",
        hosts=("DINOv2 and DINOv3", "any patch features", "VAE latents"),
    ),
    System(
        "visual-attention-sink",
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        2025,
        "2503.03321",
        "attention",
        "Moves attention from image tokens that only absorb it to those that show something.",
        entry_point="cenote.attention.visual_attention_redistribution:VisualAttentionRedistribution",
        hosts=("LLaVA", "Qwen2-VL", "InternVL"),
    ),
    System(
        "visual-funnel",
        "Visual Funnel: Resolving Contextual Blindness in Multimodal Large Language Models",
        2025,
        "2512.10362",
        "visual_tokens",
        "Asks the model where to look, then feeds nested crops sized by how sure it is.",
        hosts=("Qwen2.5-VL", "LLaVA", "InstructBLIP"),
    ),
    System(
        "zoo-prune",
        "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
        2025,
        "2509.24837",
        "visual_tokens",
        "Keeps image tokens to which the projector is sensitive and which differ from each other.",
        hosts=("LLaVA", "other models with a projector"),
    ),
)
