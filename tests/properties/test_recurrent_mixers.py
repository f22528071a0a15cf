"""What every registered recurrent mixer must do: chunks, steps and the whole sequence agree, padding or not."""

import pytest
import torch

from cenote.mixing import RecurrentMixer
from cenote.mixing.registry import mixer_class
from properties.mixer_options import DIM, SPECS, base_name, context_for
from properties.test_mixers import CELLS, build, close, draw, padded

RECURRENT = [spec for spec in SPECS if issubclass(mixer_class(base_name(spec)), RecurrentMixer)]


def recurrent(spec, seed=0):
    mixer = build(spec, seed)
    if not mixer.causal:
        pytest.skip("not causal with these settings")
    return mixer


@pytest.mark.parametrize("spec", RECURRENT)
@pytest.mark.parametrize("cuts", [(CELLS,), (1, 7), (5, 11), tuple(range(1, CELLS))])
def test_chunks_and_steps_agree_with_the_whole(spec, cuts):
    mixer = recurrent(spec)
    tokens = draw(0, 2, CELLS, DIM)
    context = context_for(mixer, tokens, None)
    with torch.no_grad():
        whole, state, parts = mixer.parallel(tokens, None, context), None, []
        for first, last in zip((0, *cuts), (*cuts, CELLS), strict=True):
            if first < last:
                own = context.replace(
                    embeddings=None if context.embeddings is None else context.embeddings[:, first:last]
                )
                part, state = mixer.chunk(tokens[:, first:last], state, None, own)
                parts.append(part)
        close(torch.cat(parts, dim=1), whole)
        state, steps = None, []
        for t in range(CELLS):
            own = context.replace(embeddings=None if context.embeddings is None else context.embeddings[:, t : t + 1])
            step, state = mixer.step(tokens[:, t], state, own)
            steps.append(step)
        close(torch.stack(steps, dim=1), whole)


@pytest.mark.parametrize("spec", RECURRENT)
def test_padding_changes_neither_outputs_nor_state(spec):
    mixer = recurrent(spec)
    tokens, mask, context = padded(
        mixer, [6, 4, 5], [(0, 2), (0, 4), (0, 3)] if mixer.needs else [(1, 1), (0, 4), (3, 0)], 1e3
    )
    more = draw(9, 3, 2, DIM)
    tail = context_for(mixer, more, None)
    with torch.no_grad():
        mixed, state = mixer.chunk(tokens, None, mask, context)
        assert bool((mixed[~mask] == 0).all())
        close(mixed, mixer.parallel(tokens, mask, context))
        after, _ = mixer.chunk(more, state, None, tail)
        for b in range(3):
            own = context.replace(
                embeddings=None if context.embeddings is None else context.embeddings[b : b + 1, mask[b]]
            )
            _, alone = mixer.chunk(tokens[b : b + 1, mask[b]], None, None, own)
            last = tail.replace(embeddings=None if tail.embeddings is None else tail.embeddings[b : b + 1])
            close(after[b : b + 1], mixer.chunk(more[b : b + 1], alone, None, last)[0])
