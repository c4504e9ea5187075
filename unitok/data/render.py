"""From document to ids: the one place where parts become a token sequence.

Packing, generation, question answering and evaluation all call `render`, so that what a model is asked is what it
was trained on. A document is cut into pieces, and each piece is encoded alone. A piece ends at an image, at a change
of role and at a change of loss, never at anything that comes later: the ids of an open prompt are therefore the
first ids of every training document that starts with the same parts.

Two rules keep pieces natural for the text tokenizer. Spaces at the end of a piece open the next one if that is text
("A: " + "red" is encoded as "A:" + " red"), else they are dropped, but for those of a chat template. And a piece is
encoded behind the last character of the text before it, so that a tokenizer which puts a space before every text does
not do so in mid-sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary, proxy

import numpy as np

from unitok.data.schema import Part

TEXT, IMAGE, CONTROL = 0, 1, 2  # modality of an id: text, image code (or word of a text tokenizer), image control
_ASK, _REPLY = ("question", "user"), ("answer", "assistant")
_MEMO = 1 << 16  # encoded texts kept a text tokenizer
_BLOCKS = 64  # pictures' ids kept


@dataclass(frozen=True)
class Template:
    """The wording around parts; data, kept in the manifest.

    chat: "plain" | "model" (turns are worded by the text tokenizer's own chat template; documents without turns stay
    plain). bos, eos: write them where the text tokenizer has them. separator: between two texts that touch.
    header: in front of a document with questions; plain only. question, answer: wording of a question or user turn and
    of its reply. shot_separator: after a reply or a system text that something follows. null: the prompt of caption
    dropping and of guidance. image_prefix, image_suffix: around an image of a text tokenizer (one whose vocabulary
    is words).
    """

    chat: str = "plain"
    bos: bool = True
    eos: bool = True
    separator: str = "\n"
    header: str = ""
    question: str = "Q: {question} A: "
    answer: str = "{answer}"
    shot_separator: str = "\n"
    null: str = ""
    image_prefix: str = ""
    image_suffix: str = ""

    def __post_init__(self):
        if self.chat not in ("plain", "model"):
            raise ValueError(f"template: chat is {self.chat!r}; use 'plain' or 'model'")
        for name in ("question", "answer"):
            if getattr(self, name).count("{" + name + "}") != 1:
                raise ValueError(f"template: {name} is {getattr(self, name)!r}; it must hold {{{name}}} exactly once")

    def around(self, name: str) -> tuple[str, str]:
        """Words before and after the slot of `question` or `answer`."""
        before, after = getattr(self, name).split("{" + name + "}")
        return before, after

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any] | None) -> Template:
        known = {f.name for f in fields(cls)}
        for key in d or {}:
            if key not in known:
                raise ValueError(f"template: unknown key {key!r}; known keys are {', '.join(sorted(known))}")
        return cls(**(d or {}))


class Rendered(NamedTuple):
    """One sequence. weights[i] is the loss weight of predicting ids[i]; modality as TEXT, IMAGE, CONTROL."""

    ids: np.ndarray  # int64 [L]
    weights: np.ndarray  # float32 [L]
    modality: np.ndarray  # int8 [L]


def render(
    parts: Sequence[Part], vocab, text_tokenizer, template: Template | None = None, *, prompt: bool = False
) -> Rendered:
    """Turn parts into ids.

    prompt: an open prefix that generation continues: no EOS; after a question, the wording up to its answer.
    vocab: JointVocab, or None where no part is an image with codes. A text that spells a special token stays text.
    Raises ValueError for an image without codes or words, an unknown image tokenizer, or turns that the chat
    template refuses.
    """
    template = template or Template()
    if not parts and not prompt:
        raise ValueError("a document needs at least one part")
    encoder = _Encoder.of(text_tokenizer)
    build = _Pieces(vocab, encoder, template)
    if template.chat == "model" and any(p.role in (*_ASK, *_REPLY, "system") for p in parts):
        build.chat(parts, prompt)
    else:
        build.plain(parts, prompt)
    return build.join()


def question_parts(question: str, images=(), answer: str | None = None, shots: Sequence = ()) -> list[Part]:
    """Parts of a question about images (image Parts, one or several), the same for training, `ask` and evaluation.

    shots: (images, question, answer) triples; they carry no loss. answer None leaves the question open.
    """

    def turn(images, question, answer, loss):
        images = (images,) if isinstance(images, Part) else images
        parts = [replace(image, role="question", loss=False) for image in images]
        parts.append(Part(type="text", text=question, role="question", loss=False))
        if answer is not None:
            parts.append(Part(type="text", text=answer, role="answer", loss=loss))
        return parts

    shown = [part for before, asked, said in shots for part in turn(before, asked, said, loss=False)]
    return shown + turn(images, question, answer, loss=True)


def null_parts(
    parts: Sequence[Part], template: Template | None = None, *, prompt: bool = False, images: bool = True
) -> list[Part]:
    """The parts with the text that an image depends on replaced by the null prompt: caption dropping and guidance.

    In a document that is the text before its last image with loss; of a prompt it is all text. images=False takes
    the images that the text stood with away too. Nothing changes where there is no text to replace.
    """
    template = template or Template()
    drawn = [i for i, p in enumerate(parts) if p.type == "image" and p.loss]
    end = len(parts) if prompt else (drawn[-1] if drawn else 0)
    kept = [p for i, p in enumerate(parts) if i >= end or (p.type == "image" and images)]
    if len(kept) == len(parts):
        return list(parts)
    null = [Part(type="text", text=template.null, loss=False)] if template.null else []
    return null + kept


_NO_IDS = np.zeros(0, np.int64)


class _Piece(NamedTuple):
    kind: str  # text | special | image
    text: str  # text, or the special token
    ids: np.ndarray  # special and image; none of a text, which is encoded later
    modality: np.ndarray | int
    loss: bool
    key: str  # texts of one key and loss are one piece


class _Pieces:
    """Collects pieces, joining neighbours that are one text, and encodes them."""

    def __init__(self, vocab, encoder: _Encoder, template: Template):
        self.vocab, self.encoder, self.template = vocab, encoder, template
        self.pieces: list[_Piece] = []

    def text(self, text: str, loss: bool, key: str = "", modality: int = TEXT) -> None:
        if not text:
            return
        last = self.pieces[-1] if self.pieces else None
        if last and last.kind == "text" and (last.key, last.loss, last.modality) == (key, loss, modality):
            self.pieces[-1] = last._replace(text=last.text + text)
        else:
            self.pieces.append(_Piece("text", text, _NO_IDS, modality, loss, key))

    def special(self, token: str, index: int, loss: bool, key: str = "") -> None:
        self.pieces.append(_Piece("special", token, np.array([index]), TEXT, loss, key))

    def part(self, part: Part, key: str) -> None:
        if part.type == "text":
            self.text(part.text or "", bool(part.loss), key)
        elif part.codes is not None and part.words is None:
            if self.vocab is None:
                raise ValueError("the document has an image but the model has no image vocabulary; expand it first")
            self.pieces.append(_Piece("image", "", *self.encoder.block(self.vocab, part), bool(part.loss), key))
        elif part.words is not None:
            self.text(self.template.image_prefix, part.loss, key + "/prefix", CONTROL)
            self.text(part.words, part.loss, key + "/words", IMAGE)
            self.text(self.template.image_suffix, part.loss, key + "/suffix", CONTROL)
        else:
            raise ValueError("an image part has neither codes nor words; tokenize the document first")

    def plain(self, parts: Sequence[Part], prompt: bool) -> None:
        template, encoder = self.template, self.encoder
        if template.bos and encoder.bos is not None:
            self.special(encoder.bos[0], encoder.bos[1], loss=False)
        if any(part.role in _ASK for part in parts):
            self.text(template.header, loss=False, key="header")
        turn, worded, touching = None, False, False  # open turn; it has its first words; the last part was a text
        for i, part in enumerate(parts):
            side = _side(part)
            if i and (side != turn or side == "system"):
                self._close(turn, worded, parts[i - 1].loss, last=False)
                worded = touching = False
            turn = side
            if part.type == "text":
                if touching:
                    self.text(template.separator, part.loss, side)
                elif side in ("question", "answer") and not worded:
                    self.text(template.around(side)[0], part.loss, side)
                    worded = True
            self.part(part, side)
            touching = part.type == "text"
        if not (prompt and turn == "answer"):
            self._close(turn, worded, bool(parts) and parts[-1].loss, last=True)
        self._eos(parts, prompt)

    def _close(self, turn: str | None, worded: bool, loss: bool, *, last: bool) -> None:
        if turn and worded:
            self.text(self.template.around(turn)[1], loss, turn)
        if turn and turn in ("answer", "system") and not last:
            self.text(self.template.shot_separator, loss, turn + "/end")

    def _eos(self, parts: Sequence[Part], prompt: bool) -> None:
        if not prompt and self.template.eos and self.encoder.eos is not None:
            self.special(self.encoder.eos[0], self.encoder.eos[1], loss=bool(parts[-1].loss))

    def chat(self, parts: Sequence[Part], prompt: bool) -> None:
        """The text tokenizer's own template, with a mark for every part, so that no part is read as template."""
        turns: list[tuple[str, list[Part]]] = []
        for part in parts:
            role = {"answer": "assistant", "assistant": "assistant", "system": "system"}.get(part.role, "user")
            if not turns or turns[-1][0] != role:
                turns.append((role, []))
            elif part.type == "text" and turns[-1][1][-1].type == "text":
                turns[-1][1].append(Part(type="text", text=self.template.separator, loss=part.loss))
            turns[-1][1].append(part)
        if prompt and turns[-1][0] != "assistant":  # the prompt ends where the reply of a training document starts
            turns.append(("assistant", [Part(type="text", text="", role="assistant")]))
        marked = [(role, part, j + 1 == len(own)) for role, own in turns for j, part in enumerate(own)]

        at, messages = 0, []
        for role, own in turns:
            messages.append({"role": role, "content": "".join(_mark(at + j) for j in range(len(own)))})
            at += len(own)
        rendered = self.encoder.chat_template(messages)
        chunks = _MARK.split(rendered)  # literal, number, literal, ..., literal
        if [int(n) for n in chunks[1::2]] != list(range(len(marked))):
            raise ValueError(f"the chat template drops or repeats a turn of {[role for role, _ in turns]}")

        self._literal(chunks[0], None)
        ended = False
        for (role, part, last_of_turn), literal in zip(marked, chunks[2::2], strict=True):
            reply = role == "assistant"
            self.part(part, "reply" if reply else "")
            if prompt and part is marked[-1][1]:
                return
            ended = self._literal(literal, part.loss if reply and last_of_turn else None)
        if turns[-1][0] == "assistant" and not ended:
            self._eos(parts, prompt)

    def _literal(self, text: str, reply_loss: bool | None) -> bool:
        """Words of the chat template. Behind a reply, those up to its end-of-turn token carry the reply's loss."""
        chunks = self.encoder.split_special(text)
        ended = len(chunks) == 1  # no special token in it: nothing ends the turn
        for token, index in chunks:
            tail = reply_loss is not None and not ended
            loss = tail and bool(reply_loss)
            if index is None:
                self.text(token, loss, "reply" if tail else "")
            else:
                self.special(token, index, loss, "chat")
                ended = True
        return len(chunks) > 1

    def join(self) -> Rendered:
        encoded: list[tuple[np.ndarray, _Piece]] = []
        spaces, before = "", None
        for piece in self.pieces:
            if piece.kind == "text":
                text = spaces + piece.text
                stripped = text.rstrip(" ")
                spaces, spoken = text[len(stripped) :], piece
                if stripped:
                    encoded.append((self.encoder.encode(stripped, before), piece))
                    before = stripped[-1]
            else:
                if spaces and piece.key == "chat":  # spaces of the chat template, which its model has seen
                    encoded.append((self.encoder.encode(spaces, before), spoken))
                encoded.append((piece.ids, piece))
                spaces, before = "", piece.text or None
        length = sum(len(ids) for ids, _ in encoded)
        out = Rendered(np.empty(length, np.int64), np.empty(length, np.float32), np.empty(length, np.int8))
        at = 0
        for ids, piece in encoded:
            here = slice(at, at + len(ids))
            out.ids[here], out.weights[here], out.modality[here] = ids, piece.loss, piece.modality
            at += len(ids)
        return out


