"""A model's own responses: the same whoever decodes them, decoded once, and never those of something else."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema.drafter import ResponsesConfig, ResponseSource
from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info
from lora.examples.prompts import ExamplePrompts
from lora.examples.responses import ResponseTask, build_response_task, decode_responses, load_responses
from lora.examples.stored_examples import StoredExamples, open_examples
from tests.helpers.stored import write_dataset
from tests.helpers.tiny_checkpoints import MASK_TOKEN
from tests.helpers.tiny_exports import VOCAB_SIZE, make_tiny_model, save_tiny_export

SEQUENCE_LENGTH, MAX_NEW_TOKENS, STOP_IDS = 24, 8, (7, 11)
SOURCES = [ResponseSource.greedy, ResponseSource.sampled]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_export(tmp_path_factory.mktemp("responses") / "export")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_model()


@pytest.fixture(scope="module")
def texts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredExamples:
    return store(checkpoint, tmp_path_factory.mktemp("texts") / "tokens", [[length] for length in range(2, 30)], "text")


@pytest.fixture(scope="module")
def chats(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredExamples:
    """Store chats with prompts of 3 to 6 tokens; the second response of some, of one even its prompt, does not fit."""
    lengths = [[3 + number % 4, 1 + number, 5, 4] for number in range(20)]
    return store(checkpoint, tmp_path_factory.mktemp("chats") / "tokens", lengths, "chat")


def store(checkpoint: Path, path: Path, lengths: list[list[int]], kind: str) -> StoredExamples:
    """Store documents of random tokens with segments of these lengths."""
    generator = torch.Generator().manual_seed(0)
    documents = [
        [torch.randint(101, VOCAB_SIZE, (count,), generator=generator).tolist() for count in segments]
        for segments in lengths
    ]
    write_dataset(path, [documents], kind, read_tokenizer_info(checkpoint, MASK_TOKEN).fingerprint)
    return open_examples(path, checkpoint=checkpoint, sequence_length=SEQUENCE_LENGTH, folder=path)


def plan(
    examples: StoredExamples, cache: Path, *, checkpoint: str = "one", seed: int = 1, **changes: Any
) -> ResponseTask:
    values: dict[str, Any] = {"source": ResponseSource.greedy, "max_new_tokens": MAX_NEW_TOKENS, "prompt_tokens": 6}
    values |= {"prompts_per_shard": 5, "batch_size": 3}
    dtype, stop_ids = changes.pop("dtype", torch.float32), changes.pop("stop_ids", STOP_IDS)
    config = ResponsesConfig(**(values | changes))
    prompts = ExamplePrompts(examples, config.prompt_tokens)
    return build_response_task(
        prompts, config, cache=cache, checkpoint=checkpoint, dtype=dtype, stop_ids=stop_ids, seed=seed
    )


def read_files(what: ResponseTask) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in what.cache.folder.iterdir()}


def greedy_continuation(model: Any, prompt: list[int], count: int) -> list[int]:
    """Continue greedily by the model's forward alone, without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + count and not (len(tokens) > len(prompt) and tokens[-1] in STOP_IDS):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            logits[model.config.mask_token_id] = -torch.inf
            tokens.append(int(logits.argmax()))
    return tokens


def test_a_text_is_continued_after_its_first_tokens(model: Any, texts: StoredExamples, tmp_path: Path) -> None:
    what = plan(texts, tmp_path)
    decode_responses(model, what)
    responses = load_responses(what)
    prompts = [example.tokens[:6].tolist() for example in texts if len(example.tokens) > 6]
    assert [example.tokens.tolist() for example in responses] == [greedy_continuation(model, p, 8) for p in prompts]
    assert all(example.drafted.tolist() == [False] * 6 + [True] * (len(example.tokens) - 6) for example in responses)
    assert what.left_out == len(texts) - len(prompts) > 0


def test_a_chat_gets_a_response_in_its_last_turn_that_fits(model: Any, chats: StoredExamples, tmp_path: Path) -> None:
    what = plan(chats, tmp_path)
    decode_responses(model, what)
    responses = load_responses(what)
    assert (len(responses), what.left_out) == (len(chats), 0)
    for number, example in enumerate(responses):
        first, whole = 3 + number % 4, 3 + number % 4 + 1 + number + 5
        length = whole if whole < SEQUENCE_LENGTH else first
        prompt = chats[number].tokens[:length].tolist()
        room = min(MAX_NEW_TOKENS, SEQUENCE_LENGTH - length)
        assert example.tokens.tolist() == greedy_continuation(model, prompt, room)
        assert example.drafted.tolist() == [False] * length + [True] * (len(example.tokens) - length)


def test_responses_end_after_a_stop_token_or_with_the_sequence(
    model: Any, chats: StoredExamples, tmp_path: Path
) -> None:
    first = plan(chats, tmp_path, max_new_tokens=99, stop_ids=())
    decode_responses(model, first)
    assert {len(example.tokens) for example in load_responses(first)} == {SEQUENCE_LENGTH}
    stop_id = int(load_responses(first)[0].tokens[-1])
    second = plan(chats, tmp_path, max_new_tokens=99, stop_ids=(stop_id,))
    decode_responses(model, second)
    for long, short in zip(load_responses(first), load_responses(second), strict=True):
        begin, end = int(long.drafted.argmax()), len(short.tokens)
        assert short.tokens.tolist() == long.tokens[:end].tolist()
        assert stop_id not in short.tokens[begin : end - 1]
        assert end == SEQUENCE_LENGTH or short.tokens[-1] == stop_id


