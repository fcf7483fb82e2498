"""Two views of one conversation: the augmenting model reads the content as it comes, and nothing is taken back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import calmlm
from calmlm.tokens.alignment import LOOKBACK, Alignment
from calmlm.tokens.live_text import writer_of
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.stream import Rewriter
from calmlm.tokens.transcoding import Transcoder
from compositions import assert_close, assert_helpful, awaken, greedy_without_cache, logits_of, pad
from tiny import CHAT_TEMPLATE, tiny_model
from tokenizers_tiny import first_space_only, tokenizer

# One of these tokenizers has tokens that reach across words: its model reads late, and no less.
pytestmark = pytest.mark.filterwarnings("ignore:The augmenting tokenizer has tokens that reach across")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "chatml with a default system message": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}" + CHATML,
        ["<|im_start|>", "<|im_end|>"],
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}{{ '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] | trim + "
        "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}",
        ["<|header|>", "<|/header|>", "<|eot|>"],
    ),
    "instructions": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('no') }}"
        "{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
    ),
    "instructions in plain text": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST] ' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('no') }}"
        "{% endif %}{% endfor %}",
        [],
    ),
    "plain": (CHAT_TEMPLATE, []),
    "system text within the user's turn": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
        "+ (first if loop.first else '') + m['content'] + '</turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
        ["<turn>", "</turn>"],
    ),
    "system text in marks of its own": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set first = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first else '') "
        "+ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        [],
    ),
    "thoughts in the last turn": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "headlines": (
        "{% for m in messages %}{{ '### ' + ('Response' if m['role'] == 'assistant' else 'Instruction') + ':\n' "
        "+ m['content'] + '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        [],
    ),
}
CONVERSATION = [
    {"role": "user", "content": "hello world, 12 + 34"},
    {"role": "assistant", "content": "= 46. [/IN and <|im"},
    {"role": "user", "content": "naïve café 😀 你好"},
    {"role": "assistant", "content": "fox  jumps"},
]


def chatty(kind: str, template: str) -> Any:
    made = copy.deepcopy(tokenizer(kind))
    text, special = TEMPLATES[template]
    made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = text
    return made


# The conversation goes on, so that its last message is closed in templates in which the next one closes it.
NEXT = [{"role": "user", "content": "."}]


def rendered(ours: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return list(ours.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("method", ["transcode", "retokenize"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_bare_view_is_the_content(template: str, kind: str, method: str) -> None:
    ours, theirs = chatty(kind, template), tokenizer("bytes-large")
    writer = Rewriter(Rewriting.between(ours, theirs, method, "bare"))
    written = [index for index, _ in writer.write(rendered(ours, CONVERSATION + NEXT, add_generation_prompt=True))]
    system = ["be kind"] if "default" in template else []
    assert theirs.decode(written) == "\n".join([*system, *(message["content"] for message in CONVERSATION + NEXT)])


def test_the_own_view_is_the_augmenting_models_template(template: str) -> None:
    ours, theirs = chatty("bytes-large", template), chatty("bytes", "headers")
    system = [{"role": "system", "content": "be kind"}] if "default" in template else []
    plain = [*system, *CONVERSATION, *NEXT]
    writer = Rewriter(Rewriting.between(ours, theirs, "retokenize", "template"))
    written = [index for index, _ in writer.write(rendered(ours, CONVERSATION + NEXT, add_generation_prompt=True))]
    # Who is to speak next is told before a word is said.
    assert theirs.decode(written) == theirs.decode(rendered(theirs, plain, add_generation_prompt=True))


MARKS_THAT_CLOSE = {
    "a role's mark ends the message before": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{{ '<|Assistant|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}",
        ["<|User|>", "<|Assistant|>"],
    ),
    "and in plain text": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
        "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
        [],
    ),
}


@pytest.mark.parametrize("own", MARKS_THAT_CLOSE)
@pytest.mark.parametrize("roles", ["suau", "uau", "suu", "uuau"])
def test_no_mark_of_a_role_is_written_twice(own: str, roles: str) -> None:
    ours, theirs = chatty("bytes", "chatml"), copy.deepcopy(tokenizer("bytes-large"))
    theirs.chat_template, special = MARKS_THAT_CLOSE[own]
    theirs.add_special_tokens({"additional_special_tokens": special})
    names = {"s": "system", "u": "user", "a": "assistant"}
    talk = [{"role": names[role], "content": f"{place} words"} for place, role in enumerate(roles)]
    writer = Rewriter(Rewriting.between(ours, theirs, "retokenize", "template"))
    written = [index for index, _ in writer.write(rendered(ours, talk, add_generation_prompt=True))]
    assert theirs.decode(written) == theirs.decode(rendered(theirs, talk, add_generation_prompt=True))


@pytest.mark.parametrize("method", ["transcode", "retokenize"])
def test_a_conversation_is_read_as_it_comes(template: str, method: str) -> None:
    ours = chatty("bytes", template)
    for kind, view in (("wordpiece", "bare"), ("unigram", "bare"), ("sentencepiece", "template")):
        writer = Rewriter(Rewriting.between(ours, chatty(kind, "headers"), method, view))
        ids = rendered(ours, CONVERSATION)
        full = writer.write(ids)
        for length in range(len(ids)):
            assert writer.write(ids[:length]) == [pair for pair in full if pair[1] < length]


def test_a_date_in_the_template_is_not_taken_for_what_opens_a_message() -> None:
    ours = chatty("bytes", "headers")
    ours.chat_template = (
        "<|header|>system<|/header|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
        "{% set messages = messages[1:] %}{% endif %}"
        "<|eot|>{% for m in messages %}{{ '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
    )
    theirs = tokenizer("bytes-large")
    with pytest.warns(UserWarning, match="System messages"):
        writer = Rewriter(Rewriting.between(ours, theirs, "transcode", "bare"))
    kept = writer.alignment.anchor_template
    assert kept is not None
    assert "system" not in kept.openings
    written = writer.write(rendered(ours, CONVERSATION))
    assert theirs.decode([i for i, _ in written]) == "\n".join(message["content"] for message in CONVERSATION)


def test_several_paragraphs_are_one_message() -> None:
    ours, theirs = chatty("bytes", "headlines"), tokenizer("bytes-large")
    writer = Rewriter(Rewriting.between(ours, theirs, "transcode", "bare"))
    talk = [CONVERSATION[0], {"role": "assistant", "content": "one.\n\ntwo."}, CONVERSATION[2]]
    ids = rendered(ours, talk, add_generation_prompt=True) + ours("a\n\nb", add_special_tokens=False).input_ids
    expected = "\n".join([*(message["content"] for message in talk), "a\n\nb"])
    assert theirs.decode([index for index, _ in writer.write(ids)]) == expected


TALK = [
    {"role": "user", "content": "12 + 34?"},
    {"role": "assistant", "content": "let me see"},
    {"role": "tool", "content": "it is 46"},
    {"role": "assistant", "content": "46."},
]


def test_what_a_tool_answers_is_read() -> None:
    ours, theirs = chatty("bytes", "chatml"), tokenizer("bytes-large")
    writer = Rewriter(Rewriting.between(ours, theirs, "transcode", "bare"))
    written = [index for index, _ in writer.write(rendered(ours, TALK))]
    assert theirs.decode(written) == "\n".join(message["content"] for message in TALK)


def test_an_answer_within_the_users_message_is_a_part_of_it() -> None:
    ours, theirs = chatty("bytes", "chatml"), tokenizer("bytes-large")
    ours.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}"
        "{{ '<|im_start|>user\n<answer>\n' + m['content'] + '\n</answer><|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    writer = Rewriter(Rewriting.between(ours, theirs, "transcode", "bare"))
    written = theirs.decode([index for index, _ in writer.write(rendered(ours, TALK))])
    assert written == "12 + 34?\nlet me see\n<answer>\nit is 46\n</answer>\n46."


# Of Mistral's kind: an assistant has no mark of its own, and speaks where the message before is closed.
UNMARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}{{ '[RESULTS] ' + m['content'] + '[/RESULTS]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
)


def unmarked() -> Any:
    made = copy.deepcopy(tokenizer("bytes"))
    made.chat_template = UNMARKED
    made.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]", "[RESULTS]", "[/RESULTS]"]})
    return made


def test_who_has_no_mark_speaks_behind_a_tool_as_well() -> None:
    """Where an assistant speaks is told by what closes the message before, which is another thing behind a tool's."""
    ours, theirs = unmarked(), tokenizer("bytes-large")
    writer = Rewriter(Rewriting.between(ours, theirs, "transcode", "bare"))
    said = "\n".join(message["content"] for message in TALK)
    assert theirs.decode([index for index, _ in writer.write(rendered(ours, TALK))]) == said
    answering = rendered(ours, TALK[:3]) + ours("it is", add_special_tokens=False).input_ids
    expected = "\n".join([*(message["content"] for message in TALK[:3]), "it is"])
    assert theirs.decode([index for index, _ in writer.write(answering)]) == expected


