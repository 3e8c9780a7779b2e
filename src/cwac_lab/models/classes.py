"""The classes of transformers that models and tokenizers are loaded by."""

from __future__ import annotations

from typing import Any


def auto_classes() -> tuple[Any, Any]:
    """Return AutoModelForCausalLM and AutoTokenizer, with the library's own progress bars switched off."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM, AutoTokenizer
