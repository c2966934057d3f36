"""Fine-tuning that leaves refusal alone: subspaces, projected LoRA, the defences it is compared with (notebook 06)."""