@pytest.mark.parametrize("method", ["transcode", "own"])
def test_who_has_no_mark_is_silent_where_another_speaks_at_once(method: str) -> None:
    """Two tools answer one after the other, or a user goes on: nothing of the template is taken for an answer."""
    ours, theirs = unmarked(), tokenizer("bytes-large")
    writer = writer_of(Rewriting.between(ours, theirs, method, "bare"))
    other = {"role": "tool", "content": "and 47"}
    for talk in ([*TALK[:3], other, TALK[3]], [TALK[0], {"role": "user", "content": "fox"}, *TALK[1:]]):
        expected = "\n".join(message["content"] for message in talk)
        assert theirs.decode([index for index, _ in writer.write(rendered(ours, talk))]) == expected
    # What only begins like the mark of another is said.
    ids = rendered(ours, TALK[:3]) + ours("[RESULT", add_special_tokens=False).input_ids
    assert theirs.decode([index for index, _ in writer.write(ids)]).endswith("it is 46\n[RESULT")


def test_an_answer_in_the_own_template() -> None:
    ours = chatty("bytes", "chatml")
    for own, role in (("headers", "tool"), ("instructions", "user")):  # the latter has no tools
        theirs = chatty("bytes-large", own)
        writer = Rewriter(Rewriting.between(ours, theirs, "retokenize", "template"))
        written = theirs.decode([index for index, _ in writer.write(rendered(ours, TALK))])
        assert written == theirs.decode(rendered(theirs, [*TALK[:2], TALK[2] | {"role": role}, TALK[3]]))


