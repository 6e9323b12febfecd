"""Properties of a tokenizer directory, read without importing a tokenizer library or torch.

The fingerprint ties datasets, runs and checkpoints to the tokenizer they were made with: it covers everything in
tokenizer.json that decides which ids a text becomes, and nothing that only says how the file was written.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from conf.system.json_file import read_json_object, read_optional_json

# Settings of a call (how far to pad, where to cut), which libraries write into the file as a side effect.
_CALL_SETTINGS = ("padding", "truncation")


@dataclass(frozen=True)
class TokenizerInfo:
    """Properties of a tokenizer that data, runs and checkpoints must share.

    fingerprint: sha256 (hex) of the canonical tokenizer.json.
    vocab_size: highest token id + 1, added tokens included. mask_token_id: id of the mask token.
    bos_token_id, eos_token_id: as tokenizer_config.json declares them, or None.
    """

    fingerprint: str
    vocab_size: int
    mask_token_id: int
    bos_token_id: int | None
    eos_token_id: int | None


def read_tokenizer_info(directory: Path | str, mask_token: str) -> TokenizerInfo:
    """Read tokenizer.json and tokenizer_config.json of a Hugging Face tokenizer directory.

    mask_token: text of the mask token; its id is looked up.
    Raises: UserError if the directory has no readable tokenizer.json or the mask token is not one of its reserved
    tokens: text must not be able to contain it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"the tokenizer directory {directory} does not exist: give the one the data were made with")
    content = _read_tokenizer_json(directory)
    ids = _token_ids(content, directory / "tokenizer.json")
    if mask_token not in ids:
        raise UserError(
            f"the tokenizer in {directory} has no mask token {mask_token!r}: give the text of one of its reserved "
            "tokens as data.mask_token (converter: --mask-token), or add the token"
        )
    if mask_token not in {token.get("content") for token in content.get("added_tokens", [])}:
        raise UserError(
            f"the mask token {mask_token!r} is an ordinary entry of the vocabulary in {directory}, so text may contain "
            "it: give the text of one of its reserved (added) tokens as data.mask_token (converter: --mask-token)"
        )
    config = read_optional_json(directory / "tokenizer_config.json")
    return TokenizerInfo(
        fingerprint=_fingerprint(content),
        vocab_size=max(ids.values()) + 1,
        mask_token_id=ids[mask_token],
        bos_token_id=_special_id(config, "bos_token", ids),
        eos_token_id=_special_id(config, "eos_token", ids),
    )


def token_text(directory: Path | str, token_id: int) -> str:
    """Return the text of a token. Raises: UserError if the tokenizer has no such id or cannot be read."""
    for text, number in read_token_ids(directory).items():
        if number == token_id:
            return text
    path = Path(directory) / "tokenizer.json"
    raise UserError(f"{path} has no token with id {token_id}: the tokenizer is not the one of the checkpoint")


def read_token_ids(directory: Path | str) -> dict[str, int]:
    """Return {token text: id} of a tokenizer, added tokens included. Raises: UserError if it cannot be read."""
    return _token_ids(_read_tokenizer_json(Path(directory)), Path(directory) / "tokenizer.json")


def _fingerprint(content: dict[str, Any]) -> str:
    settled = {key: value for key, value in content.items() if key not in _CALL_SETTINGS}
    canonical = json.dumps(settled, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _token_ids(content: dict[str, Any], path: Path) -> dict[str, int]:
    """Return {token text: id} of the model's own vocabulary and the added tokens."""
    try:
        vocab = content["model"]["vocab"]
        # Unigram models list [text, score] pairs in id order; the others map text to id.
        ids = {pair[0]: i for i, pair in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{path} is not a tokenizer.json: it has no model.vocab") from None
    if not ids:
        raise UserError(f"{path} has an empty vocabulary")
    return ids


def _special_id(config: dict[str, Any], name: str, ids: dict[str, int]) -> int | None:
    """Return the id of a special token that tokenizer_config.json gives as text or as {"content": text}."""
    token = config.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    return ids.get(text) if isinstance(text, str) else None


def _read_tokenizer_json(directory: Path) -> dict[str, Any]:
    missing = f"{directory} has no tokenizer.json (the fast tokenizer's file; save the tokenizer with it)"
    return read_json_object(directory / "tokenizer.json", missing)
