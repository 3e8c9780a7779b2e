"""Defences in other trainers: Hugging Face's ``Trainer`` and TRL's ``SFTTrainer``, with PEFT or without.

    from cwac_lab.integrations import named, protect

    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    protected = protect(trainer, named("weight"), harmful=PROMPTS)
    trainer.train()

The hooks are those of ``cwac_lab.defenses.interface``, called where the Lightning loop calls them, so that the same
batches end in the same weights (``tests/pipeline/test_integrations.py``). What the trainer saves, at any time, is under
the constraint: a plain model, or a plain PEFT adapter for the model that training began from. ``protected.merged()`` is
the plain model of both, in float32. One process; one call of ``train``; a stopped run starts anew.
"""

from cwac_lab.integrations.callback import DefenseCallback
from cwac_lab.integrations.setup import named, protect

__all__ = ["DefenseCallback", "named", "protect"]