def test_a_message_without_content_is_passed_over() -> None:
    ours, theirs = chatty("bytes", "chatml"), tokenizer("bytes-large")
    writer = Rewriter(Rewriting.between(ours, theirs, "transcode", "bare"))
    talk = [{"role": "system", "content": ""}, CONVERSATION[0]]
    assert theirs.decode([index for index, _ in writer.write(rendered(ours, talk))]) == CONVERSATION[0]["content"]


def test_a_system_message_that_says_nothing_is_none() -> None:
    """Llama 3 opens one for a date of its own; the augmenting model's template may have a default, or no such role."""
    ours = chatty("bytes", "headers")
    ours.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{{ bos_token "
        "+ '<|header|>system<|/header|>\n\nToday Date: 26 Jul\n\n' + first + '<|eot|>' }}"
        "{% for m in rest %}{{ '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
    )
    for own in ("chatml with a default system message", "instructions", "system text within the user's turn"):
        theirs = chatty("bytes-large", own)
        writer = Rewriter(Rewriting.between(ours, theirs, "retokenize", "template"))
        for said in ([], [{"role": "system", "content": "be brief"}]):
            talk = [*said, *CONVERSATION[:2]]
            if said and own == "instructions":  # which has none
                continue
            written = theirs.decode([index for index, _ in writer.write(rendered(ours, talk))])
            assert written.strip() == theirs.decode(rendered(theirs, talk)).strip()


def test_what_is_generated_is_content() -> None:
    ours, theirs = chatty("bytes", "chatml"), tokenizer("bytes-large")
    writer = Rewriter(Rewriting.between(ours, theirs, "transcode", "bare"))
    ids = rendered(ours, CONVERSATION[:1], add_generation_prompt=True)
    ids += ours("it is 46", add_special_tokens=False).input_ids
    assert theirs.decode([index for index, _ in writer.write(ids)]) == "hello world, 12 + 34\nit is 46"


def test_without_a_view_transcoding_is_that_of_the_table() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("sentencepiece")
    ids = torch.tensor([ours("  hello world, 12 + 34 = 46").input_ids])
    real, previous = torch.ones_like(ids, dtype=torch.bool), torch.full((1, LOOKBACK), -1)
    table = Transcoder(Alignment.between(ours, theirs))(ids, real, previous)
    found = Rewriter(Rewriting.between(ours, theirs, "transcode", None))(ids, real, previous[:, :0])
    assert torch.equal(found.ids, table.ids)
    assert torch.equal(found.owner, table.owner)


@pytest.fixture(scope="module", params=[("transcode", "bare"), ("retokenize", None), ("retokenize", "template")])
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    ours, theirs = chatty("bytes", "chatml"), chatty("sentencepiece", "headers")
    made = calmlm.compose(
        tiny_model("llama", vocab_size=len(ours)),
        tiny_model("mistral", vocab_size=len(theirs), sliding_window=6),
        2,
        rotary=True,
        tokenizer=ours,
        augmenting_tokenizer=theirs,
        alignment=request.param[0],
        augmenting_view=request.param[1],
    )
    return awaken(made)


def rows() -> list[torch.Tensor]:
    ours = chatty("bytes", "chatml")
    texts = [CONVERSATION[:1], CONVERSATION[:3], [{"role": "user", "content": "  tabs\tand 你好"}]]
    return [torch.tensor(rendered(ours, text, add_generation_prompt=True)) for text in texts]


def test_one_step_at_a_time_equals_all_at_once(model: calmlm.CalmForCausalLM) -> None:
    ids = rows()[1][None]
    full, cache, parts = logits_of(model, ids), None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache, _ = output.past_key_values, parts.append(output.logits)
    assert_close(torch.cat(parts, 1), full, 1e-4)
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 7) % 250 + 4
    assert torch.allclose(logits_of(model, changed)[:, :40], full[:, :40], atol=1e-5)


