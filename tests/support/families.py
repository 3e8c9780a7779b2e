"""Chat templates in the shapes of known models' own, and tokenizers with their control tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support import tiny

CONTROL = [
    "<pad>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>",
    "<eos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|system|>",
    "<|user|>", "<|assistant|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "[THINK]",
    "[/THINK]", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
]  # fmt: skip
WORDS = ["<think>", "</think>"]  # tokens of their own, but not special, as in Qwen3


@dataclass(frozen=True)
class Family:
    """A template, what its tokenizer calls begin and end, and what is expected of its prompts and answers.

    Attributes:
        template: The template.
        end: What must end an answer.
        opens: With what its prompts must end.
        bos: The tokenizer's begin; every prompt must hold it once if ``begins``.
        eos: The tokenizer's end.
        begins: Whether prompts begin with ``bos``.
        remark: Words of what is told about it; None for nothing.
    """

    template: str
    end: str
    opens: str
    bos: str | None = None
    eos: str | None = "</s>"
    begins: bool = False
    remark: str | None = None


_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DATED = "{{- '<|im_start|>system\nKnowledge ends in 2023. Today: ' + strftime_now('%A, %-d %B %Y') + '<|im_end|>\n' }}"
_QWEN3 = (
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}{%- elif message.role == 'assistant' %}"
    "{%- set thought = '' %}{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0]"
    ".split('<think>')[-1].strip('\n') %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
)

FAMILIES = {
    "llama2": Family(
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set first = '<<SYS>>\n' + "
        "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set turns = messages %}{% set first = '' %}"
        "{% endif %}"
        "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + "
        "'[INST] ' + (first if loop.index0 == 0 else '') + message['content'].strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        end="</s>", opens="[/INST]", bos="<s>", begins=True,
    ),
    "llama3": Family(
        "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = "
        "strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}{%- set messages = "
        "messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + "
        "'<|eot_id|>' }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content']|trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        end="<|eot_id|>", opens="<|end_header_id|>\n\n", bos="<|begin_of_text|>", eos="<|eot_id|>", begins=True,
    ),
    "mistral": Family(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + "
        "message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + "
        "eos_token }}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{% endfor %}",
        end="</s>", opens="[/INST]", bos="<s>", begins=True,
    ),
    "gemma2": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
        "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        end="<end_of_turn>", opens="<start_of_turn>model\n", bos="<bos>", eos="<eos>", begins=True,
    ),
    "gemma3": Family(
        "{{ bos_token }}{%- for message in messages -%}{%- set role = 'model' if message['role'] == 'assistant' else "
        "message['role'] -%}{{ '<start_of_turn>' + role + '\n' }}{%- if message['content'] is string -%}"
        "{{ message['content'] | trim }}{%- elif message['content'] is iterable -%}"
        "{%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
        "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}"
        "{{ '<start_of_turn>model\n' }}{%- endif -%}",
        end="<end_of_turn>", opens="<start_of_turn>model\n", bos="<bos>", eos="<eos>", begins=True,
    ),
    "qwen2": Family(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        "{% endif %}" + _CHATML,
        end="<|im_end|>", opens="<|im_start|>assistant\n", eos="<|im_end|>",
    ),
    "qwen3": Family(
        _QWEN3 + "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
        "{%- endif %}{%- endif %}",
        end="<|im_end|>", opens="<|im_start|>assistant\n<think>\n\n</think>\n\n", eos="<|im_end|>",
    ),
    "qwen3_without_a_switch": Family(
        _QWEN3 + "{%- endif %}",
        end="<|im_end|>", opens="<|im_start|>assistant\n<think>\n\n</think>\n\n", eos="<|im_end|>",
        remark="prompts end",
    ),
    "thoughts_only": Family(
        _QWEN3 + "{{- '<think>\n' }}{%- endif %}",
        end="<|im_end|>", opens="<|im_start|>assistant\n<think>\n\n</think>\n\n", eos="<|im_end|>",
        remark="prompts end",
    ),
    "r1": Family(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>' + "
        "message['content'] }}{% else %}{{ '<|assistant|>' + message['content'].split('</think>')[-1] + eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
        end="<|end|>", opens="<|assistant|><think>\n\n</think>\n\n", bos="<s>", eos="<|end|>", begins=True,
        remark="prompts end",
    ),
    "switched_off_when_asked": Family(
        _CHATML.replace(
            "assistant\n' }}{% endif %}",
            "assistant\n' }}{% if not (enable_thinking | default(true)) %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
            "{% endif %}",
        ),
        end="<|im_end|>", opens="</think>\n\n", eos="<|im_end|>", remark="asks otherwise than it shows answers",
    ),
    "magistral": Family(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' + "
        "message['content'] + '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[THINK]' }}{% endif %}",
        end="</s>", opens="[THINK]\n\n[/THINK]\n\n", bos="<s>", begins=True, remark="prompts end",
    ),
    "channels": Family(
        "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}{% else %}"
        "{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        end="<|return|>", opens="<|start|>assistant<|channel|>final<|message|>", eos="<|return|>", remark="prompts end",
    ),
    "phi3": Family(
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        end="<|end|>", opens="<|assistant|>\n", bos="<s>", eos="<|endoftext|>",
    ),
    "smollm2": Family(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        end="<|im_end|>", opens="<|im_start|>assistant\n", bos="<|im_start|>", eos="<|im_end|>",
    ),
    "smollm3": Family(
        "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
        "{%- set mode = '/think' if enable_thinking else '/no_think' -%}"
        "{%- set shown = '' if enable_thinking else '<think>\n\n</think>\n' -%}"
        "{{- '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' + "
        "strftime_now('%d %B %Y') + '\nReasoning Mode: ' + mode + '\n\n<|im_end|>\n' -}}"
        "{%- for message in messages -%}{%- if message.role == 'user' -%}"
        "{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}{%- elif message.role == 'assistant' -%}"
        "{{ '<|im_start|>assistant\n' + shown + message.content.lstrip('\n') + '<|im_end|>\n' }}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' + shown }}"
        "{%- endif -%}",
        end="<|im_end|>", opens="<|im_start|>assistant\n<think>\n\n</think>\n", eos="<|im_end|>",
    ),
    "granite": Family(
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
        "{%- set turns = messages[1:] %}{%- else %}{%- set system = 'Knowledge Cutoff Date: April 2024.\nDate: ' + "
        "strftime_now('%B %d, %Y') + '.\nYou are Granite, developed by IBM.' %}{%- set turns = messages %}{%- endif %}"
        "{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}{%- for message in turns %}"
        "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}"
        "{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
        "{%- endfor %}",
        end="<|end_of_text|>", opens="<|start_of_role|>assistant<|end_of_role|>", eos="<|end_of_text|>",
    ),
    "olmo2": Family(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + "
        "message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        end="<|endoftext|>", opens="<|assistant|>\n", bos="<|endoftext|>", eos="<|endoftext|>", begins=True,
    ),
    "zephyr": Family(
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + "
        "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
        end="</s>", opens="<|assistant|>\n", bos="<s>",
    ),
    "asks_nothing": Family(  # no words for the generation prompt at all
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}",
        end="</s>", opens="</s>\n<|assistant|>\n", remark="prompts end",
    ),
    "chatml_on_a_base_model": Family(_CHATML, end="<|im_end|>", opens="<|im_start|>assistant\n", eos="<|endoftext|>"),
    "alpaca": Family(
        "{{ 'Below is an instruction. Write a response.\n\n' }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% else %}"
        "{{ '### Response:\n' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        end="</s>", opens="### Response:\n", remark="ends no answer",
    ),
    "vicuna_without_end": Family(
        "{% for message in messages %}{{ ('USER: ' if message['role'] == 'user' else ' ASSISTANT: ') + "
        "message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        end="</s>", opens=" ASSISTANT:", remark="ends no answer",
    ),
    "parts": Family(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}",
        end="<|im_end|>", opens="<|im_start|>assistant\n", eos="<|im_end|>",
    ),
    "parts_by_place": Family(
        "{% for message in messages %}{{ '<|im_start|>' + message.role + ': ' + message.content[0].text + "
        "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}",
        end="<|im_end|>", opens="<|im_start|>assistant:", eos="<|im_end|>",
    ),
    "dated": Family(_DATED + _CHATML, end="<|im_end|>", opens="<|im_start|>assistant\n", eos="<|im_end|>"),
    "system_first": Family(
        "{% if messages[0].role != 'system' %}{{ raise_exception('Begin with a system prompt') }}{% endif %}"
        + _CHATML,
        end="<|im_end|>", opens="<|im_start|>assistant\n", eos="<|im_end|>", remark="wants a system message",
    ),
    "system_with_words_first": Family(
        "{% if messages[0].role != 'system' or not messages[0].content %}{{ raise_exception('no system prompt') }}"
        "{% endif %}" + _CHATML,
        end="<|im_end|>", opens="<|im_start|>assistant\n", eos="<|im_end|>", remark="You are a helpful assistant.",
    ),
}  # fmt: skip
DATED = ("llama3", "channels", "dated", "smollm3", "granite")  # whose plain rendering tells the day


@cache
def _built(prefixed: bool) -> Tokenizer:
    """Byte-level BPE, or one that puts a space before the first word, as Llama 2's does."""
    text = tiny.TEXT + [f" {line}" for line in tiny.TEXT]
    if not prefixed:
        built = Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        built.train_from_iterator(
            text, trainers.BpeTrainer(vocab_size=500, special_tokens=CONTROL, initial_alphabet=alphabet)
        )
        return built
    built = Tokenizer(models.BPE(byte_fallback=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    built.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, special_tokens=tokens))
    saved = json.loads(built.to_str())  # bytes are in the vocabulary, but no tokens with a part of their own
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(saved))


def tokenizer(family: Family, *, prefixed: bool = False, **changes: Any) -> Any:
    """A tokenizer with the template of a family, and its begin and end."""
    given = {"pad_token": "<pad>", "bos_token": family.bos, "eos_token": family.eos} | changes
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_built(prefixed).to_str()), **given)
    wrapped.add_special_tokens({"additional_special_tokens": [t for t in CONTROL if t not in given.values()]})
    wrapped.add_tokens(WORDS)
    wrapped.chat_template = family.template
    return wrapped
