"""Train the tiny language model that ships inside the package.

It reads four public-domain novels (``$CENOTE_DATA/books``, the last 5 % of each kept aside), ten of scikit-learn's data
set descriptions (four are kept aside for evaluation) and documents with planted facts, first short ones crowded with
facts, which teach it to look things up, then longer and longer ones:

    python tools/train_embedded_language.py --data shared/data

It goes on from the last checkpoint in ``--work``, with the same result as without the interruption, and writes the
model to ``--out`` at every checkpoint.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cenote.backbones.embedded_language import (
    NAMES,
    SHIPPED,
    evaluation_text,
    make_tokenizer,
    save_embedded_language,
    training_descriptions,
)
from cenote.files import write_whole
from cenote.worlds.planted_facts import QUESTION, PlantedFacts, accuracy

DATA = Path(os.environ.get("CENOTE_DATA", Path(__file__).parents[2] / "shared" / "data"))
HELD_OUT = 0.05
SPECIAL = END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Stage:
    """A share of the steps; each draws one of ``lengths`` in tokens.

    ``facts`` of a step's documents hold planted facts, the others text; of these, ``repeats`` are random tokens said
    over and over instead, a primer in looking back.
    """

    share: float
    lengths: tuple[int, ...]
    facts: float = 0.35
    repeats: float = 0.0


@dataclass(frozen=True)
class Settings:
    """What decides the weights; a checkpoint of other settings is refused.

    Each step holds ``tokens_per_step`` tokens, at least two documents. The tokens of the answers weigh
    ``answer_weight`` in the loss, all others 1. ``lookup_layers`` start as :func:`start_with_lookup` says. After
    ``steps`` steps on a cosine come ``long_steps`` at full length, in which ``long_lr`` falls to nothing.
    """

    steps: int = 4000
    tokens_per_step: int = 3072
    stages: tuple[Stage, ...] = (
        Stage(0.06, (64,), 0.5, 0.4),
        Stage(0.08, (64, 128), 0.5, 0.4),
        Stage(0.085, (128, 256), 0.5, 0.4),
        Stage(0.115, (128, 256)),
        Stage(0.26, (256, 512)),
        Stage(0.28, (256, 512, 1024)),
        Stage(0.12, (512, 1024, 2048)),
    )
    answer_weight: float = 8.0
    lr: float = 3e-3
    warmup: int = 200
    long: Stage = Stage(1.0, (1024, 2048, 2048), 0.5)
    long_steps: int = 300
    long_lr: float = 8e-4
    weight_decay: float = 0.1
    vocab: int = 1024
    hidden: int = 96
    layers: int = 8
    heads: int = 6
    key_value_heads: int = 3
    mlp: int = 256
    context: int = 2048
    rope_theta: float = 500_000.0
    lookup_layers: tuple[int, ...] = (3,)
    bfloat16: bool = False
    seed: int = 0


@dataclass
class Corpus:
    """Token streams: ``novels`` and ``descriptions`` to train on, the other two to evaluate on."""

    novels: Tensor
    descriptions: Tensor
    held_out_novels: Tensor
    held_out_descriptions: Tensor


def read_novels(folder: Path) -> tuple[list[str], list[str]]:
    """All novels of a folder (``.txt.gz``), each cut into the first 95 % to train on and the rest."""
    files = sorted(folder.glob("*.txt.gz"))
    if not files:
        raise SystemExit(
            f"no novels: expected .txt.gz files in {folder} (CENOTE_DATA or --data names the folder above)"
        )
    texts = [gzip.decompress(file.read_bytes()).decode("utf-8").replace("\r\n", "\n") for file in files]
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    return [t[:c] for t, c in zip(texts, cuts, strict=True)], [t[c:] for t, c in zip(texts, cuts, strict=True)]


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair vocabulary in which numbers are cut into pairs of digits and each name is one token."""
    backend = Tokenizer(models.BPE())
    pairs = pre_tokenizers.Split(Regex(r" ?\d\d?"), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pairs, words])
    backend.decoder = decoders.ByteLevel()
    drill = " ".join(QUESTION.format(name="") for _ in range(2000))
    numbers = "".join(f" {n:02d} {n:02d}{n:02d}" for n in range(100)) * 3000 if vocab >= 1024 else ""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(NAMES),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, drill, numbers], trainer)
    backend.add_tokens([AddedToken(f" {name}", normalized=False) for name in NAMES])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, backend.token_to_id(END))]
    )
    return make_tokenizer(backend, {"bos_token": END, "eos_token": END, "pad_token": PAD})


def make_corpus(novels: list[str], held_out: list[str], tokenizer: PreTrainedTokenizerFast) -> Corpus:
    def ids(*texts: str) -> Tensor:
        return torch.cat([torch.tensor(tokenizer.encode(text, add_special_tokens=False)) for text in texts])

    return Corpus(ids(*novels), ids(training_descriptions()), ids(*held_out), ids(evaluation_text()))


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab,
            hidden_size=settings.hidden,
            intermediate_size=settings.mlp,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.key_value_heads,
            head_dim=16,
            max_position_embeddings=settings.context,
            rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if settings.lookup_layers:
        start_with_lookup(model, settings.lookup_layers)
    return model


