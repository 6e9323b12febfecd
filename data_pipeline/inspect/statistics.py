"""Describe what a dataset is and holds, as tables."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from conf.tokenizer_info import TokenizerInfo
from data_pipeline.dataset import TokenDataset
from data_pipeline.inspect.decode import Decoder
from data_pipeline.inspect.lengths import LengthCounts
from data_pipeline.inspect.render import make_visible
from data_pipeline.storage.manifest import DatasetManifest
from data_pipeline.storage.tokens import SCAN_CHUNK_TOKENS, Shard, StoredTokens
from model.hf.image_tokens import Grid

FINGERPRINT_CHARACTERS = 12
SUMMARY = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}  # quantiles
SOURCE_KEYS = ("files", "dataset", "subset", "split", "revision", "rows", "licence")
HUB_KEYS = ("subset", "split", "revision")  # say nothing of files
NUM_FREQUENT = 20
NUM_GRIDS = 6  # of images, the most frequent ones

type Properties = dict[str, str]


def describe_data(stored: StoredTokens, tokenizer: TokenizerInfo | None) -> Properties:
    """Return what is on disk and what it was made from."""
    manifest = stored.manifest
    dtype = stored.open_shard(0).read_stream(0, 1).dtype
    properties = {
        "path": str(stored.path),
        "kind": stored.kind.value if manifest else f"{stored.kind.value} (no manifest: taken for text)",
        "documents": f"{stored.num_documents:,}",
        "tokens": f"{stored.num_tokens:,} ({describe_bytes(stored.num_tokens * dtype.itemsize)} as {dtype})",
        "shards": f"{stored.num_shards:,}",
        "largest token id": f"{stored.max_token_id:,}" + ("" if manifest else " in a sample"),
    }
    if tokenizer and stored.max_token_id >= tokenizer.vocab_size:
        properties["largest token id"] += f": NOT in the tokenizer, which has {tokenizer.vocab_size:,} entries"
    if manifest is None:
        return properties | {"tokenizer": "unknown (no manifest)"}
    return properties | _describe_images(stored, manifest) | _describe_manifest(manifest, tokenizer)


def _describe_images(stored: StoredTokens, manifest: DatasetManifest) -> Properties:
    """Return what is known of the images, if there are any."""
    shards = [shard.images for shard in manifest.shards if shard.images]
    if not shards:
        return {}
    grids = _count_grids(stored)
    tokens, num_bytes = sum(images.tokens for images in shards), sum(images.num_bytes for images in shards)
    frequent = ", ".join(f"{height} x {width} ({count:,})" for (height, width), count in grids.most_common(NUM_GRIDS))
    fixed = "\n".join(f"{count:,} {what}" for what, count in manifest.fixed_images.items())
    return {
        "images": f"{manifest.images:,} in prompts, {describe_bytes(num_bytes)} stored",
        "image tokens": f"{tokens:,} ({tokens / manifest.tokens:.1%} of all)",
        "features": f"{len(grids):,} sizes; height x width: {frequent or 'none'}",
        "fixed images": fixed or "0",
    }


def _count_grids(stored: StoredTokens) -> Counter[Grid]:
    """Return how many images have each number of features (height, width)."""
    counts: Counter[Grid] = Counter()
    for number in range(stored.num_shards):
        images = stored.open_shard(number).images
        if images is not None:
            sizes = np.stack([images.all["height"], images.all["width"]], axis=1)
            grids, found = np.unique(sizes, axis=0, return_counts=True)
            counts.update({(int(h), int(w)): int(count) for (h, w), count in zip(grids, found, strict=True)})
    return counts


def _describe_manifest(manifest: DatasetManifest, tokenizer: TokenizerInfo | None) -> Properties:
    """Return what the manifest adds. tokenizer: known to be the one that it names, or None."""
    scored = sum(shard.scored_tokens for shard in manifest.shards)
    skipped = count_skipped(manifest)
    origin = manifest.source
    keys = [key for key in SOURCE_KEYS if origin.get(key) and (origin.get("dataset") or key not in HUB_KEYS)]
    source = [f"{key}: {origin[key]}" for key in keys]
    fingerprint = manifest.tokenizer_fingerprint[:FINGERPRINT_CHARACTERS]
    return {
        "scored tokens": f"{scored:,} ({scored / manifest.tokens:.1%})",
        "tokenizer": fingerprint + (" (the one given)" if tokenizer else ""),
        "source": "\n".join(source) or "unknown",
        "skipped records": "\n".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "0",
    }


def count_skipped(manifest: DatasetManifest) -> dict[str, int]:
    """Return the records left out, by reason; those of inputs that gave no shard are known to the source alone."""
    total = manifest.source.get("skipped")
    if total is None:
        total = {}
        for shard in manifest.shards:
            for reason, count in shard.skipped.items():
                total[reason] = total.get(reason, 0) + count
    return total


def describe_packing(dataset: TokenDataset) -> Properties:
    """Return what one epoch holds in the form that was asked for."""
    counts, form = dataset.counts, dataset.form
    positions = counts.sequences * form.sequence_length
    properties = {
        "sequences": f"{counts.sequences:,} of {form.sequence_length:,} positions, blocks of {form.block_size}",
        "documents in them": f"{counts.documents:,}",
        "tokens in them": f"{counts.tokens:,}, {counts.scored_tokens:,} scored",
        "block padding": f"{counts.block_padding_tokens:,} tokens ({counts.block_padding_tokens / positions:.1%})",
        "padding": f"{counts.padding_tokens:,} positions ({counts.padding_tokens / positions:.1%})",
    }
    if counts.images:
        share = counts.image_tokens / counts.tokens
        properties["images in them"] = f"{counts.images:,}, with {counts.image_tokens:,} tokens ({share:.1%})"
    if counts.truncated_chats or counts.dropped_chats:
        properties["truncated chats"] = f"{counts.truncated_chats:,}, by {counts.truncated_tokens:,} tokens"
        properties["dropped chats"] = f"{counts.dropped_chats:,}, with {counts.dropped_tokens:,} tokens"
    return properties


def build_properties_table(properties: Properties) -> Table:
    """Return a table of two columns: name and value."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in properties.items():
        table.add_row(name, escape(value))
    return table


