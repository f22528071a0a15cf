"""Hidden states taken from a running network by hooks on its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Sink = Callable[[int, Tensor], None]
"""``sink(number, hidden)`` is called once for each wanted hidden state, in the order in which they are computed."""


def find_blocks(module: nn.Module, count: int | None = None) -> nn.ModuleList | nn.Sequential:
    """The list of transformer blocks of a network, whatever the class calls it.

    It is the ``ModuleList`` (or ``Sequential``) of children of one class that holds the most parameters, and, where the
    configuration says how many blocks there are, has that length.

    Raises:
        ValueError: no such list.
    """
    candidates = [
        child
        for child in module.modules()
        if isinstance(child, nn.ModuleList | nn.Sequential)
        and len(child) > 0
        and (len(child) == count if count is not None else len({type(block) for block in child}) == 1)
    ]
    if not candidates:
        wanted = "blocks" if count is None else f"{count} blocks"
        raise ValueError(f"{type(module).__name__} has no list of {wanted} that hooks could be placed on")
    return max(candidates, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


@contextmanager
def hidden_states(blocks: nn.ModuleList | nn.Sequential, wanted: tuple[int, ...], sink: Sink) -> Iterator[None]:
    """While inside, hand the wanted hidden states to ``sink`` as the network computes them, and keep none.

    Number 0 is what enters the first block, number ``i`` what leaves block ``i``. The output of the last block is not
    offered: it is the model, not its last block, that says what its last hidden state is (there may be a final norm).
    """
    handles = []
    try:
        if 0 in wanted:
            handles.append(blocks[0].register_forward_pre_hook(_on_input(sink), with_kwargs=True))
        for number in wanted:
            if 0 < number < len(blocks):
                handles.append(blocks[number - 1].register_forward_hook(_on_output(number, sink)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(sink: Sink) -> Callable[..., None]:
    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sink(0, args[0] if args else kwargs["hidden_states"])

    return hook


def _on_output(number: int, sink: Sink) -> Callable[..., None]:
    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Blocks of some classes return a tuple whose first entry is the hidden state.
        sink(number, output[0] if isinstance(output, tuple | list) else output)

    return hook
