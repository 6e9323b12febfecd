"""Checks the tokenizer of an export: it loads, fits the embedding, and knows the ids that the configuration names."""

import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from conf.tokenizer_info import TokenizerInfo, read_tokenizer_info, token_text
from model.export.load import check_vocabulary, load_export_tokenizer
from model.verify_export.check import ExportCheck
from model.verify_export.configuration import stop_ids_of

RESPONSE = "zebra"
CHAT = [{"role": "user", "content": "Name an animal."}, {"role": "assistant", "content": RESPONSE}]
REPLACE_TOKENIZER = "put the tokenizer there that the checkpoint was trained with"


def check_tokenizer(directory: Path, vocab_size: int | None) -> tuple[ExportCheck, PreTrainedTokenizerFast | None]:
    """Check that the tokenizer loads and has no id that the embedding lacks. vocab_size: the embedding's rows."""
    found: list[PreTrainedTokenizerFast] = []

    def load() -> str:
        if not (directory / "tokenizer.json").is_file():
            raise UserError(f"there is no tokenizer.json: {REPLACE_TOKENIZER}")
        found.append(load_export_tokenizer(directory))
        if vocab_size is not None:
            check_vocabulary(directory, found[0], vocab_size)
        return f"{len(found[0])} tokens" + (f" for {vocab_size} rows of the embedding" if vocab_size else "")

    return ExportCheck.of_action("tokenizer", load), found[0] if found else None


def check_mask_token(directory: Path, config: dict[str, Any]) -> tuple[ExportCheck, TokenizerInfo | None]:
    """Check that mask_token_id is a reserved token, which text cannot contain, and not another special one."""
    name, number = "mask token", config.get("mask_token_id")
    if not isinstance(number, int):
        return ExportCheck.failed(name, "config.json has no mask_token_id", "add it from the release"), None
    try:
        text = token_text(directory, number)
        info = read_tokenizer_info(directory, text)
    except UserError as error:
        return ExportCheck.failed(name, str(error)), None
    used = {"bos_token_id": info.bos_token_id, "eos_token_id of the tokenizer": info.eos_token_id}
    used |= {f"eos_token_id {stop}": stop for stop in stop_ids_of(config)}
    if clash := [what for what, other in used.items() if other == number]:
        return ExportCheck.failed(
            name, f"token {number} is {clash[0]} as well", "set mask_token_id as in training: decoding never chooses it"
        ), info
    return ExportCheck.passed(name, f"{text!r} is token {number}, reserved"), info


def check_special_ids(
    tokenizer: PreTrainedTokenizerFast, config: dict[str, Any], stop_ids: set[int], eos_token_id: int | None
) -> ExportCheck:
    """Check that the tokenizer has the ids that begin and end text, and that its files agree on its own end of text.

    eos_token_id: of tokenizer_config.json; transformers goes by special_tokens_map.json where that is there.
    """
    name = "bos and eos"
    ids = {f"eos_token_id {number}": number for number in sorted(stop_ids)}
    if isinstance(bos := config.get("bos_token_id"), int):
        ids[f"bos_token_id {bos}"] = bos
    if unknown := [what for what, number in ids.items() if not _text(tokenizer, number)]:
        return ExportCheck.failed(name, f"the tokenizer has no {unknown[0]}", REPLACE_TOKENIZER)
    if eos_token_id is not None and tokenizer.eos_token_id != eos_token_id:
        return ExportCheck.warned(
            name,
            f"transformers takes {tokenizer.eos_token!r} ({tokenizer.eos_token_id}) for the tokenizer's eos_token, "
            f"tokenizer_config.json names token {eos_token_id}",
            "let tokenizer_config.json and special_tokens_map.json name the same token",
        )
    texts = ", ".join(f"{number} {_text(tokenizer, number)}" for number in sorted({*ids.values()}))
    return ExportCheck.passed(name, texts or "none are named")


def _text(tokenizer: PreTrainedTokenizerFast, number: int) -> str | None:
    return str(tokenizer.convert_ids_to_tokens(number)) if 0 <= number < len(tokenizer) else None


def check_chat_template(tokenizer: PreTrainedTokenizerFast, stop_ids: set[int]) -> ExportCheck:
    """Check that a chat template, if there is one, renders a chat in which a stop token follows the response."""
    name = "chat template"
    if not tokenizer.chat_template:
        return ExportCheck.passed(name, "none: a base model")
    try:
        with warnings.catch_warnings(action="ignore"):
            text = str(tokenizer.apply_chat_template(CHAT, tokenize=False))
            prompt = str(tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template may raise anything
        return ExportCheck.failed(
            name, f"it does not render: {error}", "put the template there that the checkpoint was trained with"
        )
    if RESPONSE not in text or CHAT[0]["content"] not in prompt:
        return ExportCheck.failed(
            name, "it leaves out what was said", "put the template there that the checkpoint was trained with"
        )
    after = tokenizer.encode(text.rpartition(RESPONSE)[2], add_special_tokens=False)
    if not stop_ids & {*after}:
        detail = f"no eos_token_id ({sorted(stop_ids)}) follows a response in it"
        return ExportCheck.warned(
            name, detail, "responses would not end: name the token that ends a turn as eos_token_id"
        )
    return ExportCheck.passed(name, "renders, and an eos_token_id follows the response")
