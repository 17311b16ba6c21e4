"""The chat templates that come with halfbyte.

`plain` is the default for models without a template of their own. It uses words that every tokenizer splits into few
ordinary tokens and no special token but EOS, which ends each turn of the assistant, so it works with any base model:

    You are a helpful assistant.          (a system message, when there is one)

    User:
    What is 2 + 2?

    Assistant:
    4<eos>

The others are the formats that their model families were trained with. They need the named special tokens in the
tokenizer's vocabulary, because halfbyte adds no tokens to a model; asking for one without them is an error.

None marks its turns with `{% generation %}`: llama.cpp and others need not know that tag, and the turns of these
templates are found without it (see `turns`).

Every template begins with `BOS`, which stands for the tokenizer's BOS where the tokenizer itself puts one first, and
for nothing elsewhere; so a saved template is complete and is tokenized without adding anything.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Builtin:
    """`needs`: special tokens that must be in the vocabulary. `source`: Jinja, with BOS to be filled in."""

    source: str
    needs: tuple[str, ...] = ()


_TOOL_CALLS = (
    "{%- for call in message.tool_calls or [] -%}"
    "{{ '\\n' if message.content or not loop.first else '' }}"
    '<tool_call>\n{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>"
    "{%- endfor -%}"
)

_TOOL_LIST = (
    "{%- if tools -%}"
    "You may call these functions. To call one, answer with "
    '<tool_call>{"name": …, "arguments": …}</tool_call>.\n'
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ '\\n' }}"
    "{%- endif -%}"
)

_PLAIN = (
    "BOS" + _TOOL_LIST + "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\\n\\n' }}"
    "{%- elif message.role == 'user' -%}{{ 'User:\\n' + message.content + '\\n\\n' }}"
    "{%- elif message.role == 'tool' -%}{{ 'Tool:\\n' + message.content + '\\n\\n' }}"
    "{%- elif message.role == 'assistant' -%}{{ 'Assistant:\\n' }}"
    "{{ message.content }}" + _TOOL_CALLS + "{{ eos_token }}{{ '\\n\\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:\\n' }}{%- endif -%}"
)

_ALPACA = (
    "BOS{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\\n\\n' }}"
    "{%- elif message.role == 'user' -%}"
    "{%- if loop.first -%}"
    "{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n' }}"
    "{%- endif -%}"
    "{{ '### Instruction:\\n' + message.content + '\\n\\n' }}"
    "{%- elif message.role == 'assistant' and not message.tool_calls -%}{{ '### Response:\\n' }}"
    "{{ message.content + eos_token }}{{ '\\n\\n' }}"
    "{%- else -%}{{ raise_exception('the alpaca template knows no tools: use plain or chatml') }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)

_CHATML = (
    "BOS"
    "{%- if tools -%}{{ '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' -%}{{ messages[0].content + '\\n\\n' }}{%- endif -%}"
    + _TOOL_LIST
    + "{{ '<|im_end|>\\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{ '<|im_start|>assistant\\n' }}"
    "{{ message.content }}" + _TOOL_CALLS + "{{ '<|im_end|>' }}{{ '\\n' }}"
    "{%- elif not (tools and loop.first and message.role == 'system') -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

_LLAMA3 = (
    "BOS{%- for message in messages -%}"
    "{%- if message.role == 'tool' or message.tool_calls -%}"
    "{{ raise_exception('the built-in llama3 template knows no tools: use plain, or a template file') }}"
    "{%- endif -%}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{%- if message.role == 'assistant' -%}"
    "{{ message.content | trim + '<|eot_id|>' }}"
    "{%- else -%}{{ message.content | trim + '<|eot_id|>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
)

# Gemma has no system role: its authors put the system text in front of the first user's.
_GEMMA = (
    "BOS{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' or message.tool_calls -%}"
    "{{ raise_exception('the built-in gemma template knows no tools: use plain, or a template file') }}"
    "{%- elif message.role == 'system' -%}{%- set ns.system = message.content + '\\n\\n' -%}"
    "{%- elif message.role == 'user' -%}"
    "{{ '<start_of_turn>user\\n' + ns.system + message.content | trim + '<end_of_turn>\\n' }}"
    "{%- set ns.system = '' -%}"
    "{%- else -%}{{ '<start_of_turn>model\\n' }}"
    "{{ message.content | trim + '<end_of_turn>' }}{{ '\\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)

BUILTINS: dict[str, Builtin] = {
    "plain": Builtin(_PLAIN),
    "alpaca": Builtin(_ALPACA),
    "chatml": Builtin(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": Builtin(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": Builtin(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
}

DEFAULT = "plain"