class _Encoder:
    """A text tokenizer with what render asks of it; encoded texts are kept, since wording repeats."""

    _known: ClassVar[WeakKeyDictionary] = WeakKeyDictionary()

    def __init__(self, text_tokenizer):
        self.tokenizer = proxy(text_tokenizer)  # a strong reference would keep its own key alive
        self.bos, self.eos = _special(text_tokenizer, "bos"), _special(text_tokenizer, "eos")
        self.added = {token.content: (index, token) for index, token in text_tokenizer.added_tokens_decoder.items()}
        for token, index in zip(text_tokenizer.all_special_tokens, text_tokenizer.all_special_ids, strict=True):
            self.added.setdefault(token, (index, None))
        unknown = text_tokenizer.unk_token_id
        self.forbidden = {i for i, t in self.added.values() if (t is None or t.special) and i != unknown}
        # gpt2 uses one token for unknown, begin and end
        self.forbidden |= {s[1] for s in (self.bos, self.eos) if s}
        names = sorted(self.added, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self.memo: dict[tuple[str | None, str], np.ndarray] = {}
        self.vocab: Any = None  # that of the blocks
        self.blocks: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def of(cls, text_tokenizer) -> _Encoder:
        known = cls._known.get(text_tokenizer)
        ends = _special(text_tokenizer, "bos"), _special(text_tokenizer, "eos")  # may be set after the first use
        if known is None or (known.bos, known.eos) != ends:
            known = cls._known[text_tokenizer] = cls(text_tokenizer)
        return known

    def encode(self, text: str, before: str | None = None) -> np.ndarray:
        """Ids of a text; before: what stands in front of it, a character or a special token."""
        out = self.memo.get((before, text))
        if out is None:
            if len(self.memo) >= _MEMO:
                self.memo.clear()
            out = self.memo[before, text] = np.asarray(self._behind(text, before), np.int64)
        return out

    def block(self, vocab, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Ids and modality of a picture's codes; a few are kept, for documents in a row often show the same one."""
        if self.vocab is not vocab or len(self.blocks) >= _BLOCKS:
            self.vocab, self.blocks = vocab, {}
        codes = np.asarray(part.codes)
        key = (part.tokenizer, part.grid, codes.dtype.str, codes.shape, codes.tobytes())
        if key not in self.blocks:
            name = vocab.resolve(part.tokenizer)
            modality = np.where(np.asarray(vocab.slots(name, part.grid)) < 0, IMAGE, CONTROL)
            self.blocks[key] = np.asarray(vocab.to_ids(codes, part.grid, name)), modality
        return self.blocks[key]

    def _behind(self, text: str, before: str | None) -> list[int]:
        if before is not None and before in self.added and not self.pattern.search(text):
            ids = self.tokenizer.encode(before + text, add_special_tokens=False)
            if ids[:1] == [self.added[before][0]]:
                return ids[1:]
        elif before is not None and before not in self.added:
            head, ids = self._text(before), self._text(before + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self._text(text)

    def _text(self, text: str) -> list[int]:
        ids = self._plain(text)
        if self.forbidden.isdisjoint(ids):
            return ids
        # Unigram models hold "</s>" as a piece and find it in plain text: encode such a string in two halves.
        cuts = [0, *(m.start() + 1 for m in self.pattern.finditer(text)), len(text)]
        ids = [i for a, b in pairwise(cuts) for i in self._plain(text[a:b])]
        if not self.forbidden.isdisjoint(ids):
            raise ValueError(f"the text tokenizer turns plain text into a special token: {text[:80]!r}")
        return ids

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def split_special(self, text: str) -> list[tuple[str, int | None]]:
        """Template text -> [(text, None), (special token, id), (text, None), ...], texts at both ends."""
        out, at = [], 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            index, token = self.added[match.group()]
            left = text[at : match.start()]
            at = match.end()
            if token is not None and token.lstrip:
                left = left.rstrip()
            if token is not None and token.rstrip:
                at += len(text[at:]) - len(text[at:].lstrip())
            out += [(left, None), (match.group(), index)]
        return [*out, (text[at:], None)]

    def chat_template(self, messages: list[dict[str, str]]) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError("template: chat is 'model' but the text tokenizer has no chat template; use 'plain'")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        except Exception as e:  # a template may raise anything, mostly jinja's own errors
            roles = ", ".join(m["role"] for m in messages)
            raise ValueError(f"the chat template refuses the turns {roles}: {e}") from e


_MARK = re.compile("\ue000([0-9]+)\ue001")


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _special(text_tokenizer, name: str) -> tuple[str, int] | None:
    token, index = getattr(text_tokenizer, name + "_token"), getattr(text_tokenizer, name + "_token_id")
    return None if index is None else (str(token), index)


def _side(part: Part) -> str:
    if part.role in _ASK:
        return "question"
    return "answer" if part.role in _REPLY else ("system" if part.role == "system" else "")
