"""What the language models of the zoo share: attention, the trunk, its loss, checkpoints."""
