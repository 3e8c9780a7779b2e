"""The table of all defences: a new one is one row of each, and every test of every defence is made of them."""

from __future__ import annotations

from cwac_lab.defenses.cwac.activation import ActivationConstraint
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite
from cwac_lab.defenses.literature.asft import AsFT
from cwac_lab.defenses.literature.constrained_sft import ConstrainedSFT
from cwac_lab.defenses.literature.ema import EMA
from cwac_lab.defenses.literature.kl import KL
from cwac_lab.defenses.literature.l2 import L2
from cwac_lab.defenses.literature.ldifs import LDIFS
from cwac_lab.defenses.literature.lisa import Lisa
from cwac_lab.defenses.literature.osf import OSF
from cwac_lab.defenses.literature.pgm import PGM
from cwac_lab.defenses.literature.safe_delta import SafeDelta
from cwac_lab.defenses.literature.safe_instruct import SafeInstruct
from cwac_lab.defenses.literature.safegrad import SafeGrad
from cwac_lab.defenses.literature.safelora import SafeLoRA
from cwac_lab.defenses.literature.sppft import SPPFT
from support.held import FULL, HALF, LORA, QLORA

# Switched off, each must train as if it were not there; switched on, it must make a difference.
FREE = {"energy": None, "rank": 0, "trainable": "all"}


def coupled(weight, activation):
    return Composite({"weight": weight, "activation": activation})


ZERO = {
    "none": lambda: Composite(),
    "weight": lambda: WeightConstraint(**FREE),
    "weight_gradient": lambda: WeightConstraint(**FREE, projection="gradient"),
    "weight_slowed": lambda: WeightConstraint(**FREE, tail="slowed", tail_strength=0),
    "activation": lambda: ActivationConstraint(strength=0),
    "coupled": lambda: coupled(WeightConstraint(**FREE), ActivationConstraint(strength=0)),
    "safe_instruct": lambda: SafeInstruct(share=0.0),
    "lisa": lambda: Lisa(safety_steps=0, strength=0),
    "sppft": lambda: SPPFT(block=[0.5, 0.5]),
    "l2": lambda: L2(strength=0),
    "kl": lambda: KL(strength=0),
    "constrained_sft": lambda: ConstrainedSFT(beta=0),
    "ldifs": lambda: LDIFS(strength=0),
    "safegrad": lambda: SafeGrad(strength=0),
    "safelora": lambda: SafeLoRA(share=0.0),
    "osf": lambda: OSF(share=0.0),
    "safe_delta": lambda: SafeDelta(strength=None, excluded=0.0, others="trained"),
    "asft": lambda: AsFT(strength=0),
    "ema": lambda: EMA(decay=0),
    "pgm": lambda: PGM(radius=None),
}
ACTIVE = {
    "none": lambda: Composite(),
    "weight": lambda: WeightConstraint(energy=0.9, trainable="all"),
    "weight_gradient": lambda: WeightConstraint(energy=0.9, projection="gradient", trainable="all"),
    "weight_both": lambda: WeightConstraint(energy=0.9, projection="both"),
    "weight_slowed": lambda: WeightConstraint(energy=0.7, tail="slowed", restore_every_n_steps=2),
    "weight_most": lambda: WeightConstraint(energy=0.99, restore_every_n_steps=2),  # by the complement
    "weight_penalised": lambda: WeightConstraint(energy=0.7, tail="penalised", trainable="all"),
    "kl+weight_both": lambda: Composite(
        {"kl": KL(strength=2.0), "weight": WeightConstraint(energy=0.9, projection="both", restore_every_n_steps=2)}
    ),
    "activation": lambda: ActivationConstraint(strength=2.0, depths=[0.5], n_latents=4, every_n_steps=2, batch_size=3),
    "activation_both": lambda: ActivationConstraint(strength=2.0, held_on="both", depths=[0.5], n_latents=4),
    "coupled": lambda: coupled(
        WeightConstraint(energy=0.9), ActivationConstraint(strength=2.0, depths=[0.5], n_latents=4, batch_size=3)
    ),
    "safe_instruct": lambda: SafeInstruct(share=0.2),
    "safe_instruct_replace": lambda: SafeInstruct(share=0.2, mixing="replace"),
    "lisa": lambda: Lisa(safety_steps=1, user_steps=2, strength=3.0, warmup_share=0.3),
    "sppft": lambda: SPPFT(block=[0.0, 0.5]),
    "l2": lambda: L2(strength=2.0),
    "kl": lambda: KL(strength=2.0),
    "kl_refusals": lambda: KL(strength=2.0, held_on="refusals", batch_size=3),
    "constrained_sft": lambda: ConstrainedSFT(beta=1.0),
    "ldifs": lambda: LDIFS(strength=2.0, depths=[0.0, 0.5]),
    "ldifs_refusals": lambda: LDIFS(strength=2.0, depths=[0.0, 0.5], held_on="refusals", batch_size=3),
    "safegrad": lambda: SafeGrad(strength=1.0, batch_size=3),
    "safelora": lambda: SafeLoRA(share=0.5),
    "osf": lambda: OSF(share=0.3),
    "safe_delta": lambda: SafeDelta(strength=50.0),
    "asft": lambda: AsFT(strength=2.0),
    "ema": lambda: EMA(decay=0.7),
    "pgm": lambda: PGM(radius=0.05),
    "pgm_frobenius": lambda: PGM(radius=0.03, norm="frobenius"),
    "ema+osf": lambda: Composite({"ema": EMA(decay=0.7), "osf": OSF(share=0.3)}),
    "ema+weight": lambda: Composite({"ema": EMA(decay=0.7), "weight": WeightConstraint(energy=0.9)}),
    "lisa+weight": lambda: Composite({"lisa": Lisa(1, 2, warmup_share=0.0), "weight": WeightConstraint(energy=0.9)}),
    "lisa+sppft": lambda: Composite({"lisa": Lisa(1, 2, warmup_share=0.0), "sppft": SPPFT(block=[0.5, 1.0])}),
}


# What is tuned, and in which precision.
WAYS = {
    "full": {"tuning": FULL},
    "full-bf16": {"tuning": FULL, "precision": "bf16-mixed"},
    "lora": {"tuning": LORA},
    "lora-bf16": {"tuning": HALF, "precision": "bf16-mixed"},
    "qlora": {"tuning": QLORA},
}