def test_batches_of_mixed_lengths_beams_and_drafts(model: calmlm.CalmForCausalLM) -> None:
    ids, mask = pad(rows(), "left")
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 8}
    expected = greedy_without_cache(model, ids, 8, mask)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    beams = [model.generate(ids, attention_mask=mask, num_beams=3, use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*beams)
    drafted = model.generate(ids[1:2], attention_mask=mask[1:2], prompt_lookup_num_tokens=4, **options)
    assert torch.equal(drafted, expected[1:2])


def test_save_load_and_copy(model: calmlm.CalmForCausalLM, tmp_path: Path) -> None:
    ids = rows()[1][None]
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    loaded = calmlm.CalmForCausalLM.from_pretrained(
        tmp_path, anchor=model.anchor, augmenting=model.augmenting["augmenting"], attn_implementation="eager"
    )
    assert torch.equal(logits_of(loaded, ids), expected)
    for name in list(loaded.augmenting):
        if len(loaded.augmenting) == 1:
            loaded.model.remove(name)
    assert torch.equal(logits_of(copy.deepcopy(model), ids), expected)
    path = tmp_path / "alignment.augmenting.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": {}}))
    with pytest.raises(calmlm.CheckpointError) as caught:
        calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=model.anchor, augmenting=model.augmenting["augmenting"])
    assert_helpful(caught.value, "alignment.augmenting.json")


def test_faults_are_named() -> None:
    ours, theirs = chatty("bytes", "chatml"), tokenizer("unigram")
    anchor = tiny_model("llama", vocab_size=len(ours))
    augmenting = tiny_model("gpt2", vocab_size=len(theirs))
    both = {"tokenizer": ours, "augmenting_tokenizer": theirs}
    for options, error, mention in (
        ({"alignment": "guess"} | both, calmlm.ConfigError, "'guess'"),
        ({"augmenting_view": "upside down"} | both, calmlm.ConfigError, "'upside down'"),
        ({"augmenting_view": "template"} | both, calmlm.ModelError, "chat template of the augmenting model"),
        ({"augmenting_view": "bare", "tokenizer": tokenizer("bytes"), "augmenting_tokenizer": theirs},
         calmlm.ModelError, "chat template of the anchor"),
        ({"augmenting_view": "bare", "tokenizer": ours}, calmlm.ModelError, "tokenizers of both"),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            calmlm.compose(anchor, augmenting, 1, **options)
        assert_helpful(caught.value, mention)
    broken = copy.deepcopy(ours)
    broken.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(calmlm.ModelError) as caught:
        calmlm.compose(anchor, augmenting, 1, augmenting_view="bare", tokenizer=broken, augmenting_tokenizer=theirs)
    assert_helpful(caught.value, "begins and ends")


def sentencepiece_like(kind: str) -> Any:
    """A tokenizer that puts a space before a text, or before every part of one, with ChatML's marks."""
    made = chatty("sentencepiece", "chatml")
    return first_space_only(made) if kind == "first" else made


@pytest.mark.parametrize("method", ["transcode", "retokenize"])
@pytest.mark.parametrize("kind", ["every", "first"])
class TestSpacesOfTheTokenizersOwn:
    """SentencePiece's space before a text is no part of the text, and messages are no texts of their own."""

    def test_the_bare_view(self, kind: str, method: str) -> None:
        ours, theirs = chatty("bytes", "chatml"), sentencepiece_like(kind)
        writer = Rewriter(Rewriting.between(ours, theirs, method, "bare"))
        written = [index for index, _ in writer.write(rendered(ours, CONVERSATION + NEXT))]
        content = "\n".join(message["content"] for message in CONVERSATION + NEXT)
        assert theirs.decode(written) == theirs.decode(theirs(content, add_special_tokens=False).input_ids)

    def test_the_own_view(self, kind: str, method: str) -> None:
        ours, theirs = chatty("bytes", "chatml"), sentencepiece_like(kind)
        writer = Rewriter(Rewriting.between(ours, theirs, method, "template"))
        written = [index for index, _ in writer.write(rendered(ours, CONVERSATION + NEXT))]
        whole = rendered(theirs, CONVERSATION + NEXT)
        if method == "retokenize":
            assert whole[: len(written)] == written
        assert theirs.decode(whole).startswith(theirs.decode(written))
        assert len(written) > len(whole) // 2


NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] | trim + '</turn>\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("user assistant", "<s><turn>user\none</turn>\n<turn>assistant\ntwo</turn>"),
        ("system user assistant", "<s>one\n<turn>user\ntwo</turn>\n<turn>assistant\nthree</turn>"),
        ("assistant user", "<s><turn>assistant\none</turn>\n<turn>user\ntwo</turn>"),
    ],
)
def test_a_conversation_begins_whoever_speaks_first(roles: str, expected: str) -> None:
    """Also one with a role that the augmenting model's template has not."""
    ours, theirs = chatty("bytes", "chatml"), copy.deepcopy(tokenizer("bytes-large"))
    theirs.add_special_tokens({"additional_special_tokens": ["<turn>", "</turn>"]})
    theirs.chat_template = NO_SYSTEM
    words = ("one", "two", "three")
    talk = [{"role": role, "content": word} for role, word in zip(roles.split(), words, strict=False)]
    writer = Rewriter(Rewriting.between(ours, theirs, "transcode", "template"))
    assert theirs.decode([index for index, _ in writer.write(rendered(ours, talk))]) == expected


