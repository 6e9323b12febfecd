"""Samples as lines for a terminal: in colour, or with marks that survive a pipe."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from data_pipeline.inspect.samples import Document, Piece, RowKind, Sample, Span

COLOURS = {RowKind.scored: "green", RowKind.context: "dim", RowKind.block_padding: "yellow", RowKind.padding: "dim"}
MASKED, SPECIAL, BOUNDARY, HEADER = "reverse red", "bold", "cyan", "bold cyan"
MASK_MARKS, BLOCK_PADDING_MARKS = ("⟦", "⟧"), ("«", "»")
PARTS = {RowKind.context: "context", RowKind.scored: "answer"}
PADDING, BLOCK_PADDING_MARK, TIMES = "·", "•", "\u00d7"


@dataclass(frozen=True)
class Painter:
    """in_colour: colours say what a token is; else brackets do."""

    in_colour: bool

    def legend(self, has_noise: bool, has_answers: bool) -> Text:
        """What the looks mean, as far as these samples can have them."""
        parts = [self._piece("scored", RowKind.scored)]
        if has_answers:
            parts.append(self._piece("context: seen, not scored", RowKind.context))
        if has_noise:
            parts.append(self._piece("masked by noise", RowKind.scored, is_masked=True))
            parts.append(self._block_padding([Piece("<token>", 1, False, True)] * 3)[1:].append(" completes a block"))
        parts.append(self._piece("<special>", RowKind.scored, is_special=True))
        parts += [_count_padding(9).append(" padding rows"), Text("↵ newline")]
        return Text("legend: ").append_text(Text("  ").join(parts))

    def sample(self, sample: Sample, has_answers: bool) -> Iterator[Text]:
        """Header, then every document after a line that names it and its noise."""
        yield Text(describe_header(sample), style=HEADER)
        text = Text()
        for span in sample.spans:
            boundaries = _find_boundaries(sample, span, has_answers)
            if boundaries and text:
                yield _without_last_newline(text)
                text = Text()
            yield from (Text(boundary, style=BOUNDARY) for boundary in boundaries)
            text.append_text(self.span(span))
        yield _without_last_newline(text)
        if sample.rows_shown < sample.num_rows:
            yield Text(f"... {sample.num_rows - sample.rows_shown:,} more rows (--rows 0 shows all)", style=BOUNDARY)

    def span(self, span: Span) -> Text:
        """Its text; rows of padding are counted, block padding are dots after the token that they all are."""
        if span.kind is RowKind.padding:
            return _count_padding(span.end_row - span.first_row)
        if span.kind is RowKind.block_padding:
            return self._block_padding(span.pieces)
        text = Text()
        for piece in span.pieces:
            text.append_text(self._piece(make_visible(piece.text), span.kind, piece.is_masked, piece.is_special))
        return text

    def _block_padding(self, pieces: list[Piece]) -> Text:
        """Begins with a blank."""
        name = f"{make_visible(pieces[0].text)}{TIMES}{len(pieces)} "
        text = Text(f" {'' if self.in_colour else BLOCK_PADDING_MARKS[0]}{name}", style=COLOURS[RowKind.block_padding])
        for is_masked, group in groupby(pieces, key=lambda piece: piece.is_masked):
            text.append_text(self._piece(BLOCK_PADDING_MARK * len(list(group)), RowKind.block_padding, is_masked))
        return text if self.in_colour else text.append(BLOCK_PADDING_MARKS[1])

    def _piece(self, shown: str, kind: RowKind, is_masked: bool = False, is_special: bool = False) -> Text:
        if self.in_colour:
            style = MASKED if is_masked else COLOURS[kind]
            return Text(shown, style=f"{style} {SPECIAL}" if is_special else style)
        return Text(shown.join(MASK_MARKS) if is_masked else shown)


def _count_padding(num_rows: int) -> Text:
    return Text(f"{PADDING}{TIMES}{num_rows}", style=COLOURS[RowKind.padding])


def _find_boundaries(sample: Sample, span: Span, has_answers: bool) -> list[str]:
    """Lines that come before a span: a new document, a context, an answer."""
    lines = []
    document = sample.documents.get(span.document)
    if document is not None and span.first_row == document.first_row:
        lines.append(f"━━ {describe_document(document)}")
    if has_answers and span.kind in PARTS:
        lines.append(f"── {PARTS[span.kind]}")
    return lines


def _without_last_newline(text: Text) -> Text:
    return text[:-1] if text.plain.endswith("\n") else text


def describe_header(sample: Sample) -> str:
    """One line of counts."""
    counts = []
    for kind, count in sample.rows.items():
        masked = sample.masked_rows[kind]
        if count:
            counts.append(f"{count:,} {kind.value}" + (f" ({masked:,} masked)" if masked else ""))
    number = len(sample.documents)
    return (
        f"sample {sample.index}: {sample.num_rows:,} rows, {number} document{'s' * (number != 1)}: {', '.join(counts)}"
    )


def describe_document(document: Document) -> str:
    """One line: where it is and its noise."""
    line = f"document {document.number}, rows {document.first_row}-{document.end_row - 1}"
    if document.noise is None:
        return line
    level, probability = document.noise
    masked = f"masked {document.num_masked:,} of {document.num_maskable:,}"
    return f"{line}, t={level:.3f} p={probability:.3f}, {masked}"


def make_visible(text: str) -> str:
    """Text without anything that moves the cursor or reorders the line; a newline is a sign and a real newline."""
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