def build_length_table(lengths: dict[str, LengthCounts]) -> Table:
    """Return a table with one line per kind of length, in tokens."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in ("count", *SUMMARY, "mean"):
        table.add_column(heading, justify="right")
    for name, counts in lengths.items():
        quantiles = [f"{counts.quantile(share):,}" for share in SUMMARY.values()]
        table.add_row(name, f"{counts.total:,}", *quantiles, f"{counts.mean:,.1f}")
    return table


def count_tokens(stored: StoredTokens, vocab_size: int) -> np.ndarray:
    """Return [>= vocab_size] the occurrences of every token id, ids that the vocabulary lacks included.

    Reads all tokens, and without a manifest twice.
    """
    largest = stored.max_token_id
    if stored.manifest is None:
        largest = max(int(chunk.max()) for chunk in _stream(stored.open_shard(0)))
    return stored.count_tokens(max(vocab_size, largest + 1))


def _stream(shard: Shard) -> Iterator[np.ndarray]:
    """Yield all tokens of a shard, chunk by chunk."""
    for start in range(0, shard.num_tokens, SCAN_CHUNK_TOKENS):
        yield shard.read_stream(start, SCAN_CHUNK_TOKENS)


def build_token_table(counts: np.ndarray, decoder: Decoder) -> Table:
    """Return a table of the most frequent tokens."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("id", "count", "share"):
        table.add_column(heading, justify="right")
    table.add_column("token")
    for token in np.argsort(-counts, kind="stable")[:NUM_FREQUENT].tolist():
        if counts[token]:
            shown = escape(repr_token(decoder.name(token)))
            table.add_row(str(token), f"{counts[token]:,}", f"{counts[token] / counts.sum():.2%}", shown)
    return table


def describe_vocabulary(counts: np.ndarray, vocab_size: int) -> str:
    """Return one line on how much of the vocabulary occurs."""
    unused, unknown = int((counts[:vocab_size] == 0).sum()), int(counts[vocab_size:].sum())
    line = f"{unused:,} of {vocab_size:,} vocabulary entries ({unused / vocab_size:.1%}) never occur"
    return line + (f"; {unknown:,} tokens are NOT in the vocabulary" if unknown else "")


def repr_token(text: str) -> str:
    """Return a token's text in quotes, on one line."""
    return f"'{make_visible(text)}'".replace("\n", "")


def describe_bytes(num_bytes: float) -> str:
    """Return a size with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
