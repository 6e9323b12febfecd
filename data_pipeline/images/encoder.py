"""Encode chats with images: their pictures are checked, and the tokens that stand for them filled in.

Imported by worker processes, so it must not import torch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info
from data_pipeline.chat.encoder import ChatEncoder
from data_pipeline.chat.messages import Message
from data_pipeline.chat.render import ChatRenderer
from data_pipeline.chat.template import describe_chat_template, load_image_chat_template, read_template_tokens
from data_pipeline.encoder import DocumentTokens, EncodedImage, PicturedDocument, Skip, load_tokenizer
from data_pipeline.images.chat import PicturedChat
from data_pipeline.images.check import LARGEST_PIXELS, CheckedImage, check_image
from data_pipeline.images.sources import UnusableImage
from model.hf.image_loading import LONGEST_EDGE
from model.hf.image_tokens import IMAGE_START, IMAGE_TOKENS, expand_image_tokens

START = "<|image_start|>"
NOT_RENDERED = Skip("images not rendered by the chat template")


class ImageChatEncoder:
    """Encodes chats with images as prompt, response, ... (see data_pipeline.encoder.RecordEncoder).

    chats: encodes the texts, in which START stands for an image.
    """

    def __init__(self, chats: ChatEncoder) -> None:
        self._chats = chats
        self.block_padding_token_id = chats.block_padding_token_id

    def encode(self, values: Sequence[object]) -> list[PicturedDocument | Skip]:
        """Encode chats, each a PicturedChat or a Skip; see RecordEncoder."""
        return [self._encode(value) if isinstance(value, PicturedChat) else _skip(value) for value in values]

    def settings(self) -> dict:
        """Return the settings; see RecordEncoder. The rules of image_loading.py decide the number of tokens."""
        return self._chats.settings() | {"longest_edge": LONGEST_EDGE, "largest_pixels": LARGEST_PIXELS}

    def _encode(self, chat: PicturedChat) -> PicturedDocument | Skip:
        read = self._chats.read({"messages": chat.messages, "tools": chat.tools})
        if isinstance(read, Skip):
            return read
        messages, tools = read
        try:
            checked = [check_image(picture.data) for picture in chat.pictures]
        except UnusableImage as error:
            return Skip(error.reason, error.detail)
        texts = self._chats.render(chat.insert(messages, START), tools)
        return texts if isinstance(texts, Skip) else _assemble(self._chats.tokenize(texts), chat, checked)


def _skip(value: object) -> Skip:
    assert isinstance(value, Skip)
    return value


def _assemble(segments: DocumentTokens, chat: PicturedChat, checked: list[CheckedImage]) -> PicturedDocument | Skip:
    places = list(_find_places(segments))
    if len(places) != len(checked) or any(place % 2 for place in places):  # a template is a program
        return NOT_RENDERED
    images = [
        EncodedImage(picture.data, picture.sha256, image.grid, place, image.fixes)
        for picture, image, place in zip(chat.pictures, checked, places, strict=True)
    ]
    left = iter(checked)
    try:
        expanded = [
            expand_image_tokens(segment, [next(left).grid for _ in range(segment.count(IMAGE_START))])
            for segment in segments
        ]
    except ValueError as error:
        return Skip(NOT_RENDERED.reason, str(error))
    return PicturedDocument(expanded, images)


def _find_places(segments: DocumentTokens) -> Iterator[int]:
    """Yield the segment of each image, in order."""
    for number, segment in enumerate(segments):
        yield from [number] * segment.count(IMAGE_START)


def build_image_chat_encoder(tokenizer_dir: Path, mask_token: str, chat_template: str | None) -> ImageChatEncoder:
    """Build the encoder of the Hugging Face tokenizer in `tokenizer_dir`.

    chat_template: as build_chat_encoder takes it.
    Raises UserError as build_chat_encoder does, for a tokenizer without the tokens of images, and for a template that
    does not write one where a message has an image.
    """
    read_tokenizer_info(tokenizer_dir, mask_token)  # for its errors
    tokenizer = load_tokenizer(tokenizer_dir)
    check_image_token_ids(tokenizer, tokenizer_dir)
    template = load_image_chat_template(tokenizer_dir, chat_template)
    template_tokens, name = read_template_tokens(tokenizer_dir), describe_chat_template(tokenizer_dir, chat_template)
    chats = ChatEncoder(tokenizer, mask_token, template, template_tokens, name)
    _check_images_are_rendered(ChatRenderer(template, template_tokens), name)
    return ImageChatEncoder(chats)


def check_image_token_ids(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    """Raise UserError unless the tokens of images are reserved tokens with the ids that models know."""
    reserved = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    for token, token_id in IMAGE_TOKENS.items():
        if reserved.get(token) != token_id:
            raise UserError(
                f"the tokenizer in {tokenizer_dir} has no reserved token {token} with id {token_id}, so it belongs to "
                f"a model without images: name the ids {', '.join(map(str, IMAGE_TOKENS.values()))} "
                f"{', '.join(IMAGE_TOKENS)} in tokenizer.json of your copy"
            )


def _check_images_are_rendered(renderer: ChatRenderer, name: str) -> None:
    """Raise UserError unless decoding, which has images in the parts of a message, meets the prompts of training."""
    parts = [{"type": "image"}, {"type": "text", "text": "What are these?"}, {"type": "image"}]
    text = f"{START}What are these?{START}"
    try:
        trained, decoded = (renderer.render(_probe(content)).text for content in (text, parts))
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(f"{name} cannot render images ({type(error).__name__}: {error}): correct it") from error
    if trained != decoded:
        raise UserError(
            f"{name} does not write {START} for each image of a message, so decoding would meet other prompts than "
            "training: correct the template, or use data.prepare.chat_template=chatml"
        )


def _probe(content: object) -> list[Message]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "Pictures."}]
