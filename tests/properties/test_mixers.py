"""What every registered mixer must do: a new one is tested the moment it has a name in the registry."""

import pytest
import torch

from cenote.mixing import MapMixer, MetaFormer, MixerContext
from cenote.types import Grid
from properties.mixer_options import DIM, GRID, SPECS, base_name, context_for, make

CELLS = GRID[0] * GRID[1]
every_mixer = pytest.mark.parametrize("spec", SPECS)


def build(spec, seed=0):
    """A mixer in eval mode, no parameter at a special value."""
    torch.manual_seed(seed)
    mixer = make(spec)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer.eval()


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_bound(mixer):
    """Whether the real tokens have to fill the grid."""
    return "grid" in mixer.needs


def padded(mixer, counts, pads, garbage=0.0):
    """Tokens with ``counts[b]`` real ones in row b between garbage, their mask and their context."""
    width = max(count + left + right for count, (left, right) in zip(counts, pads, strict=True))
    tokens, mask = torch.full((len(counts), width, DIM), garbage), torch.zeros(len(counts), width, dtype=torch.bool)
    for b, (count, (left, _)) in enumerate(zip(counts, pads, strict=True)):
        tokens[b, left : left + count] = draw(b, count, DIM)
        mask[b, left : left + count] = True
    return tokens, mask, context_for(mixer, tokens, mask)


def some_counts(mixer):
    return [CELLS] * 3 if grid_bound(mixer) else [5, CELLS, 1]


def some_pads(mixer):
    """Grids are padded behind; a fixed stream is tied to absolute positions, so it stands at the left, too."""
    return [(0, 2), (0, 4), (0, 0)] if grid_bound(mixer) or "stream" in mixer.needs else [(1, 2), (0, 4), (3, 0)]


