"""Text to tokens on disk: megatron-core indexed datasets (`.bin`/`.idx`) with a manifest beside them."""

import os
from collections.abc import Iterable, Iterator
from itertools import batched
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from conf.errors import UserError
from conf.tokenizer_info import read_tokenizer_info
from data_pipeline.manifest import (
    DatasetManifest,
    bin_path,
    compute_sha256,
    index_path,
    manifest_path,
    save_manifest,
)

DOCUMENTS_PER_CALL = 64  # encoded together, on all cores, by the tokenizers library


def prepare_dataset(
    texts: Iterable[str], tokenizer_dir: Path, mask_token: str, prefix: Path, num_documents: int
) -> DatasetManifest:
    """Tokenise one document per text, each closed by the end-of-sequence token, into `<prefix>.{bin,idx,json}`.

    num_documents: length of the progress bar. The index appears last, under its final name and complete: where there
    is an index there is a dataset. Text that spells a reserved token is encoded as ordinary text, so no document can
    smuggle in a mask token.

    Raises ValueError for a directory without tokenizer.json, a tokenizer without mask or end-of-sequence token, and
    when there is no document at all.
    """
    info = read_tokenizer_info(tokenizer_dir, mask_token)
    if info.eos_token_id is None:
        raise UserError(f"The tokenizer in {tokenizer_dir} names no eos_token: set it in tokenizer_config.json.")
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    dtype = DType.optimal_dtype(info.vocab_size)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial = prefix.with_name(prefix.name + ".partial")
    index_path(prefix).unlink(missing_ok=True)
    encoded = encode_documents(_with_progress(texts, num_documents, prefix.name), tokenizer, info.eos_token_id)
    documents, tokens, max_token_id = _write_documents(encoded, partial, dtype)
    if not documents:
        raise UserError(f"There is no document for {prefix}: give at least one non-empty text.")
    manifest = DatasetManifest(
        documents=documents,
        tokens=tokens,
        max_token_id=max_token_id,
        dtype=np.dtype(dtype).name,
        sha256=compute_sha256(bin_path(partial)),
        tokenizer_fingerprint=info.fingerprint,
    )
    _publish(partial, prefix, manifest)
    return manifest


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer, eos_token_id: int) -> Iterator[list[int]]:
    """Token ids of every text in order, each list ending with the end-of-sequence token."""
    tokenizer.encode_special_tokens = True  # reserved tokens spelled in the text are text
    for group in batched(texts, DOCUMENTS_PER_CALL):
        for encoding in tokenizer.encode_batch_fast(list(group), add_special_tokens=False):
            yield [*encoding.ids, eos_token_id]


def _with_progress(texts: Iterable[str], num_documents: int, name: str) -> Iterator[str]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        yield from progress.track(texts, total=num_documents, description=f"tokenise {name}")


def _write_documents(documents: Iterable[list[int]], prefix: Path, dtype: type) -> tuple[int, int, int]:
    """Write `.bin` and `.idx` at `prefix`; returns the numbers of documents and tokens and the largest id."""
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    num_documents, num_tokens, max_token_id = 0, 0, 0
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
        num_documents += 1
        num_tokens += len(ids)
        max_token_id = max(max_token_id, max(ids))
    builder.finalize(str(index_path(prefix)))
    return num_documents, num_tokens, max_token_id


def _publish(partial: Path, prefix: Path, manifest: DatasetManifest) -> None:
    """Move complete files to their final names, the index last."""
    manifest_path(prefix).unlink(missing_ok=True)
    for name in (bin_path, index_path):
        with open(name(partial), "rb") as file:
            os.fsync(file.fileno())
    os.replace(bin_path(partial), bin_path(prefix))
    save_manifest(prefix, manifest)
    os.replace(index_path(partial), index_path(prefix))
