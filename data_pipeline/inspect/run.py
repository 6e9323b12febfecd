"""Do what `python -m data_pipeline.inspect` was asked for, in the order it prints."""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from conf.system.errors import UserError
from conf.tokenizer_info import TokenizerInfo, read_tokenizer_info
from data_pipeline.dataset import TokenDataset
from data_pipeline.inspect.decode import Decoder, IdDecoder, TextDecoder
from data_pipeline.inspect.lengths import count_lengths, draw_lengths
from data_pipeline.inspect.render import Painter
from data_pipeline.inspect.samples import read_samples
from data_pipeline.inspect.statistics import (
    NUM_FREQUENT,
    build_length_table,
    build_properties_table,
    build_token_table,
    count_tokens,
    describe_bytes,
    describe_data,
    describe_packing,
    describe_vocabulary,
)
from data_pipeline.noise import NoiseSource
from data_pipeline.packing.form import SequenceForm
from data_pipeline.storage.checks import verify_shard
from data_pipeline.storage.manifest import (
    DatasetManifest,
    ShardManifest,
    bin_path,
    images_path,
    index_path,
    references_path,
)
from data_pipeline.storage.tokens import StoredTokens


@dataclass(frozen=True)
class Inspection:
    """Holds what the command line asks for.

    path, tokenizer: of the data, and the directory of what made them (None: unknown). mask_token: its text.
    form, seed: of the training whose sequences are shown. noise: None shows a stage without noise.
    first, samples: global sample indices [first, first + samples). positions: how many of each are shown; 0: all.
    count_tokens, verify: read all of the data, for frequencies and for checksums. histogram, images: PNGs to write.
    plain: no colours, even in a terminal.
    """

    path: Path
    tokenizer: Path | None
    mask_token: str
    form: SequenceForm
    seed: int
    noise: NoiseSource | None
    first: int
    samples: int
    positions: int
    count_tokens: bool
    verify: bool
    histogram: Path | None
    images: Path | None
    plain: bool


def run_inspection(request: Inspection, console: Console) -> None:
    """Print all that was asked for. Raises UserError: data or tokenizer missing, broken, or not made for each other."""
    stored = StoredTokens(request.path)
    tokenizer = _read_tokenizer(request, stored.manifest)
    decoder = TextDecoder(request.tokenizer) if request.tokenizer else IdDecoder()
    if request.verify:
        _verify(stored, console)
    _print_statistics(request, stored, tokenizer, console)
    if request.count_tokens:
        _print_tokens(stored, tokenizer, decoder, console)
    dataset = TokenDataset(request.path, request.form, request.seed)  # last: not all data make sequences of any length
    noise = f"with noise of stage {request.noise.stage}" if request.noise else "without noise"
    title = f"one epoch of training sequences, {noise}"
    _print_table(console, title, build_properties_table(describe_packing(dataset)))
    if request.tokenizer is None:
        console.print("no --tokenizer: token ids instead of text")
    if request.samples:
        _print_samples(request, dataset, decoder, console)
    if request.images:
        _draw_images(request, dataset, decoder, request.images, console)


def _read_tokenizer(request: Inspection, manifest: DatasetManifest | None) -> TokenizerInfo | None:
    if request.tokenizer is None:
        return None
    info = read_tokenizer_info(request.tokenizer, request.mask_token)
    if manifest and manifest.tokenizer_fingerprint != info.fingerprint:
        raise UserError(
            f"{request.path} was tokenised with tokenizer {manifest.tokenizer_fingerprint}, {request.tokenizer} is "
            f"{info.fingerprint}: give the tokenizer that made the data."
        )
    return info


def _verify(stored: StoredTokens, console: Console) -> None:
    """Compare every checksum. Raises UserError for the first that differs, or without a manifest to compare with."""
    if stored.manifest is None:
        raise UserError(f"{stored.path} has no manifest and so no checksums to verify: leave --verify out.")
    columns = TextColumn("verify"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    shards = [shard for shard in stored.manifest.shards if shard.documents]
    sizes = [_count_bytes(stored.path, shard) for shard in shards]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("verify", total=sum(sizes))
        for shard, size in zip(shards, sizes, strict=True):
            verify_shard(stored.path, shard, with_images=True)
            progress.advance(task, size)
    console.print(f"verified: {len(shards):,} shards, {describe_bytes(sum(sizes))}, every SHA-256 as in the manifest")


def _count_bytes(directory: Path, shard: ShardManifest) -> int:
    paths = [bin_path, index_path, *((images_path, references_path) if shard.images else ())]
    return sum(path_of(directory / shard.name).stat().st_size for path_of in paths)


def _draw_images(request: Inspection, dataset: TokenDataset, decoder: Decoder, path: Path, console: Console) -> None:
    """Write the sheet of the images of the samples. Raises UserError if there are none, or it cannot be written."""
    from data_pipeline.inspect.sheet import collect_cards, draw_sheet

    cards = collect_cards(dataset, range(request.first, request.first + request.samples), decoder)
    if not cards:
        raise UserError(
            f"the samples {request.first} to {request.first + request.samples - 1} of {request.path} hold no image: "
            "choose others with --first and --samples, or leave --images out"
        )
    draw_sheet(cards, path)
    console.print(f"images with their prompts and responses, of {len(cards)} chats: {path}", soft_wrap=True)


def _print_statistics(
    request: Inspection, stored: StoredTokens, tokenizer: TokenizerInfo | None, console: Console
) -> None:
    lengths = count_lengths(stored)
    _print_table(console, "data", build_properties_table(describe_data(stored, tokenizer)))
    _print_table(console, "lengths in tokens", build_length_table(lengths))
    if request.histogram:
        name = request.path.resolve().name
        documents = lengths["document"]
        title = f"{name}: {documents.total:,} documents, {stored.num_tokens:,} tokens"
        draw_lengths(lengths, title, request.form.sequence_length, request.histogram)
        console.print(f"histogram of lengths: {request.histogram}", soft_wrap=True)


def _print_table(console: Console, title: str, table: Table) -> None:
    console.print(Text(title, style="bold cyan"))
    console.print(table)
    console.print()


def _print_tokens(stored: StoredTokens, tokenizer: TokenizerInfo | None, decoder: Decoder, console: Console) -> None:
    itemsize = stored.open_shard(0).read_stream(0, 1).dtype.itemsize
    print(f"counting tokens: reading {describe_bytes(stored.num_tokens * itemsize)}", file=sys.stderr, flush=True)
    counts = count_tokens(stored, tokenizer.vocab_size if tokenizer else 0)
    _print_table(console, f"{NUM_FREQUENT} most frequent tokens", build_token_table(counts, decoder))
    console.print(describe_vocabulary(counts, tokenizer.vocab_size if tokenizer else len(counts)))


def _print_samples(request: Inspection, dataset: TokenDataset, decoder: Decoder, console: Console) -> None:
    painter = Painter(in_colour=not request.plain, is_chat=dataset.stored.kind.is_chat)
    console.print(painter.legend(request.noise is not None))
    indices = range(request.first, request.first + request.samples)
    for sample in read_samples(dataset, indices, decoder, request.noise, request.positions):
        console.print()
        for text in painter.sample(sample):
            console.print(text, overflow="fold")
