"""Render samples as lines for a terminal: in colour, or with marks that survive a pipe."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from data_pipeline.inspect.samples import PositionKind, Sample, SampledDocument, ShownChunk, Span

COLOURS = {
    PositionKind.scored: "green",
    PositionKind.prompt: "dim",
    PositionKind.block_padding: "yellow",
    PositionKind.padding: "dim",
}
MASKED, SPECIAL, BOUNDARY, HEADER = "reverse red", "bold", "cyan", "bold cyan"
MASK_MARKS, BLOCK_PADDING_MARKS = ("⟦", "⟧"), ("«", "»")
PARTS = {PositionKind.prompt: "prompt", PositionKind.scored: "response"}
PADDING, BLOCK_PADDING_MARK, TIMES = "·", "•", "\u00d7"


@dataclass(frozen=True)
class Painter:
    """Turns samples into text. in_colour: colours say what a token is; else brackets do. is_chat: of the documents."""

    in_colour: bool
    is_chat: bool

    def legend(self, has_noise: bool) -> Text:
        """Return what the looks mean, as far as these samples can have them."""
        parts = [self._chunk("scored", PositionKind.scored)]
        if self.is_chat:
            parts.append(self._chunk("prompt: seen, not scored", PositionKind.prompt))
        if has_noise:
            parts.append(self._chunk("masked by noise", PositionKind.scored, is_masked=True))
            padding = self._block_padding([ShownChunk("<token>", 1, is_masked=False, is_special=True)] * 3)
            parts.append(padding[1:].append(" block padding"))
        parts.append(self._chunk("<special>", PositionKind.scored, is_special=True))
        parts += [_count_padding(9).append(" positions of padding"), Text("↵ newline")]
        return Text("legend: ").append_text(Text("  ").join(parts))

    def sample(self, sample: Sample) -> Iterator[Text]:
        """Yield a header, then every document after a line that names it and its noise."""
        yield Text(describe_header(sample), style=HEADER)
        text = Text()
        for span in sample.spans:
            boundaries = self._find_boundaries(sample, span)
            if boundaries and text:
                yield _without_last_newline(text)
                text = Text()
            yield from (Text(boundary, style=BOUNDARY) for boundary in boundaries)
            text.append_text(self.span(span))
        yield _without_last_newline(text)
        left_out = sample.sequence_length - sample.num_shown
        if left_out:
            yield Text(f"... {left_out:,} more positions (--positions 0 shows all)", style=BOUNDARY)

    def span(self, span: Span) -> Text:
        """Return the text of a span; padding is counted, block padding is its token and a dot per position."""
        if span.kind is PositionKind.padding:
            return _count_padding(span.end - span.start)
        if span.kind is PositionKind.block_padding:
            return self._block_padding(span.chunks)
        text = Text()
        for chunk in span.chunks:
            text.append_text(self._chunk(make_visible(chunk.text), span.kind, chunk.is_masked, chunk.is_special))
        return text

    def _block_padding(self, chunks: list[ShownChunk]) -> Text:
        """Return the token, its count and the dots; the text begins with a blank."""
        style = COLOURS[PositionKind.block_padding]
        name = f"{make_visible(chunks[0].text)}{TIMES}{len(chunks)} "
        text = Text(f" {'' if self.in_colour else BLOCK_PADDING_MARKS[0]}{name}", style=style)
        for is_masked, group in groupby(chunks, key=lambda chunk: chunk.is_masked):
            dots = BLOCK_PADDING_MARK * len(list(group))
            text.append_text(self._chunk(dots, PositionKind.block_padding, is_masked))
        return text if self.in_colour else text.append(BLOCK_PADDING_MARKS[1])

    def _chunk(self, shown: str, kind: PositionKind, is_masked: bool = False, is_special: bool = False) -> Text:
        if self.in_colour:
            style = MASKED if is_masked else COLOURS[kind]
            return Text(shown, style=f"{style} {SPECIAL}" if is_special else style)
        return Text(shown.join(MASK_MARKS) if is_masked else shown)

    def _find_boundaries(self, sample: Sample, span: Span) -> list[str]:
        """Return the lines that come before a span: a new document, a prompt, a response."""
        lines = []
        document = sample.documents.get(span.document)
        if document is not None and span.start == document.start:
            lines.append(f"━━ {describe_document(document)}")
        if self.is_chat and span.kind in PARTS:
            lines.append(f"── {PARTS[span.kind]}")
        return lines


def _count_padding(count: int) -> Text:
    return Text(f"{PADDING}{TIMES}{count}", style=COLOURS[PositionKind.padding])


def _without_last_newline(text: Text) -> Text:
    return text[:-1] if text.plain.endswith("\n") else text


def describe_header(sample: Sample) -> str:
    """Return one line of counts."""
    counts = []
    for kind, count in sample.num_positions.items():
        masked = sample.num_masked[kind]
        if count:
            counts.append(f"{count:,} {kind.value}" + (f" ({masked:,} masked)" if masked else ""))
    number = len(sample.documents)
    documents = f"{number} document{'s' * (number != 1)}"
    return f"sample {sample.index}: {sample.sequence_length:,} positions, {documents}: {', '.join(counts)}"


def describe_document(document: SampledDocument) -> str:
    """Return one line: where the document is, and its noise."""
    line = f"document {document.number}, positions {document.start}-{document.end - 1}"
    if document.noise is None:
        return line
    level, probability = document.noise
    masked = f"masked {document.num_masked:,} of {document.num_maskable:,}"
    return f"{line}, t={level:.3f} p={probability:.3f}, {masked}"


def make_visible(text: str) -> str:
    """Return text in which nothing moves the cursor or reorders the line; a newline is a sign and a real newline."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥   "
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # the picture of the control character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\\u{ord(character):04x}"
    return character