@pytest.mark.parametrize("source", SOURCES)
def test_ranks_and_interruptions_do_not_matter(
    model: Any, texts: StoredExamples, tmp_path: Path, source: ResponseSource
) -> None:
    alone = plan(texts, tmp_path / "alone", source=source)
    decode_responses(model, alone)
    several = plan(texts, tmp_path / "several", source=source)
    for rank in (2, 0, 1):
        torch.rand(rank)
        decode_responses(model, several, rank=rank, world_size=3)
    assert alone.num_shards > 3
    assert read_files(several) == read_files(alone)

    broken = plan(texts, tmp_path / "broken", source=source)

    def stop_at_seventh(done: int, total: int) -> None:
        if done > 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_responses(model, broken, progress=stop_at_seventh)
    assert broken.cache.path(0).exists() and not broken.cache.path(1).exists()
    with pytest.raises(UserError, match=r"shard_00001\.npz does not exist"):
        load_responses(broken)
    before = broken.cache.path(0).stat().st_mtime_ns
    decode_responses(model, broken)
    assert broken.cache.path(0).stat().st_mtime_ns == before
    assert read_files(broken) == read_files(alone)


def test_progress_counts_the_prompts_of_this_rank_and_run(model: Any, texts: StoredExamples, tmp_path: Path) -> None:
    what = plan(texts, tmp_path)
    seen: list[tuple[int, int]] = []
    decode_responses(model, what, rank=1, world_size=2, progress=lambda done, total: seen.append((done, total)))
    expected = sum(len(what.numbers[what.shard_range(shard)]) for shard in range(1, what.num_shards, 2))
    assert seen[-1] == (expected, expected)
    assert len(seen) > 2 and sorted(seen) == seen
    seen.clear()
    decode_responses(model, what, rank=1, world_size=2, progress=lambda done, total: seen.append((done, total)))
    assert not seen


def test_draws_have_seeds_of_their_own(model: Any, texts: StoredExamples, tmp_path: Path) -> None:
    plans = [plan(texts, tmp_path, source=ResponseSource.sampled, seed=seed) for seed in (1, 2)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for what in plans:
        decode_responses(model, what)
    assert torch.equal(torch.rand(3), expected)  # the trainer's own draws are what they were
    first, second = ([example.tokens.tolist() for example in load_responses(what)] for what in plans)
    assert first != second
    assert [tokens[:6] for tokens in first] == [tokens[:6] for tokens in second]


def test_other_responses_go_elsewhere(texts: StoredExamples, chats: StoredExamples, tmp_path: Path) -> None:
    sampled: dict[str, Any] = {"source": ResponseSource.sampled}
    changes: list[dict[str, Any]] = [
        {},
        {"checkpoint": "two"},
        {"dtype": torch.bfloat16},
        {"stop_ids": (7,)},
        {"max_new_tokens": 9},
        {"prompt_tokens": 5},
        {"prompts_per_shard": 6},
        {"batch_size": 4},
        sampled,
        sampled | {"seed": 2},
        sampled | {"temperature": 0.5},
    ]
    plans = [plan(texts, tmp_path, **change) for change in changes] + [plan(chats, tmp_path)]
    assert len({what.cache.folder for what in plans}) == len(plans)


def test_what_does_not_matter_does_not_cost_new_responses(
    texts: StoredExamples, chats: StoredExamples, tmp_path: Path
) -> None:
    greedy = [plan(texts, tmp_path, seed=seed, temperature=seed / 2, stop_ids=STOP_IDS[::seed]) for seed in (1, -1)]
    assert greedy[0].cache.folder == greedy[1].cache.folder
    assert plan(chats, tmp_path, prompt_tokens=1).cache.folder == plan(chats, tmp_path).cache.folder


@pytest.mark.parametrize("content", [b"", b"PK broken", None])
def test_damaged_responses_are_named(model: Any, texts: StoredExamples, tmp_path: Path, content: bytes | None) -> None:
    what = plan(texts, tmp_path)
    decode_responses(model, what)
    path = what.cache.path(1)
    path.write_bytes(what.cache.path(2).read_bytes() if content is None else content)
    with pytest.raises(UserError, match=r"shard_00001\.npz (is damaged|holds responses to other prompts).*delete it"):
        load_responses(what)
    path.unlink()
    decode_responses(model, what)
    assert len(load_responses(what)) == len(what.numbers)


def test_responses_have_a_fingerprint_of_their_own(model: Any, texts: StoredExamples, tmp_path: Path) -> None:
    what = plan(texts, tmp_path)
    decode_responses(model, what)
    responses = load_responses(what)
    assert responses.sequence_length == SEQUENCE_LENGTH
    assert responses.fingerprint != texts.fingerprint
    other = dataclasses.replace(what, cache=plan(texts, tmp_path, checkpoint="two").cache)
    decode_responses(model, other)
    assert load_responses(other).fingerprint != responses.fingerprint


def test_texts_without_room_for_a_response_are_an_error(texts: StoredExamples, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no text has more than responses\.prompt_tokens=24 tokens"):
        plan(texts, tmp_path, prompt_tokens=24)


def test_a_folder_that_cannot_be_written_is_named(model: Any, texts: StoredExamples, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"responses cannot be written to .* set responses\.cache to another folder"):
        decode_responses(model, plan(texts, tmp_path / "file"))
