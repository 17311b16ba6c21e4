"""Chat templates in the manner of the big families, each with the habit that makes it hard to mask."""

#: Trims contents, has no generation prompt, alternates strictly: the Llama 2 and early Mistral manner.
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)

#: Inserts an empty thinking block in the last turn only and drops the thinking of earlier ones: the Qwen 3 manner.
THINKING = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
{%- if loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' + content }}
{%- else %}
{{- '<|im_start|>assistant\\n' + content }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

#: Says itself what the assistant generates.
GENERATION = """\
{% for message in messages %}
{% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}
{{ message.content }}<|im_end|>
{% endgeneration %}
{% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

#: ChatML with tools, as Qwen 2.5 prints them, and a default system message.
TOOLS = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{%- endif %}
{%- if tools %}{{- '# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

#: Loop controls, a namespace, and today's date: the Llama 3.2 manner.
DATED = """\
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{%- set ns.system = message.content %}{%- break %}{%- endif %}
{%- endfor %}
{{- bos_token + 'Today is ' + strftime_now('%d %b %Y') + '. ' + ns.system + '\\n' }}
{%- for message in messages %}
{%- if message.role == 'system' %}{%- continue %}{%- endif %}
{{- message.role + ': ' + message.content + (eos_token if message.role == 'assistant' else '') + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}
"""

FAMILIES = {"inst": INST, "thinking": THINKING, "generation": GENERATION, "tools": TOOLS, "dated": DATED}
