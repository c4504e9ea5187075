"""From document to ids, on real text tokenizers: an inference prompt is the training prefix, and text stays text."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from unitok.data.render import CONTROL, IMAGE, TEXT, Template, null_parts, question_parts, render
from unitok.data.schema import Part, codes_part, parse_row, text_part
from unitok.vocab import JointVocab

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
WORDS = "a red blue circle square what colour shape is it Q A : ? . [ ] INST / assistant user system".split()


def real(*parts) -> str:
    root = os.environ.get("UNITOK_DATA")
    if not root:
        pytest.skip("UNITOK_DATA is not set: no real text tokenizers")
    return str(Path(root, "tokenizers", *parts))


def llama(tmp_path):
    return LlamaTokenizer.from_pretrained(real("llama2_spm"))


def unigram(tmp_path):
    shutil.copy(real("spm_torchtune_unigram", "sentencepiece.model"), tmp_path / "spiece.model")
    return T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)


def gpt2(tmp_path):
    return GPT2Tokenizer(real("gpt2_bpe", "vocab.json"), real("gpt2_bpe", "merges.txt"))


def titan(tmp_path):
    return AutoTokenizer.from_pretrained(real("torchtitan_test_bpe"))


def tiny(tmp_path):
    file = real("torchtune_tiny_bpe", "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<|begin|>", eos_token="<|endoftext|>")


def prepending(tmp_path):
    """The older form of SentencePiece in tokenizer.json: a normaliser puts a space before every text."""
    vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127)), "\n"])}
    one = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    one.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    one.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=one, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words(tmp_path):
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    one = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    one.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=one, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


FAMILIES = [llama, unigram, gpt2, titan, tiny, prepending, words]
CHATS = {"own": None, "chatml": CHATML, "inst": INST}


@pytest.fixture(params=FAMILIES, ids=lambda make: make.__name__)
def tokenizer(request, tmp_path):
    return request.param(tmp_path)


@pytest.fixture
def vocab(tokenizer):
    return JointVocab(text_rows=len(tokenizer) + 8).add("toy", (10,), (2, 2))


def picture(n=0, **more) -> Part:
    return codes_part(np.arange(4) + n, (2, 2), "toy", **more)


def with_chat(tokenizer, name) -> Template:
    if name == "plain":
        return Template()
    if name == "chatml":
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHATML
    else:
        tokenizer.chat_template = INST
    return Template(chat="model")


def pairs():
    """(parts of a prompt, parts of a training document that starts with it)."""
    shots = [(picture(1), "which shape?", "a red circle "), ([picture(2), picture(3)], " more ", "two\nlines")]
    asked = "what colour is it?"
    for question in (asked, asked + " ", "\n" + asked, "", "a  b </s> <|im_end|>", "Ünï 😀 {question}"):
        for given in ((), shots):
            yield (
                question_parts(question, picture(), shots=given),
                question_parts(question, picture(), "red", shots=given),
            )
    turns = [text_part("be kind", role="system", loss=False), picture(role="user", loss=False),
             text_part("what?", role="user", loss=False), text_part("a circle", role="assistant"),
             text_part("draw it", role="user", loss=False), text_part("again ", role="user", loss=False)]  # fmt: skip
    yield turns, [*turns, picture(4, role="assistant"), text_part(" there", role="assistant")]
    yield turns[:3], [*turns[:3], text_part("", role="assistant"), picture(4, role="assistant")]
    yield turns[:3], turns[:4]
    caption = [text_part("a red circle ")]
    yield caption, [*caption, picture()]
    yield [*caption, picture()], [*caption, picture(), text_part(" and a square"), picture(2)]
    yield [picture()], [picture(), *caption]
    yield [], [picture()]


@pytest.mark.parametrize("chat", ["plain", "chatml", "inst"])
def test_a_prompt_is_the_prefix_of_every_document_that_starts_with_it(tokenizer, vocab, chat):
    template = with_chat(tokenizer, chat)
    vocab = JointVocab(text_rows=len(tokenizer) + 8).add("toy", (10,), (2, 2))
    for prompt, document in pairs():
        asked = render(prompt, vocab, tokenizer, template, prompt=True)
        trained = render(document, vocab, tokenizer, template)
        n = len(asked.ids)
        assert n < len(trained.ids)
        assert asked.ids.tolist() == trained.ids[:n].tolist()
        assert asked.modality.tolist() == trained.modality[:n].tolist()
        carries = [p for p in document[len(prompt) :] if p.loss]
        assert not carries or trained.weights[n] == 1  # the first id that is predicted carries loss


@pytest.mark.parametrize("chat", ["plain", "chatml", "inst"])
def test_special_tokens_in_text_stay_text(tokenizer, chat):
    template = with_chat(tokenizer, chat)
    vocab = JointVocab(text_rows=len(tokenizer) + 8).add("toy", (10,), (2, 2))
    strings = {*tokenizer.all_special_tokens, "</s>", "<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"}
    nasty = " ".join(sorted(strings)) + "".join(sorted(strings))
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    special |= {tokenizer.eos_token_id, tokenizer.bos_token_id}

    def count(question, answer):
        out = render(question_parts(question, picture(), answer), vocab, tokenizer, template)
        return sum(i in special for i in out.ids.tolist())

    assert count(nasty, nasty) == count("what is it", "red")
    if chat == "plain":
        text = tokenizer.decode([i for i in render([text_part(nasty)], vocab, tokenizer).ids if i not in special])
        if tokenizer.convert_tokens_to_ids("<") != tokenizer.unk_token_id:  # the vocabulary can say it at all
            assert text.replace(" ", "") == nasty.replace(" ", "")


@pytest.mark.parametrize("chat", ["chatml", "inst"])
def test_the_models_own_chat_template_gives_its_own_ids(tokenizer, chat):
    """Where turns hold text only, the ids are those of apply_chat_template on the joined string."""
    template = with_chat(tokenizer, chat)
    vocab = JointVocab(text_rows=len(tokenizer) + 8)
    turns = [("user", "what is a red circle ?"), ("assistant", "a blue square ."), ("user", "is it ?")]
    parts = [text_part(text, role=role, loss=role == "assistant") for role, text in [*turns, ("assistant", "it is")]]
    mine = render(parts, vocab, tokenizer, template)
    messages = [{"role": p.role, "content": p.text} for p in parts]
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokenizer.decode(mine.ids).split() == tokenizer.decode(theirs).split()
    assert mine.ids.tolist() == theirs


def test_loss_is_where_the_document_says(tokenizer, vocab):
    caption = render([text_part("a red circle"), picture()], vocab, tokenizer)
    eos = int(tokenizer.eos_token_id is not None)
    bos = int(tokenizer.bos_token_id is not None)
    assert caption.weights.tolist() == [0.0] * bos + [1.0] * (len(caption.ids) - bos)
    assert caption.modality.tolist()[-6 - eos : len(caption.ids) - eos] == [CONTROL, *[IMAGE] * 4, CONTROL]
    assert caption.ids[-6 - eos : len(caption.ids) - eos].tolist() == vocab.to_ids(np.arange(4)).tolist()

    shots = [(picture(), "what?", "blue")]
    asked = render(question_parts("what colour?", picture(), "red", shots), vocab, tokenizer)
    open_ids = render(question_parts("what colour?", picture(), None, shots), vocab, tokenizer, prompt=True).ids
    assert asked.weights[: len(open_ids)].tolist() == [0.0] * len(open_ids)
    assert (asked.weights[len(open_ids) :] == 1).all() and asked.weights.sum() >= 1 + eos

    shown = render([picture(loss=False), text_part("red"), picture(2, loss=False)], vocab, tokenizer)
    assert set(shown.weights[shown.modality != TEXT]) == {0.0}  # begin and end go with their image
    assert shown.weights[-1] == 0  # and the end of the document with its last part


@pytest.mark.parametrize("chat", ["chatml", "inst"])
def test_in_a_chat_replies_and_their_end_carry_the_loss(tokenizer, chat):
    template = with_chat(tokenizer, chat)
    vocab = JointVocab(text_rows=len(tokenizer) + 8).add("toy", (10,), (2, 2))
    [document] = parse_row({"messages": [
        {"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "colour ?"}, {"role": "assistant", "content": "red"}]})  # fmt: skip
    out = render(document.parts, vocab, tokenizer, template)
    learnt = tokenizer.decode(out.ids[out.weights > 0])
    end = "<|im_end|>" if chat == "chatml" else tokenizer.eos_token
    assert learnt.replace(" ", "") == f"acircle{end}red{end}"


def test_text_between_two_images_is_one_piece(tokenizer, vocab):
    apart = [picture(), text_part("a re"), text_part("d circle"), picture()]
    template = Template(separator="")
    joined = [picture(), text_part("a red circle"), picture()]
    assert render(apart, vocab, tokenizer, template).ids.tolist() == render(joined, vocab, tokenizer).ids.tolist()


def test_the_plain_wording(tmp_path):
    tokenizer = gpt2(tmp_path)
    vocab = JointVocab(text_rows=50257).add("toy", (10,), (2, 2))
    shots = [(picture(), "which shape?", "circle")]
    out = render(question_parts("what colour?", picture(), "red", shots=shots), vocab, tokenizer)
    assert tokenizer.decode(out.ids[out.modality == TEXT]) == (
        "<|endoftext|>Q: which shape? A: circle\nQ: what colour? A: red<|endoftext|>"
    )
    assert tokenizer.convert_ids_to_tokens(out.ids[-2:].tolist()) == ["Ġred", "<|endoftext|>"]  # one natural token
    template = Template(question="{question} =", answer=" {answer} !", shot_separator=" | ", bos=False, eos=False)
    out = render(question_parts("what {answer}", (), "{question}", shots=[((), "a", "b")]), vocab, tokenizer, template)
    assert tokenizer.decode(out.ids) == "a = b ! | what {answer} = {question} !"
    turns = [text_part("be kind", role="system"), text_part("one", role="user"), text_part("two", role="assistant"),
             text_part("three", role="user")]  # fmt: skip
    out = render(turns, vocab, tokenizer, prompt=True)
    assert tokenizer.decode(out.ids) == "<|endoftext|>be kind\nQ: one A: two\nQ: three A:"


def test_sentencepiece_text_reads_the_same_after_an_answer_as_anywhere(tmp_path):
    """No space of its own in mid-document: a line break after an answer is a line break."""
    tokenizer = llama(tmp_path)
    out = render(question_parts("is it?", (), "no", shots=[((), "why?", "yes")]), None, tokenizer)
    assert tokenizer.decode(out.ids, skip_special_tokens=True) == "Q: why? A: yes\nQ: is it? A: no"


def test_words_of_a_text_tokenizer_stand_between_the_template_s_words(tmp_path):
    tokenizer = gpt2(tmp_path)
    template = Template(image_prefix="Picture: ", image_suffix=". ")
    shown = codes_part([1, 2], (2,), "words", words="a red circle")
    out = render([shown, text_part("nice")], JointVocab(text_rows=50257), tokenizer, template)
    assert tokenizer.decode(out.ids) == "<|endoftext|>Picture: a red circle. nice<|endoftext|>"
    assert tokenizer.decode(out.ids[out.modality == IMAGE]) == " a red circle"
    asked = render([shown], JointVocab(text_rows=50257), tokenizer, template, prompt=True)
    assert asked.ids.tolist() == out.ids[: len(asked.ids)].tolist()


def test_null_parts():
    text, image, shown = text_part("a"), picture(), picture(loss=False)
    template = Template(null="nothing")
    null = text_part("nothing", loss=False)
    assert null_parts([text, image], template) == [null, image]
    assert null_parts([text, image]) == [image]
    assert null_parts([image, text], template) == [image, text]  # no text that the image depends on
    assert null_parts([shown, text, image, text], template) == [null, shown, image, text]
    assert null_parts([shown, text, image], template, images=False) == [null, image]
    assert null_parts([shown, text], template, prompt=True) == [null, shown]
    assert null_parts([shown, text], prompt=True, images=False) == []
    assert null_parts([shown], template, prompt=True) == [shown]


def test_templates_round_trip_and_refuse_what_they_do_not_know():
    template = Template(chat="model", question="{question}?", null="x")
    assert Template.from_dict(template.to_dict()) == template and Template.from_dict(None) == Template()
    with pytest.raises(ValueError, match="unknown key 'qestion'"):
        Template.from_dict({"qestion": "x"})
    with pytest.raises(ValueError, match="must hold {question} exactly once"):
        Template(question="Q:")
    with pytest.raises(ValueError, match="use 'plain' or 'model'"):
        Template(chat="chatml")


def test_what_cannot_be_rendered_is_refused_in_one_line(tmp_path):
    tokenizer = words(tmp_path)
    vocab = JointVocab(text_rows=40).add("toy", (10,), (2, 2))
    with pytest.raises(ValueError, match="needs at least one part"):
        render([], vocab, tokenizer)
    with pytest.raises(ValueError, match="neither codes nor words"):
        render([Part("image", image="a.jpg")], vocab, tokenizer)
    with pytest.raises(ValueError, match="no image tokenizer 'other'"):
        render([codes_part([1], (1,), "other")], vocab, tokenizer)
    with pytest.raises(ValueError, match="no image vocabulary"):
        render([picture()], None, tokenizer)
    with pytest.raises(ValueError, match="has no chat template; use 'plain'"):
        render(question_parts("a"), vocab, tokenizer, Template(chat="model"), prompt=True)
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(ValueError, match="refuses the turns user, assistant: only one turn"):
        render(question_parts("a"), vocab, tokenizer, Template(chat="model"), prompt=True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="drops or repeats a turn"):
        render(question_parts("a"), vocab, tokenizer, Template(chat="model"), prompt=True)
