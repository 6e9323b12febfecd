"""The decoding modes as slow as their definitions: transformers' Ministral 3, dense masks, no cache, one sequence."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CAUSAL_TOKEN = -1


def make_exact(reference: Any) -> Any:
    """Return transformers' model with norms in float64 (its own compute in fp32 whatever the dtype)."""
    for parent in list(reference.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Ministral3RMSNorm":
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)
    return reference


@dataclass
class Oracle:
    """Gives the logits of transformers' model, minus infinity for the mask token."""

    reference: Any
    mask_token_id: int

    @torch.no_grad()
    def ask(self, tokens: list[int], visible: Tensor | None = None, positions: list[int] | None = None) -> Tensor:
        """Return logits [T, vocab] for tokens [T]; visible [T, T] bool (None: causal); positions [T]."""
        if visible is None:
            visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        places = torch.arange(len(tokens)) if positions is None else torch.tensor(positions)
        ids = torch.tensor([tokens])
        logits = self.reference(ids, attention_mask=visible[None, None], position_ids=places[None]).logits[0]
        logits[:, self.mask_token_id] = -torch.inf
        return logits


@dataclass
class Story:
    """The course of a decode: new tokens in order, forwards, acceptance lengths."""

    tokens: list[int] = field(default_factory=list)
    num_forwards: int = 0
    acceptance_lengths: list[int] = field(default_factory=list)


def count_thinking(tokens: list[int], open_id: int, close_id: int) -> int | None:
    """Count the tokens since the <think> of a thought that is still open; None outside of one."""
    spent = None
    for token in tokens:
        if token == close_id:
            spent = None
        elif spent is not None:
            spent += 1
        elif token == open_id:
            spent = 0
    return spent


def choose_ar(oracle: Oracle, tokens: list[int], budget: int | None = None, ids: tuple[int, int] = (12, 13)) -> int:
    """Choose AR's token after `tokens`, which is </think> when the budget is spent."""
    spent = count_thinking(tokens, *ids)
    if budget is not None and spent is not None and spent >= budget:
        return ids[1]
    return int(oracle.ask(tokens)[-1].argmax())


def restate_ar(
    oracle: Oracle,
    prompt: list[int],
    num_tokens: int,
    *,
    stops: tuple[int, ...] = (),
    budget: int | None = None,
    ids: tuple[int, int] = (12, 13),
) -> Story:
    """Decode one token per forward."""
    story = Story()
    while len(story.tokens) < num_tokens and not (story.tokens and story.tokens[-1] in stops):
        story.tokens.append(choose_ar(oracle, prompt + story.tokens, budget, ids))
        story.num_forwards += 1
    return story


def restate_quadratic(
    oracle: Oracle,
    prompt: list[int],
    num_tokens: int,
    block: int,
    *,
    max_groups: int | None = None,
    threshold: float = 0.0,
) -> Story:
    """Draft and verify in one forward of groups [d_i, MASK x block], after a prefill that drafts too."""
    guesses = _ask_masks(oracle, prompt, block)
    story = Story([choose_ar(oracle, prompt)], num_forwards=1)
    draft = _cut(guesses[1:], threshold)  # the first mask stands for the seed
    while len(story.tokens) < num_tokens:
        clean, seed = prompt + story.tokens[:-1], story.tokens[-1]
        draft = draft[: min(block, num_tokens - len(story.tokens)) - 1]
        drafted = [seed, *(token for token, _ in draft)]
        groups = _choose_groups([confidence for _, confidence in draft], max_groups or block)
        verified, masks = _ask_groups(oracle, clean, drafted, block)
        story.num_forwards += 1
        accepted = 0
        while accepted < len(draft) and verified[accepted] == drafted[accepted + 1]:
            accepted += 1
        story.tokens += [*drafted[1 : accepted + 1], verified[accepted]]
        story.acceptance_lengths.append(accepted + 1)
        owner = max(group for group in groups if group <= accepted)
        # Of the group's masks those that stand for known tokens are of no use, the verifier's own included.
        draft = _cut(masks[owner][accepted - owner + 1 :], threshold)
    return story


Guess = tuple[int, float]


def _cut(guesses: list[Guess], threshold: float) -> list[Guess]:
    for index, (_, confidence) in enumerate(guesses):
        if confidence < threshold:
            return guesses[:index]
    return guesses


def _choose_groups(confidences: list[float], max_groups: int) -> list[int]:
    """Choose the first end and the most probable others, if drafted tokens are right as often as they claim."""
    ends, reached = [], 1.0
    for index in range(len(confidences) + 1):
        goes_on = confidences[index] if index < len(confidences) else 0.0
        ends.append((reached * (1 - goes_on), index))
        reached *= goes_on
    return [0, *sorted(index for _, index in sorted(ends[1:], reverse=True)[: max_groups - 1])]


def _guess(logits: Tensor) -> list[Guess]:
    return [(int(one.argmax()), float(one.softmax(-1).max())) for one in logits]


def _ask_masks(oracle: Oracle, context: list[int], block: int) -> list[Guess]:
    """Ask masks after a context, which see it and each other."""
    length = len(context) + block
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[len(context) :] = True
    return _guess(oracle.ask(context + [oracle.mask_token_id] * block, visible)[len(context) :])


def _ask_groups(
    oracle: Oracle, clean: list[int], drafted: list[int], block: int
) -> tuple[list[int], list[list[Guess]]]:
    """Run all groups in one dense forward; return AR's token after each drafted one and its masks' guesses."""
    size, start = block + 1, len(clean)
    tokens, positions = list(clean), list(range(start))
    for index, token in enumerate(drafted):
        tokens += [token, *[oracle.mask_token_id] * block]
        positions += range(start + index, start + index + size)
    visible = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    visible[:start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
    for group in range(len(drafted)):
        mine = slice(start + group * size, start + (group + 1) * size)
        visible[mine, :start] = True
        for other in range(group + 1):
            visible[mine, start + other * size] = True
        masks = slice(mine.start + 1, mine.stop)
        visible[masks, masks] = True
    logits = oracle.ask(tokens, visible, positions)[start:].view(len(drafted), size, -1)
    return [int(one.argmax()) for one in logits[:, 0]], [_guess(masks) for masks in logits[:, 1:]]