def test_a_batch_of_which_nothing_is_read_trains_nothing() -> None:
    """Text without a conversation, for a model that reads conversations."""
    ours, theirs = chatty("bytes", "chatml"), tokenizer("bytes-large")
    models = tiny_model("llama", vocab_size=len(ours)), tiny_model("gpt2", vocab_size=len(theirs))
    options = {"tokenizer": ours, "augmenting_tokenizer": theirs, "augmenting_view": "bare"}
    model = awaken(calmlm.compose(*models, 2, **options)).train()
    ids = ours("no conversation", return_tensors="pt").input_ids
    output = model(ids, labels=ids)
    with torch.no_grad():
        assert torch.equal(output.logits, model.anchor(ids).logits)
    output.loss.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("view", ["bare", "template"])
def test_templates_that_read_parts_alone(view: str) -> None:
    """As those of models with pictures; they leave out what comes as text."""
    ours, theirs = (chatty(kind, "chatml") for kind in ("bytes", "bytes-large"))
    expected = Rewriter(Rewriting.between(ours, theirs, "retokenize", view)).write(rendered(ours, CONVERSATION))
    ours.chat_template = theirs.chat_template = PARTS
    found = Rewriter(Rewriting.between(ours, theirs, "retokenize", view))
    ours.chat_template = CHATML
    assert found.write(rendered(ours, CONVERSATION)) == expected


def test_a_template_that_shows_no_message_is_refused() -> None:
    ours = chatty("bytes", "chatml")
    ours.chat_template = "{% for m in messages %}<|im_start|><|im_end|>{% endfor %}"
    with pytest.raises(calmlm.ModelError) as error:
        Rewriting.between(ours, tokenizer("bytes-large"), "transcode", "bare")
    assert_helpful(error.value, "anchor")


@pytest.mark.parametrize(("template", "speaks"), [("headers", "developer"), ("only system", "system")])
def test_developers_are_read(template: str, speaks: str) -> None:
    """In the role of the system where the augmenting model's template knows no developer."""
    ours, theirs = chatty("bytes", "chatml"), chatty("bytes-large", "headers")
    if template != "headers":
        theirs.chat_template = "{% for m in messages %}{% if m['role'] == 'developer' %}{{ raise_exception('no') }}" + (
            "{% endif %}{% endfor %}" + TEMPLATES["headers"][0]
        )
    messages = [{"role": "developer", "content": "be kind"}, *CONVERSATION]
    ids = rendered(ours, messages, add_generation_prompt=True)
    bare = Rewriter(Rewriting.between(ours, theirs, "retokenize", "bare"))
    assert theirs.decode([i for i, _ in bare.write(ids)], skip_special_tokens=True).startswith("be kind\nhello")
    own = Rewriter(Rewriting.between(ours, theirs, "retokenize", "template"))
    plain = [{**messages[0], "role": speaks}, *CONVERSATION]
    wanted = theirs.decode(rendered(theirs, plain, add_generation_prompt=True))
    assert theirs.decode([i for i, _ in own.write(ids)]) == wanted
