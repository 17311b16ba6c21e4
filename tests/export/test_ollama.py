"""Modelfiles: what Ollama's parser and Go's templates make of them is what the run's Jinja template prints."""

from pathlib import Path

import pytest

from halfbyte.data import ChatTemplate
from halfbyte.data.builtin_templates import BUILTINS
from halfbyte.export.go_template import go_template, shape_of, trims
from halfbyte.export.ollama import modelfile, quoted
from halfbyte.models.gguf_file import GgufFile
from tests.export.go_templates import modelfile_commands, ollama_prompt, render

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
MODELS = {
    # The templates of models as their authors publish them, the parts for tools left out.
    "mistral 7B v0.1": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 =="
        " 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '"
        "[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['co"
        "ntent'] + eos_token + ' ' }}{% else %}{{ raise_exception('Only user and assistant roles are supporte"
        "d!') }}{% endif %}{% endfor %}"
    ),
    "mistral 7B v0.3": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set l"
        'oop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_toke'
        "n }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}{%- if loop.last and syste"
        "m_message is defined %}{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- "
        "else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}{{- ' ' + message['co"
        "ntent'] + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "phi 3": (
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|"
        ">\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['"
        "content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['conte"
        "nt'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% els"
        'e %}{{ eos_token }}{% endif %}'
    ),
    "qwen 2.5": (
        "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_"
        "end|>\n' }}{%- else %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpf"
        "ul assistant.<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{%- if message.role != 'system"
        "' or not loop.first %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n'"
        " }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif "
        '%}'
    ),
    "zephyr": (
        "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "gemma 1": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported"
        "') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = "
        "'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m"
        "essage['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of"
        "_turn>model\n'}}{% endif %}"
    ),
    "llama 3.1": (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['conte"
        "nt']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}{"
        "{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Cutting Knowledge Date: December 2023\n' }}{"
        "{- 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' }}{{- system_message }}{{- '<|eot_id|>' }}{%- fo"
        "r message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message"
        "['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_"
        "id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "braces": (
        "{% for message in messages %}{{ message.role + '{{ }} {{-' + message.content + '\n' }}{% endfor %}{{ "
        "'assistant' + '{{ }} {{-' if add_generation_prompt }}"
    ),
} | {name: "{{- bos_token -}}" + builtin.source.removeprefix("BOS") for name, builtin in BUILTINS.items()}  # fmt: skip

SYSTEM = {"role": "system", "content": "Be kind.\nAnswer in {{ rhymes }}."}
TALK = [
    {"role": "user", "content": 'What is "two\n\nand" {{ two }}?'},
    {"role": "assistant", "content": "Four {% raw %}."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Nine"},
    {"role": "user", "content": "Ärger 日本語"},
]
TALKS = [TALK[:1], TALK[:3], TALK, [SYSTEM, *TALK[:1]], [SYSTEM, *TALK[:3]], [SYSTEM, *TALK]]


def chat(name: str) -> ChatTemplate:
    return ChatTemplate(name, MODELS[name], SPECIALS)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_ollama_asks_as_the_run_did(name: str, adds_bos: bool) -> None:
    """From the Modelfile's text, through Ollama's parser and Go's template, to the prompt: equal to Jinja's."""
    template = chat(name)
    commands = dict(modelfile_commands(modelfile("./model.gguf", template, adds_bos).text))
    without_system = "system" if "gemma 1" in name or "v0.1" in name else ""
    for messages in TALKS:
        if without_system and messages[0]["role"] == "system":
            continue  # the Jinja template refuses it
        expected = template.render(messages, prompt=True)
        if adds_bos:
            expected = expected.removeprefix("<s>")
        assert ollama_prompt(commands["template"], messages) == expected


def test_the_pieces_are_what_ollamas_own_list_has() -> None:
    """The formats in Ollama's template/*.gotmpl, by what they print (its testdata: user, assistant, user)."""
    hello, great, like = "Hello, how are you?", "I'm doing great. How can I help you today?", "I'd like to show off!"
    talk = [{"role": r, "content": c} for r, c in (("user", hello), ("assistant", great), ("user", like))]
    printed = {
        "chatml": f"<|im_start|>user\n{hello}<|im_end|>\n<|im_start|>assistant\n{great}<|im_end|>\n<|im_start|>user\n"
        f"{like}<|im_end|>\n<|im_start|>assistant\n",
        "llama3": f"<|start_header_id|>user<|end_header_id|>\n\n{hello}<|eot_id|><|start_header_id|>assistant"
        f"<|end_header_id|>\n\n{great}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{like}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "gemma": f"<start_of_turn>user\n{hello}<end_of_turn>\n<start_of_turn>model\n{great}<end_of_turn>\n"
        f"<start_of_turn>user\n{like}<end_of_turn>\n<start_of_turn>model\n",
        "phi 3": f"<|user|>\n{hello}<|end|>\n<|assistant|>\n{great}<|end|>\n<|user|>\n{like}<|end|>\n<|assistant|>\n",
    }
    for name, text in printed.items():
        go = go_template(chat(name), adds_bos=True)
        assert go is not None
        assert ollama_prompt(go, talk) == text


def test_what_no_pieces_print_has_no_go_template() -> None:
    for source in (
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",  # numbered
        "{{ messages[-1].content }}",  # forgets the rest
        "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}",
        "{{ messages[0].content }}{{ messages[0].content }}",  # says it twice
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.role }}{{ m.content }}{{ messages | length }}{% endfor %}",
    ):
        template = ChatTemplate("odd", source, SPECIALS)
        assert shape_of(template) is None
        made = modelfile("./model.gguf", template, adds_bos=True, stop=["x"])
        assert "TEMPLATE" not in made.text
        assert modelfile_commands(made.text) == [("from", "./model.gguf"), ("stop", "x")]
        assert made.text.startswith(
            "# the chat template 'odd' has no form in Go's template language: Ollama falls back"
        )
        assert made.notes[0] in made.text