def close(actual, expected, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@every_mixer
def test_shape_stays_and_a_full_mask_changes_nothing(spec):
    mixer = build(spec)
    tokens = draw(0, 3, CELLS, DIM)
    context = context_for(mixer, tokens, None)
    mixed = mixer(tokens, None, context)
    assert mixed.shape == tokens.shape
    assert mixed.dtype == torch.float32
    close(mixer(tokens, torch.ones(3, CELLS, dtype=torch.bool), context), mixed)
    close(mixer(tokens[:1], None, context_for(mixer, tokens[:1], None)), mixed[:1])


@every_mixer
@pytest.mark.parametrize("garbage", [0.0, 1e4, float("nan")])
def test_an_item_alone_equals_the_same_item_padded_in_a_batch(spec, garbage):
    mixer = build(spec)
    counts, pads = some_counts(mixer), some_pads(mixer)
    tokens, mask, context = padded(mixer, counts, pads, garbage)
    with torch.no_grad():
        batch = mixer(tokens, mask, context)
        assert bool((batch[~mask] == 0).all())
        for b in range(3):
            alone = tokens[b : b + 1, mask[b]]
            own = {
                field: None if getattr(context, field) is None else getattr(context, field)[b : b + 1, mask[b]]
                for field in ("segment_ids", "special_mask", "embeddings", "positions")
            }
            close(batch[b : b + 1, mask[b]], mixer(alone, None, context.replace(**own)))


@every_mixer
def test_tokens_see_later_ones_where_it_is_said_so(spec):
    mixer = build(spec)
    tokens = draw(0, 2, CELLS, DIM)
    changed = tokens.clone()
    changed[:, -3:] = draw(1, 2, 3, DIM)
    before, after = (mixer(x, None, context_for(mixer, x, None))[:, :-3] for x in (tokens, changed))
    if mixer.causal:
        close(after, before)
    elif not mixer.permutation_equivariant or base_name(spec) != "identity":
        assert (after - before).abs().max() > 1e-4


@every_mixer
def test_permuted_tokens_give_permuted_outputs_where_it_is_said_so(spec):
    mixer = build(spec)
    tokens = draw(0, 2, CELLS, DIM)
    order = torch.randperm(CELLS, generator=torch.Generator().manual_seed(1))
    context = context_for(mixer, tokens, None)
    moved = context.replace(
        **{
            field: None if getattr(context, field) is None else getattr(context, field)[:, order]
            for field in ("segment_ids", "special_mask", "embeddings")
        }
    )
    mixed, permuted = mixer(tokens, None, context)[:, order], mixer(tokens[:, order], None, moved)
    if mixer.permutation_equivariant:
        close(permuted, mixed)
    else:
        assert (permuted - mixed).abs().max() > 1e-4


@every_mixer
def test_gradients_are_finite_reach_everything_and_leave_padding_out(spec):
    mixer = build(spec).train()
    tokens, mask, context = padded(mixer, some_counts(mixer), some_pads(mixer), garbage=3.0)
    tokens.requires_grad_()
    mixer(tokens, mask, context).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert parameter.grad.abs().max() > 0, name
    assert bool(tokens.grad.isfinite().all())
    assert tokens.grad[mask].abs().amax(dim=-1).min() > 0
    assert bool((tokens.grad[~mask] == 0).all())


@every_mixer
@pytest.mark.filterwarnings("ignore:on a grid of")
def test_what_it_asks_for_matters(spec):
    mixer = build(spec)
    tokens = draw(0, 2, CELLS, DIM)
    context = context_for(mixer, tokens, None)
    mixed = mixer(tokens, None, context)
    others = {
        "segment_ids": lambda ids: ids // 2,
        "special_mask": lambda special: special.roll(3, dims=1),
        "embeddings": lambda embeddings: embeddings.flip(-1),
        "stream": lambda stream: stream.flip(-1),
    }
    for need in mixer.needs - {"grid"}:
        changed = context.replace(**{need: others[need](getattr(context, need))})
        assert (mixer(tokens, None, changed) - mixed).abs().max() > 1e-4, need
    if "grid" in mixer.needs and "grid=" not in spec and base_name(spec) not in ("random_matrix", "spatial_fc"):
        flat = context.replace(grid=Grid(2, CELLS // 2))
        assert (mixer(tokens, None, flat) - mixed).abs().max() > 1e-4


def distance(actual, reference):
    return ((actual.float() - reference).norm() / reference.norm()).item()


@every_mixer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_half_precision(spec, dtype, tolerance):
    mixer = build(spec)
    tokens, mask, context = padded(mixer, some_counts(mixer), some_pads(mixer))
    with torch.no_grad():
        reference = mixer(tokens, mask, context)
        with torch.autocast("cpu", dtype=dtype):
            assert distance(mixer(tokens, mask, context), reference) < tolerance
            assert bool(mixer(30 * tokens, mask, context).isfinite().all())
        narrow_context = context.replace(
            embeddings=None if context.embeddings is None else context.embeddings.to(dtype),
            stream=None if context.stream is None else context.stream.to(dtype),
        )
        narrow = build(spec).to(dtype)(tokens.to(dtype), mask, narrow_context)
    assert narrow.dtype == dtype
    assert distance(narrow, reference) < 2 * tolerance


@every_mixer
def test_double_precision_agrees_with_single(spec):
    mixer, double = build(spec), build(spec).double()
    tokens, mask, context = padded(mixer, some_counts(mixer), some_pads(mixer))
    wide = context.replace(
        embeddings=None if context.embeddings is None else context.embeddings.double(),
        stream=None if context.stream is None else context.stream.double(),
    )
    with torch.no_grad():
        mixed = double(tokens.double(), mask, wide)
        assert mixed.dtype == torch.float64
        assert distance(mixed, mixer(tokens, mask, context)) < 1e-4


@every_mixer
def test_state_dict_round_trip(spec):
    mixer, other = build(spec, seed=0), build(spec, seed=1)
    tokens = draw(0, 2, CELLS, DIM)
    context = context_for(mixer, tokens, None)
    if list(mixer.parameters()):
        assert not torch.equal(other(tokens, None, context), mixer(tokens, None, context))
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(tokens, None, context), mixer(tokens, None, context))


@every_mixer
def test_maps_are_distributions_over_real_tokens(spec):
    mixer = build(spec)
    tokens, mask, context = padded(mixer, some_counts(mixer), some_pads(mixer), garbage=3.0)
    if not mixer.attends:
        with pytest.raises(ValueError, match="no attention maps"):
            mixer(tokens, mask, context, return_weights=True)
        return
    mixed, weights = mixer(tokens, mask, context, return_weights=True)
    close(mixed, mixer(tokens, mask, context))
    assert weights.ndim == 4
    assert tuple(weights.shape[2:]) == (mask.shape[1], mask.shape[1])
    rows = weights.transpose(1, 2)[mask[: len(weights)] if len(weights) < len(mask) else mask]
    close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    assert bool((rows >= -1e-6).all())


@every_mixer
def test_a_map_is_its_cells_row_by_row(spec):
    mixer = build(spec)
    if mixer.needs - {"grid"}:
        pytest.skip("needs more than a grid")
    tokens = draw(0, 2, CELLS, DIM)
    mixed = mixer(tokens, None, MixerContext(grid=Grid(*GRID)))
    cells = mixer.mix_map(tokens.transpose(1, 2).unflatten(2, GRID))
    close(cells.flatten(2).transpose(1, 2), mixed)


@every_mixer
def test_prefix_tokens_of_a_grid_stay_out(spec):
    mixer = build(spec)
    if not isinstance(mixer, MapMixer):
        pytest.skip("no map mixer")
    tokens = draw(0, 2, CELLS + 2, DIM)
    mixed = mixer(tokens, None, MixerContext(grid=Grid(*GRID), prefix=2))
    assert bool((mixed[:, :2] == 0).all())
    close(mixed[:, 2:], mixer(tokens[:, 2:], None, MixerContext(grid=Grid(*GRID))))


@every_mixer
def test_bad_input_is_refused(spec):
    mixer = build(spec)
    kind = type(mixer).__name__
    tokens = draw(0, 2, CELLS, DIM)
    mask = torch.ones(2, CELLS, dtype=torch.bool)
    context = context_for(mixer, tokens, None)
    empty = mask.clone()
    empty[1] = False
    for bad, bad_mask, error, message in (
        (tokens[..., :-1], mask, ValueError, f"{kind} was built for dim={DIM}, got tokens of width {DIM - 1}"),
        (tokens[0], mask, ValueError, f"{kind} expects tokens \\("),
        (tokens[:, :0], None, ValueError, f"{kind} needs at least one token"),
        (tokens.long(), mask, TypeError, f"{kind} expects floating-point tokens, got torch.int64"),
        (tokens, mask.float(), TypeError, f"{kind} expects a boolean mask"),
        (tokens, mask[:, :-1], ValueError, f"{kind} expects a mask of shape"),
        (tokens, empty, ValueError, r"row\(s\) \[1\]"),
    ):
        with pytest.raises(error, match=message):
            mixer(bad, bad_mask, context)
    if mixer.needs:
        with pytest.raises(ValueError, match=f"{kind} needs"):
            mixer(tokens, mask)


@every_mixer
def test_it_runs_in_a_stack(spec):
    torch.manual_seed(0)
    mixer = make(spec)
    stack = MetaFormer(DIM, 2, "identity").eval()
    stack.blocks[1].token_mixer = mixer.eval()
    tokens, mask, context = padded(mixer, some_counts(mixer), some_pads(mixer), garbage=1e3)
    with torch.no_grad():
        batch = stack(tokens, mask, context)[:1, mask[0]]
        first = context.replace(
            **{
                field: None if getattr(context, field) is None else getattr(context, field)[:1, mask[0]]
                for field in ("segment_ids", "special_mask", "embeddings", "positions")
            }
        )
        close(batch, stack(tokens[:1, mask[0]], None, first))