@torch.no_grad()
def start_with_lookup(model: LlamaForCausalLM, layers: tuple[int, ...]) -> None:
    """Set initial weights so that the model looks back from its first step, a little.

    Two things must be there before either pays: heads that carry the token before to the next place, and heads that
    look for a place so marked. Left to chance that takes a model of this size longer than its whole training. So layer
    0 begins with heads that attend 1, 2 and 3 tokens back (a constant channel of the embedding, turned by the rotary
    angle of that distance), and each of ``layers`` with heads that compare what stands here with what stood there in
    front, and copy. Both are rough; training has to sharpen, spread and direct them.
    """
    config = model.config
    size, groups = config.head_dim, config.num_key_value_heads
    shared, half = config.num_attention_heads // groups, config.head_dim // 2

    def frame() -> Tensor:
        """Random orthonormal rows over all channels but the constant one, one set of ``size`` for each group."""
        basis = torch.linalg.qr(torch.randn(config.hidden_size - 1, config.hidden_size - 1))[0]
        rows = torch.cat([torch.zeros(len(basis), 1), basis], 1)
        return rows[: groups * size].view(groups, size, -1)

    for block in model.model.layers:
        block.self_attn.o_proj.weight *= 0.1
        block.mlp.down_proj.weight *= 0.1
    model.model.embed_tokens.weight[:, 0] = 0.3
    read, mark, copied = frame()[0], frame(), {layer: frame() for layer in layers}
    near = config.rope_parameters["rope_theta"] ** (-2 * torch.arange(3) / size)
    slow = [i for i in range(size) if i % half >= half // 2]  # coordinates that rotary positions hardly turn

    def spread(rows: Tensor) -> Tensor:
        """The first rows, on the slow coordinates of a head."""
        return torch.zeros_like(rows).index_copy(0, torch.tensor(slow), 4 * rows[: len(slow)])

    for group in range(groups):
        keys, heads = slice(group * size, (group + 1) * size), range(group * shared, (group + 1) * shared)
        first = model.model.layers[0].self_attn
        first.k_proj.weight[keys, 0] = 0
        first.k_proj.weight[keys, 0][:3] = 1.2
        first.v_proj.weight[keys] = read
        for head in heads:
            queries = slice(head * size, (head + 1) * size)
            column = first.q_proj.weight[queries, 0]
            column[:] = 0
            column[:3], column[half : half + 3] = 1.2 * (near * (group + 1)).cos(), -1.2 * (near * (group + 1)).sin()
            first.o_proj.weight[:, queries] = 0.06 * mark[group].T
        for layer in layers:
            later = model.model.layers[layer].self_attn
            sought = read if group == 0 else mark[group - 1]
            later.k_proj.weight[keys] = spread(mark[group])
            later.v_proj.weight[keys] = copied[layer][group]
            for head in heads:
                queries = slice(head * size, (head + 1) * size)
                later.q_proj.weight[queries] = spread(sought)
                later.o_proj.weight[:, queries] = 0.1 * copied[layer][group].T


def stage_of(settings: Settings, step: int) -> Stage:
    passed = 0.0
    for stage in settings.stages:
        passed += stage.share
        if step < round(passed * settings.steps):
            return stage
    return settings.long


def make_batch(settings: Settings, corpus: Corpus, world: PlantedFacts, step: int) -> tuple[Tensor, Tensor]:
    """The step's token ids and the weights of their loss; decided by the seed and the number of the step alone."""
    rng = np.random.default_rng((settings.seed, step))
    stage = stage_of(settings, step)
    length = int(rng.choice(stage.lengths))
    rows = max(2, settings.tokens_per_step // length)
    fact_rows = max(1, round(rows * stage.facts))
    most = min(32, (length - 2) // (2 * world.longest_sentence + 1))
    facts = int(rng.integers(min(4, most), most + 1))
    questions = int(rng.integers((facts + 1) // 2, facts + 1))
    planted = world.batch(fact_rows, length, facts, None, questions, int(rng.integers(2**62)))
    weights = torch.ones(rows, length)
    weights[:fact_rows].scatter_(1, planted.answer_positions.flatten(1), settings.answer_weight)
    start = planted.input_ids[0, :1]
    texts = []
    for row in range(rows - fact_rows):
        stream = corpus.descriptions if rng.random() < 0.05 else corpus.novels
        first = int(rng.integers(max(1, len(stream) - length)))
        text = stream[first : first + length - 1]
        if rng.random() < stage.repeats:
            text = torch.from_numpy(rng.integers(len(SPECIAL), settings.vocab, int(rng.integers(8, length // 2))))
            weights[fact_rows + row, : len(text) + 1] = 0
        texts.append(torch.cat([start, text.repeat(-(-length // len(text)))])[:length])
    return torch.cat([planted.input_ids, *[text[None] for text in texts]]), weights


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth; behind it a short second rise and fall."""
    if step >= settings.steps:
        done = (step - settings.steps) / settings.long_steps
        return settings.long_lr * min(1, 10 * done + 0.1) * (1 - done)
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, ids: Tensor, weights: Tensor, bfloat16: bool
) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(ids).logits[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, settings: Settings, step: int
) -> None:
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    write_whole(path, save(tensors, {"step": str(step), "settings": json.dumps(asdict(settings))}))


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, settings: Settings) -> int:
    """Fill model and optimizer from ``path``; returns the number of steps that were done."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if json.loads(metadata["settings"]) != json.loads(json.dumps(asdict(settings))):
            raise SystemExit(f"{path} is of other settings ({metadata['settings']}): remove it or give another --work")
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"model.{name}"))
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
    return int(metadata["step"])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: Tensor, start: int, length: int = 512, most: int = 10**9) -> float:
    """Of the stream cut into stretches of ``length`` tokens, each behind the beginning-of-text token ``start``."""
    rows = stream[: len(stream) // (length - 1) * (length - 1)].view(-1, length - 1)[:: max(1, len(stream) // most)]
    total = 0.0
    for part in rows.split(8):
        ids = torch.cat([torch.full((len(part), 1), start), part], 1)
        logits = model(ids).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / rows.numel())


def train(
    settings: Settings,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    work: Path,
    out: Path,
    checkpoint_every: int = 250,
    stop_after: int | None = None,
) -> LlamaForCausalLM:
    """Train, or go on training, until ``stop_after`` steps or the settings' end."""
    model = make_model(settings, tokenizer)
    optimizer = make_optimizer(model, settings)
    world = PlantedFacts(tokenizer, corpus.novels)
    checkpoint = work / "checkpoint.safetensors"
    step = load_checkpoint(checkpoint, model, optimizer, settings) if checkpoint.exists() else 0
    last = settings.steps + settings.long_steps
    end = min(last, stop_after or last)
    started, tokens, losses = time.perf_counter(), 0, []
    model.train()
    while step < end:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        ids, weights = make_batch(settings, corpus, world, step)
        losses.append(train_step(model, optimizer, ids, weights, settings.bfloat16))
        tokens += ids.numel()
        step += 1
        if step % 50 == 0:
            seconds = time.perf_counter() - started
            print(
                f"step {step:5d} of {last}  length {ids.shape[1]:4d}  loss {sum(losses) / len(losses):.3f}  "
                f"{tokens / seconds:.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
            losses = []
        if step % checkpoint_every == 0 or step == end:
            save_checkpoint(checkpoint, model, optimizer, settings, step)
            save_embedded_language(model, tokenizer, out)
            model.eval()
            print(report(model, tokenizer, corpus, stage_of(settings, step - 1).lengths), flush=True)
            model.train()
    return model.eval()


def report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, lengths: tuple[int, ...]
) -> str:
    """A line of held-out numbers: perplexity of novels and descriptions, planted facts found at each length."""
    world = PlantedFacts(tokenizer, corpus.held_out_descriptions)
    start = tokenizer.bos_token_id
    found = [
        f"{length}: {accuracy(model, world.batch(max(4, 8192 // length), length, seed=length)):.2f}"
        for length in sorted({128, 256, *(n for n in lengths if n > 256)})
    ]
    novels = perplexity(model, corpus.held_out_novels, start, 256, 6000)
    return f"  held-out novels {novels:.2f}  found at {', '.join(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds books/ (default: $CENOTE_DATA)")
    parser.add_argument("--work", type=Path, default=Path("runs/embedded_language"), help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="a .safetensors file; the .json goes beside it")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--tokens-per-step", type=int, default=Settings.tokens_per_step)
    parser.add_argument("--bfloat16", action="store_true", help="where that is faster than float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps")
    parser.add_argument("--threads", type=int, help="of the processor")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    settings = Settings(
        steps=options.steps,
        lr=options.lr,
        tokens_per_step=options.tokens_per_step,
        bfloat16=options.bfloat16,
        seed=options.seed,
    )
    novels, held_out = read_novels(options.data / "books")
    tokenizer = train_tokenizer([*novels, training_descriptions()], settings.vocab)
    corpus = make_corpus(novels, held_out, tokenizer)
    sizes = {name: len(stream) for name, stream in vars(corpus).items()}
    print(f"{len(tokenizer)} tokens in the vocabulary; tokens of text: {sizes}", flush=True)
    model = train(settings, corpus, tokenizer, options.work, options.out, options.checkpoint_every)
    start = tokenizer.bos_token_id
    print(
        f"perplexity: held-out novels {perplexity(model, corpus.held_out_novels, start):.2f}, "
        f"held-out descriptions {perplexity(model, corpus.held_out_descriptions, start):.2f}"
    )


if __name__ == "__main__":
    main()