def test_the_file_of_an_adapter_over_ollamas_own_model() -> None:
    made = modelfile(
        "qwen2.5:0.5b", chat("qwen 2.5"), True, ["<|im_end|>", "<|im_end|>", 'a "b"'], "Be brief.\nAlways.",
        "./adapter.gguf",
    )  # fmt: skip
    commands = modelfile_commands(made.text)
    assert [name for name, _ in commands] == ["from", "adapter", "template", "stop", "stop", "system"]
    assert commands[0][1] == "qwen2.5:0.5b"
    assert commands[1][1] == "./adapter.gguf"
    assert [value for _, value in commands[3:]] == ["<|im_end|>", 'a "b"', "Be brief.\nAlways."]
    assert made.notes == ()
    odd = modelfile("qwen2.5", ChatTemplate("odd", "{{ 1 }}", SPECIALS), True, adapter="./adapter.gguf")
    assert "Ollama keeps the base model's own" in odd.text


def test_a_run_on_plain_text_sends_the_prompt_as_it_is() -> None:
    commands = dict(modelfile_commands(modelfile("./model.gguf", None, True).text))
    assert render(commands["template"], {"Prompt": "Once {{ upon }}"}) == "Once {{ upon }}"


@pytest.mark.parametrize(
    "text",
    ["a", " a ", 'say "a"', '"', '""', 'a"', '"a', "two\nlines\n", '"two"\n"lines"', 'in """ the line', "\n\n", "\t",
     'ends with"""', "# no comment\nFROM x"],
)  # fmt: skip
def test_values_come_back_as_they_were(text: str) -> None:
    value = quoted(text)
    assert value is not None
    assert modelfile_commands(f"FROM x\nSYSTEM {value}\nPARAMETER stop a\n") == [
        ("from", "x"),
        ("system", text),
        ("stop", "a"),
    ]


@pytest.mark.parametrize("text", ['a"""\nb', '"""\nb', 'a\n"""  \nb', "zero\u200bwidth", "hard\u00a0space", "bell\a"])
def test_values_that_ollama_would_change_are_left_out(text: str) -> None:
    assert quoted(text) is None
    made = modelfile("./model.gguf", chat("chatml"), True, [text], text)
    assert [name for name, _ in modelfile_commands(made.text)] == ["from", "template"]
    assert len(made.notes) == 2
    assert "it is left out" in made.notes[0]
    assert "send it with every conversation" in made.notes[1]


def test_a_template_that_trims_is_said() -> None:
    assert trims(chat("llama3"))
    assert not trims(chat("chatml"))
    assert any("drops white space" in note for note in modelfile("./m", chat("llama3"), True).notes)


@pytest.mark.real_model
def test_a_real_models_template(qwen_gguf: Path) -> None:
    source = GgufFile(qwen_gguf).get("tokenizer.chat_template")
    template = ChatTemplate("qwen", source, SPECIALS)
    go = go_template(template, adds_bos=False)
    assert go is not None
    for messages in TALKS:
        assert ollama_prompt(go, messages) == template.render(messages, prompt=True)
